"""Codecs and attention as PyTorch operators, ``torch.ops.nqkv.*``: for ``torch.compile``.

Importing this module registers them, for CPU and CUDA tensors. They are for inference: outputs
carry no gradient, so call them under ``torch.no_grad()`` or on tensors that need none. The words of
a codec stand where :func:`nqkv_rs.quantize` has them. A cache goes into a compiled function as its
:func:`handle`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import library

from nqkv_rs import _core
from nqkv_rs._ops import append, decode_attention, handle
from nqkv_rs.flat import quantized_shapes

__all__ = ["append", "decode_attention", "dequantize", "handle", "quantize"]

_WORDS = "str codebook, int block, str scale, str scale_dtype, bool flat, str order"
# The operators end with this object.
_LIBRARY: Any = library.Library("nqkv", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"quantize_into(Tensor x, Tensor(a!) codes, Tensor(b!) fields, {_WORDS}) -> ()")
_LIBRARY.define(f"dequantize_into(Tensor codes, Tensor fields, Tensor(a!) out, {_WORDS}) -> ()")
_LIBRARY.define(f"quantize(Tensor x, {_WORDS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"dequantize(Tensor codes, Tensor fields, SymInt[] shape, ScalarType dtype, {_WORDS}) -> Tensor"
)


def _quantize_into(x: Any, codes: Any, fields: Any, *words: Any) -> None:
    x = x.detach() if x.requires_grad else x
    if x.is_cuda:
        _core.cuda_quantize(x if x.is_contiguous() else x.contiguous(), codes, fields, *words)
    else:
        _core.quantize(x, codes, fields, *words)


def _empty(x: Any, *words: Any) -> tuple[torch.Tensor, torch.Tensor]:
    codebook, block, scale, scale_dtype, flat, _ = words
    shape = tuple(int(n) for n in x.shape)
    shapes = quantized_shapes(shape, codebook, block, scale, scale_dtype, flat)
    codes, fields = (torch.empty(s, dtype=torch.uint8, device=x.device) for s in shapes)
    return codes, fields


def _quantize(x: Any, *words: Any) -> tuple[torch.Tensor, torch.Tensor]:
    codes, fields = _empty(x, *words)
    _quantize_into(x, codes, fields, *words)
    return codes, fields


def _dequantize(codes: Any, fields: Any, shape: Any, dtype: Any, *words: Any) -> torch.Tensor:
    out = torch.empty(list(shape), dtype=dtype, device=codes.device)
    (_core.cuda_dequantize if out.is_cuda else _core.dequantize)(codes, fields, out, *words)
    return out


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("quantize", _quantize, _device)
    _LIBRARY.impl("dequantize", _dequantize, _device)


# No Python between them where tensors are borrowed without any, too: from PyTorch 2.11 on.
_DIRECT = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
_LIBRARY.impl("quantize_into", _quantize_into, "CPU")
_LIBRARY.impl("quantize_into", _core.cuda_quantize if _DIRECT else _quantize_into, "CUDA")
_LIBRARY.impl("dequantize_into", _core.dequantize, "CPU")
_LIBRARY.impl("dequantize_into", _core.cuda_dequantize, "CUDA")


def _nothing(a: Any, b: Any, c: Any, *words: Any) -> None:
    return None


def _fake_dequantize(codes: Any, fields: Any, shape: Any, dtype: Any, *words: Any) -> torch.Tensor:
    return torch.empty(list(shape), dtype=dtype, device=codes.device)


# What they return, without running them.
_FAKES: dict[str, Any] = {
    "quantize_into": _nothing,
    "dequantize_into": _nothing,
    "quantize": _empty,
    "dequantize": _fake_dequantize,
}
for _name, _fake in _FAKES.items():
    library.register_fake(f"nqkv::{_name}", _fake, lib=_LIBRARY)


def quantize(
    x: torch.Tensor,
    codebook: str = "nf4",
    *,
    block: int = 64,
    scale: str = "absmax",
    scale_dtype: str = "fp32",
    flat: bool = False,
    order: str = "low",
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`nqkv_rs.quantize` as one operator, which ``torch.compile`` can hold.

    Args:
        x: float32, float16 or bfloat16 (float64, too, on the CPU).
        codebook: a codebook's name.
        block: elements that share a scale.
        scale: what a block stores.
        scale_dtype: how it is stored.
        flat: let blocks run across rows.
        order: which nibble of a byte comes first at 4 bits.

    Returns:
        Codes and fields, uint8.
    """
    words = (codebook, block, scale, scale_dtype, flat, order)
    codes, fields = torch.ops.nqkv.quantize(x, *words)
    return codes, fields


def dequantize(
    codes: torch.Tensor,
    fields: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    codebook: str = "nf4",
    *,
    block: int = 64,
    scale: str = "absmax",
    scale_dtype: str = "fp32",
    flat: bool = False,
    order: str = "low",
) -> torch.Tensor:
    """:func:`nqkv_rs.dequantize` as one operator.

    Args:
        codes: what :func:`quantize` returned.
        fields: likewise.
        shape: of the tensor that was quantized.
        dtype: of the result.
        codebook: as it was quantized with, like all that follow.
        block: elements that share a scale.
        scale: what a block stores.
        scale_dtype: how it is stored.
        flat: blocks run across rows.
        order: which nibble of a byte comes first.

    Returns:
        The numbers.
    """
    words = (codebook, block, scale, scale_dtype, flat, order)
    result: torch.Tensor = torch.ops.nqkv.dequantize(codes, fields, list(shape), dtype, *words)
    return result
