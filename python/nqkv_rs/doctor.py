"""``nqkv-rs doctor``: what is installed, what the machine has, and what will run where.

Needs nothing but the core: a machine on which torch is missing or broken is exactly the one on
which people ask.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
from importlib import metadata
from typing import Any

from . import _core

__all__ = ["add_arguments", "report", "run"]

_PACKAGES = ("numpy", "torch", "transformers", "gguf", "rich")
# This version carries no CUDA kernels; the version that brings them sets this.
_NO_CUDA = "CUDA kernels are not built into this version; everything runs on the CPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the report; returns the exit status."""
    found = report()
    if options.json:
        print(json.dumps(found))
        return 0
    for section, entries in found.items():
        print(section.replace("_", " "))
        width = max(len(key) for key in entries)
        for key, value in entries.items():
            print(f"  {key.replace('_', ' '):<{width}}  {_plain(value)}")
    return 0


def report() -> dict[str, dict[str, Any]]:
    """Everything ``doctor`` knows.

    Returns:
        ``versions`` (None for what is not installed), ``cpu`` (features, threads, chosen path),
        ``gpu`` (``devices``, ``driver``, ``usable`` and ``why``), and ``runs_on``: for each kind of
        work, where it will run, or what it lacks.
    """
    versions: dict[str, Any] = {
        "nqkv_rs": _core.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }
    gpu = _gpu()
    versions["driver"] = gpu["driver"]
    cpu = _cpu()
    return {
        "versions": versions,
        "cpu": cpu,
        "gpu": gpu,
        "runs_on": _runs_on(versions, cpu),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    return {"machine": platform.machine(), "system": platform.system(), **_core.cpu_features()}


def _gpu() -> dict[str, Any]:
    """Ask the CUDA driver itself: it answers without torch, and cannot be a CPU-only build."""
    found: dict[str, Any] = {"driver": None, "devices": [], "usable": False, "why": _NO_CUDA}
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {**found, "why": f"no NVIDIA driver here (libcuda.so.1 does not load); {_NO_CUDA}"}
    status = cuda.cuInit(0)
    if status != 0:
        return {**found, "why": f"the NVIDIA driver does not start (cuInit: {status}); {_NO_CUDA}"}
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) == 0:
        # 13020 means CUDA 13.2.
        found["driver"] = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    if cuda.cuDeviceGetCount(ctypes.byref(count)) == 0:
        found["devices"] = [_device_name(cuda, index) for index in range(count.value)]
    if not found["devices"]:
        found["why"] = f"the NVIDIA driver shows no device; {_NO_CUDA}"
    return found


def _device_name(cuda: ctypes.CDLL, index: int) -> str:
    handle, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if cuda.cuDeviceGet(ctypes.byref(handle), index) != 0:
        return f"device {index}"
    cuda.cuDeviceGetName(name, len(name), handle)
    return name.value.decode(errors="replace")


def _runs_on(versions: dict[str, Any], cpu: dict[str, Any]) -> dict[str, str]:
    def unless(packages: tuple[str, ...], extra: str) -> str:
        missing = [name for name in packages if versions[name] is None]
        if not missing:
            return core
        return f'not here: {", ".join(missing)} missing; pip install "nqkv-rs[{extra}]"'

    core = f"CPU ({cpu['path']})"
    return {
        "quantize, dequantize": core,
        "cache and attention": core,
        "generation with transformers": unless(("torch", "transformers"), "transformers"),
        "nqkv-rs demo": unless(("torch", "transformers", "gguf", "rich"), "demo"),
        "CUDA tensors": "refused by name; move them to the CPU",
    }


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not found"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
