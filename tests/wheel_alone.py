"""The wheel with numpy and nothing else runs `quantize` and `doctor`; `make alone` calls this."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import nqkv_rs

where = Path(nqkv_rs.__file__).resolve()
assert where.is_relative_to(Path(sys.prefix).resolve()), (
    f"expected the installed wheel, got {where}"
)
assert importlib.util.find_spec("torch") is None, "expected a venv without torch, found torch"

heavy = {"torch", "transformers", "safetensors"} & set(sys.modules)
assert not heavy, f"expected an import of numpy and nothing else, got {heavy}"

x = np.random.default_rng(0).standard_normal((4, 256), dtype=np.float32)
back = np.asarray(nqkv_rs.dequantize(nqkv_rs.quantize(x)))
assert back.shape == x.shape, f"expected shape {x.shape}, got {back.shape}"
# Four bits on normal numbers: an rms error near 0.09 of the numbers' own.
error = float(np.sqrt(np.mean((back - x) ** 2) / np.mean(x**2)))
assert 0 < error < 0.15, f"expected a relative error in (0, 0.15), got {error}"

command = [str(Path(sys.executable).parent / "nqkv-rs"), "doctor", "--json"]
report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
assert isinstance(report, dict) and report, f"expected a JSON object, got {report!r}"

print(f"wheel alone: quantize (error {error:.3f}) and doctor ({len(report)} entries) run")
