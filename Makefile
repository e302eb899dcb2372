# `make` lists the targets. demo and test set everything up themselves, in .venv; a second run skips what is up to date.
PYTHON ?= python3
DEMO   ?=
PYTEST ?=

VENV := $(CURDIR)/.venv
BIN  := $(VENV)/bin
PY   := $(BIN)/python
PIP  := $(PY) -m pip --disable-pip-version-check
GET  := $(PIP) install --progress-bar on
# maturin finds the interpreter and ziglang through these two.
IN_VENV := VIRTUAL_ENV="$(VENV)" PATH="$(BIN):$$PATH"

MATURIN := maturin==1.16.0
ZIG     := ziglang==0.15.2
# The wheel for this machine; `make wheel` puts those for others into dist/ itself.
LOCAL   := dist/local
SOURCES := $(wildcard Cargo.toml Cargo.lock pyproject.toml README.md LICENSE) \
           $(shell find src python cuda/ptx -type f ! -name '*.so' ! -name '*.pyc' ! -path '*/.*' 2>/dev/null)
EXTRAS  := demo test lint

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-compat build wheel sdist lint fmt docs bench clean rust python alone
.PHONY: cuda cuda-check soak fuzz fuzz-asan bundle

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.with-demo ## set up, then generate with a real model through the packed cache (DEMO="--scheme nqkv ...")
	$(BIN)/nqkv-rs demo $(DEMO)

test: rust cuda-check lint alone python ## set up, then run everything that must pass: Rust, CUDA, lint, types, Python

build: $(VENV)/.installed ## build the wheel for this machine and install it into .venv

# --- the venv: every stamp lies in it, so that removing .venv forgets them all --------------------------------------

$(VENV)/.tools:
	@echo "== venv: $(VENV)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(GET) $(MATURIN)
	@touch $@

$(LOCAL)/.built: $(SOURCES) | $(VENV)/.tools
	@echo "== wheel for this machine (a cold release build takes a few minutes)"
	@rm -rf $(LOCAL)
	$(IN_VENV) $(PY) -m maturin build --release --interpreter $(PY) --out $(LOCAL)
	@touch $@

