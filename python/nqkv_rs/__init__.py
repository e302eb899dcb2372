"""Quantized KV caches for transformer inference.

Importing this package imports neither torch nor transformers; what needs them loads them on
first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nqkv_rs import _core
from nqkv_rs._core import PAGE_TOKENS, PAGE_VERSION, __version__
from nqkv_rs.cache import LayerCache
from nqkv_rs.decode import decode_attention
from nqkv_rs.flat import Quantized, codebook, dequantize, quantize
from nqkv_rs.scheme import Scheme, Side, presets
from nqkv_rs.transform import Transform, transform

if TYPE_CHECKING:
    from nqkv_rs.integrations.enable import disable, enable
    from nqkv_rs.integrations.transformers import NqkvCache

__all__ = [
    "PAGE_TOKENS",
    "PAGE_VERSION",
    "LayerCache",
    "NqkvCache",
    "Quantized",
    "Scheme",
    "Side",
    "Transform",
    "__version__",
    "codebook",
    "cuda_is_available",
    "decode_attention",
    "dequantize",
    "disable",
    "enable",
    "presets",
    "quantize",
    "transform",
    "warmup",
]


def cuda_is_available() -> bool:
    """Whether CUDA kernels can run here; ``nqkv-rs doctor`` says why not."""
    return _core.cuda_status()[0] > 0


def warmup(device: int = 0) -> None:
    """Load every kernel now, so that no later call has to: the driver compiles them once.

    Args:
        device: ordinal of the CUDA device.

    Raises:
        RuntimeError: no such device, or a driver that is too old.
    """
    _core.cuda_warm_up(device)


# What needs torch and transformers, and the module that has it.
_LAZY = {
    "NqkvCache": "nqkv_rs.integrations.transformers",
    "disable": "nqkv_rs.integrations.enable",
    "enable": "nqkv_rs.integrations.enable",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        from nqkv_rs._extras import require

        require("torch", "transformers")
        require("transformers", "transformers")
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
