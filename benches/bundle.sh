#!/bin/sh
# Runs on a machine with a GPU what `make bundle` has put into this folder. It needs python3 with numpy, torch, pytest and
# transformers, no compiler and no network. Words: install, tests, bench (criterion), codecs, attention; none is all of them.
set -eu
cd "$(dirname "$0")"
export PYTHONPATH="$PWD/site"
SHAPE="${SHAPE:-llama8b:16,32,8,128,16384}"

install() {
    python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target site wheel/*.whl
    site/bin/nqkv-rs doctor
}

for word in ${*:-install tests bench codecs attention}; do
    case "$word" in
        install) install ;;
        tests)
            printf '[pytest]\npythonpath = tests\nmarkers =\n    gpu: of CUDA\n    model: of real models\n' > pytest.ini
            python3 -m pytest -q --import-mode=importlib -p no:cacheprovider -m gpu tests/test_cuda_*.py \
                tests/test_ops.py tests/test_decode_attention.py
            ;;
        bench) ./gpu --bench ;;
        codecs) python3 benches/gpu_codecs.py --json --shape "$SHAPE" ;;
        attention) test ! -e benches/gpu_attention.py || python3 benches/gpu_attention.py --json --shape "$SHAPE" ;;
        *) echo "expected install, tests, bench, codecs or attention, got $word" >&2 && exit 2 ;;
    esac
done