# --force-reinstall: pip would keep an older build of the same version. --no-deps: it would download torch again.
$(VENV)/.installed: $(LOCAL)/.built
	$(GET) $(LOCAL)/*.whl
	$(PIP) install --quiet --force-reinstall --no-deps $(LOCAL)/*.whl
	@touch $@

# .with-demo, .with-test, ...: the wheel with the extra of that name.
$(EXTRAS:%=$(VENV)/.with-%): $(VENV)/.with-%: $(VENV)/.installed $(VENV)/.extra-%
	@touch $@

# The extras are resolved again only when pyproject.toml changes, not for each new wheel.
$(EXTRAS:%=$(VENV)/.extra-%): $(VENV)/.extra-%: pyproject.toml | $(VENV)/.installed
	@echo "== packages of the extra '$*' (torch, where it is missing, is 4 GB: about three minutes)"
	$(GET) "$$(echo $(LOCAL)/*.whl)[$*]"
	@touch $@

# --- the parts of `make test` ---------------------------------------------------------------------------------------

rust: ## cargo: fmt, clippy with and without the Python module, tests, benches build
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	cargo clippy --all-targets --features python -- -D warnings
	cargo test
	cargo bench --no-run

lint: $(VENV)/.with-lint $(VENV)/.with-test ## ruff, mypy --strict, stubtest on the installed module, API page up to date
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy --strict
	$(PY) -m mypy.stubtest nqkv_rs._core
	$(PY) docs/build_api.py --check

# An empty venv outside the checkout holds the wheel and numpy, nothing else.
alone: $(LOCAL)/.built ## the wheel alone runs quantize and doctor
	dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && $(PYTHON) -m venv "$$dir/venv" && \
	"$$dir/venv/bin/python" -m pip --disable-pip-version-check install --quiet $(LOCAL)/*.whl && \
	cp tests/wheel_alone.py "$$dir" && cd "$$dir" && venv/bin/python wheel_alone.py

python: $(VENV)/.with-test ## pytest on the installed wheel, the real model included (PYTEST="-k page")
	$(PY) -m pytest $(PYTEST)

# The venvs lie in .venv/compat; torch and all else that is large is that of .venv.
test-compat: $(VENV)/.with-test ## transformers tests on three releases, 5.5 to the newest; result into docs/compat.md
	$(PY) tests/compat.py --write docs/compat.md

cuda-check: $(VENV)/.tools ## prove that cuda/ptx is what cuda/*.cu compiles to (no GPU needed)
	$(PY) cuda/build.py --check

# --- longer runs of what `make test` runs in slices -----------------------------------------------------------------

soak: ## a million random operations against a dense model (NQKV_SOAK_OPS, NQKV_SOAK_SEED)
	NQKV_SOAK_OPS=$${NQKV_SOAK_OPS:-1000000} cargo test --test soak -- --nocapture

FUZZ_INPUTS := $${NQKV_FUZZ_INPUTS:-1000000}
fuzz: $(VENV)/.with-test ## a million hostile inputs for each parser (NQKV_FUZZ_INPUTS, NQKV_FUZZ_SEED)
	NQKV_FUZZ_INPUTS=$(FUZZ_INPUTS) cargo test --test fuzz -- --nocapture
	NQKV_FUZZ_INPUTS=$(FUZZ_INPUTS) $(PY) -m pytest tests/test_capsules.py --timeout 0

# The sanitizer's runtime comes with the compiler; its flag is for nightly ones.
ASAN := RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/asan
fuzz-asan: ## fuzz and soak in slices under AddressSanitizer (x86_64 Linux)
	NQKV_FUZZ_INPUTS=$${NQKV_FUZZ_INPUTS:-100000} NQKV_SOAK_OPS=$${NQKV_SOAK_OPS:-20000} $(ASAN) \
		cargo test --target x86_64-unknown-linux-gnu --test fuzz --test soak --test cache -- --nocapture

# --- the rest -------------------------------------------------------------------------------------------------------

wheel: sdist $(VENV)/.zig ## abi3 manylinux2014 wheel and sdist into dist/
	rm -f dist/*.whl
	$(IN_VENV) $(PY) -m maturin build --release --zig --compatibility manylinux2014 --interpreter $(PY) --out dist

sdist: $(VENV)/.tools ## source distribution into dist/
	rm -f dist/*.tar.gz
	$(IN_VENV) $(PY) -m maturin sdist --out dist

$(VENV)/.zig: $(VENV)/.tools
	$(GET) $(ZIG)
	@touch $@

cuda: $(VENV)/.tools ## compile cuda/*.cu to cuda/ptx (the compiler comes from the package index)
	$(PY) cuda/build.py

fmt: $(VENV)/.with-lint ## format Rust and Python in place
	cargo fmt
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

docs: $(VENV)/.with-demo ## write docs/api.md from the docstrings
	$(PY) docs/build_api.py

bench: ## criterion benches (no Python needed)
	cargo bench

# Without symbols: the bench binary is a tenth of what `cargo bench` leaves.
STRIPPED := CARGO_PROFILE_BENCH_DEBUG=false CARGO_PROFILE_BENCH_STRIP=true
BUNDLE   := dist/bundle
bundle: $(LOCAL)/.built ## bench binary, wheel, tests and benches in dist/bundle, for a GPU machine without Rust or network
	rm -rf $(BUNDLE) && mkdir -p $(BUNDLE)/wheel $(BUNDLE)/benches
	cp "$$($(STRIPPED) cargo bench --bench gpu --no-run --message-format=json | \
		sed -nE 's/.*"name":"gpu".*"executable":"([^"]+)".*/\1/p')" $(BUNDLE)/gpu
	cp $(LOCAL)/*.whl $(BUNDLE)/wheel
	cp benches/*.py $(BUNDLE)/benches
	cp -r tests $(BUNDLE)/tests
	find $(BUNDLE) -name __pycache__ -prune -exec rm -r {} +
	cp benches/bundle.sh $(BUNDLE)/run.sh
	@du -sh $(BUNDLE) && test "$$(du -sm $(BUNDLE) | cut -f1)" -lt 60

clean: ## remove build products; .venv stays
	cargo clean
	rm -rf dist .pytest_cache .mypy_cache .ruff_cache
	rm -f $(VENV)/.installed $(VENV)/.with-*
