"""Importing the package is light: what is heavy is loaded when it is used."""

from __future__ import annotations

import subprocess
import sys


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, nqkv_rs, nqkv_rs.saved, nqkv_rs.cli; "
        "print(sorted({'torch', 'transformers', 'safetensors', 'ml_dtypes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
