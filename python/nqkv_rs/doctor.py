"""``nqkv-rs doctor``: what is installed, what the machine has, and what will run where.

Needs nothing but the core: a machine on which torch is missing or broken is exactly the one on
which people ask.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from typing import Any

from . import _core

__all__ = ["add_arguments", "report", "run"]

_PACKAGES = ("numpy", "torch", "transformers", "gguf", "rich")


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
        "runs_on": _runs_on(versions, cpu, gpu),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    return {"machine": platform.machine(), "system": platform.system(), **_core.cpu_features()}


def _gpu() -> dict[str, Any]:
    """What the core finds: it asks the driver itself, without torch."""
    version, (count, why) = _core.cuda_driver_version(), _core.cuda_status()
    devices = []
    for ordinal in range(count):
        try:
            name, (major, minor), processors = _core.cuda_device(ordinal)
            devices.append(f"{name} (sm_{major}{minor}, {processors} multiprocessors)")
        except RuntimeError as error:
            devices.append(f"device {ordinal}: {error}")
    return {
        "driver": None if version is None else f"CUDA {version[0]}.{version[1]}",
        "devices": devices,
        "usable": count > 0,
        "why": why or "kernels run; they were compiled for compute capability 8.0 and newer",
    }


def _runs_on(versions: dict[str, Any], cpu: dict[str, Any], gpu: dict[str, Any]) -> dict[str, str]:
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
        "CUDA tensors": "CUDA kernels" if gpu["usable"] else f"not here: {gpu['why']}",
    }


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not found"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
