"""Quantized KV caches for transformer inference.

Importing this package imports neither torch nor transformers; what needs them loads them on
first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nqkv_rs._core import PAGE_TOKENS, PAGE_VERSION, __version__
from nqkv_rs.cache import LayerCache
from nqkv_rs.flat import Quantized, codebook, dequantize, quantize
from nqkv_rs.scheme import Scheme, Side, presets

if TYPE_CHECKING:
    from nqkv_rs.integrations.transformers import NqkvCache

__all__ = [
    "PAGE_TOKENS",
    "PAGE_VERSION",
    "LayerCache",
    "NqkvCache",
    "Quantized",
    "Scheme",
    "Side",
    "__version__",
    "codebook",
    "cuda_is_available",
    "dequantize",
    "presets",
    "quantize",
]


def cuda_is_available() -> bool:
    """Whether CUDA kernels can run: False, since this version has none."""
    return False


def __getattr__(name: str) -> Any:
    if name == "NqkvCache":
        from nqkv_rs._extras import require

        require("torch", "transformers")
        require("transformers", "transformers")
        from nqkv_rs.integrations.transformers import NqkvCache

        return NqkvCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
