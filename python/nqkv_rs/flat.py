"""Quantize and dequantize a plain tensor with any codec of the scheme language."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nqkv_rs import _core, _cuda
from nqkv_rs._arguments import dimensions, whole, word

__all__ = ["Quantized", "codebook", "dequantize", "quantize"]

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "e4m3": 1}
_FIELDS = {"absmax": 1, "signed_absmax": 1, "minmax": 2, "mean_absmax": 2, "rms": 1}


def codebook(name: str) -> Any:
    """The levels of a codebook, ascending.

    Args:
        name: ``"nf4"`` (``nf2`` .. ``nf8``), ``"lloyd3"``, ``"uniform4"``, ``"int4"``, ``"e2m1"``,
            ``"l2absmax4-64"``, ``"l2signed4-64"`` (bits, block).

    Returns:
        A float32 NumPy array.

    Raises:
        ValueError: there is no such codebook.

    Example:
        >>> len(codebook("nf4"))
        16
    """
    if not isinstance(name, str):
        raise TypeError(f"codebook: expected a name, got {name!r}")
    return np.array(_core.codebook(name), dtype=np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """A quantized tensor and how to read it.

    Attributes:
        codes: uint8, all codes, packed over the row-major tensor; element 0 in the low bits, or in
            the high nibble with ``order="high"``.
        fields: uint8 ``[blocks, fields, bytes]``: per block the scale, then the mean or zero point.
        shape: the tensor's shape.
        dtype: the tensor's dtype.
        codec: keyword arguments of :func:`quantize` that made it.
    """

    codes: Any
    fields: Any
    shape: tuple[int, ...]
    dtype: Any
    codec: dict[str, Any]

    @property
    def scales(self) -> Any:
        """The fields as numbers, float32 ``[blocks, fields]``, as a NumPy array."""
        fields = self.fields.cpu() if _is_torch(self.fields) else self.fields
        raw = np.ascontiguousarray(np.asarray(fields))
        kind = self.codec["scale_dtype"]
        if kind == "fp32":
            return raw.view("<f4")[..., 0]
        if kind == "fp16":
            return raw.view("<f2")[..., 0].astype(np.float32)
        if kind == "bf16":
            return (raw.view("<u2")[..., 0].astype(np.uint32) << 16).view(np.float32)
        byte = raw[..., 0].astype(np.int32)
        exponent, mantissa = (byte >> 3) & 15, byte & 7
        magnitude = np.where(exponent == 0, mantissa / 512, (8 + mantissa) * 2.0 ** (exponent - 10))
        return np.where(byte & 128, -magnitude, magnitude).astype(np.float32)

    @property
    def effective_bits(self) -> float:
        """Bytes of codes and fields times 8, over the number of elements."""
        n = int(np.prod(self.shape))
        return 8 * (_size(self.codes) + _size(self.fields)) / n if n else 0.0


def _size(x: Any) -> int:
    return int(np.prod(tuple(x.shape)))


def _name(codebook: str | Sequence[float]) -> str:
    """What the core calls a codebook: its name, or its levels in JSON."""
    if isinstance(codebook, str):
        return codebook
    try:
        levels = [float(v) for v in codebook]
    except OverflowError:
        raise ValueError("codebook: expected finite levels, got one beyond float64") from None
    except (TypeError, ValueError):
        raise TypeError(f"codebook: expected a name or numbers, got {codebook!r}") from None
    # JSON has no words for these, so the core could not name them.
    if not all(math.isfinite(v) for v in levels):
        raise ValueError(f"codebook: expected finite levels, got {levels}")
    return json.dumps(levels)


def _is_torch(x: Any) -> bool:
    return type(x).__module__.split(".")[0] == "torch"


def _empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    if _cuda.on_device(like):
        return _cuda.empty(like, shape, dtype)
    if _is_torch(like):
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype))
    return np.empty(shape, dtype=dtype)


def quantized_shapes(
    shape: tuple[int, ...], codebook: str, block: int, scale: str, scale_dtype: str, flat: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and fields of a tensor.

    Args:
        shape: of the tensor.
        codebook: its name, or its levels in JSON.
        block: elements that share a scale.
        scale: what a block stores.
        scale_dtype: how it is stored.
        flat: blocks run across rows.
    """
    codes, fields = _core.quantized_sizes(shape, codebook, block, scale, scale_dtype, flat)
    count, size = _FIELDS[scale], _BYTES[scale_dtype]
    return (codes,), (fields // (count * size), count, size)


def _contiguous(x: Any) -> bool:
    return not _is_torch(x) or bool(x.is_contiguous())


def quantize(
    x: Any,
    codebook: str | Sequence[float] = "nf4",
    *,
    block: int = 64,
    scale: str = "absmax",
    scale_dtype: str = "fp32",
    flat: bool = False,
    order: str = "low",
) -> Quantized:
    """Quantize a tensor; blocks run along its last axis, a shorter one at the end of a row.

    NF4 is QLoRA's (arXiv 2305.14314), absmax blocks for a KV cache NQKV's (arXiv 2505.16210).

    With ``flat=True, order="high"`` (NF4, absmax, fp32 scales) codes and scales are bit-equal to
    bitsandbytes 0.50 (``quantize_4bit(quant_type="nf4")``), except where a last, partial block has
    no magnitude above 1e-38: its scale is stored as it is here, and as 1e-38 there.

    Args:
        x: float64, float32, float16 or bfloat16, any shape and strides, in host memory (NumPy,
            PyTorch, or anything else that has ``__dlpack__`` and ``shape``) or on a CUDA device
            (PyTorch, CuPy; not float64). There nothing waits for the result, so that a NaN or
            infinity is not refused: its block holds numbers without meaning.
        codebook: a name (:func:`codebook`), or the ascending levels themselves.
        block: elements that share a scale, a multiple of 8 from 16 to 512.
        scale: ``"absmax"``, ``"signed_absmax"``, ``"minmax"``, ``"mean_absmax"`` or ``"rms"``.
        scale_dtype: ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"e4m3"``.
        flat: let blocks run over the whole row-major tensor, across rows.
        order: which nibble of a byte comes first at 4 bits, ``"low"`` or ``"high"``.

    Returns:
        A :class:`Quantized`, with tensors of the kind that came in.

    Raises:
        ValueError: a NaN or infinity (named by its index), or a number outside its domain.
        TypeError: a wrong dtype or device.

    Example:
        >>> import numpy as np
        >>> q = quantize(np.ones((2, 64), dtype="float32"))
        >>> float(dequantize(q)[0, 0]), q.effective_bits
        (1.0, 4.5)
    """
    shape = dimensions("x", x)
    name = _name(codebook)
    block = whole("block", block, 16, 512)
    word("scale", scale, list(_FIELDS))
    word("scale_dtype", scale_dtype, list(_BYTES))
    if not isinstance(flat, bool):
        raise TypeError(f"flat: expected True or False, got {flat!r}")
    if not isinstance(order, str):
        raise TypeError(f"order: expected 'low' or 'high', got {order!r}")
    shapes = quantized_shapes(shape, name, block, scale, scale_dtype, flat)
    codes, fields = (_empty(x, s, "uint8") for s in shapes)
    words = (name, block, scale, scale_dtype, flat, order)
    if _cuda.on_device(x):
        x = x if _contiguous(x) else x.contiguous()
        _core.cuda_quantize(x, codes, fields, *words)
    else:
        _core.quantize(x, codes, fields, *words)
    codec = {
        "codebook": codebook if isinstance(codebook, str) else tuple(codebook),
        "block": block,
        "scale": scale,
        "scale_dtype": scale_dtype,
        "flat": flat,
        "order": order,
    }
    return Quantized(codes=codes, fields=fields, shape=shape, dtype=x.dtype, codec=codec)


def dequantize(q: Quantized, *, out: Any | None = None) -> Any:
    """The numbers that a quantized tensor stands for, each one fma of level, scale and offset.

    Args:
        q: what :func:`quantize` returned.
        out: where to write, contiguous, ``q.shape``, any float dtype; a new array in the dtype
            that was quantized if None.

    Returns:
        ``out``.

    Raises:
        ValueError: ``out`` has another shape.
        TypeError: a wrong dtype or device.
    """
    if not isinstance(q, Quantized):
        raise TypeError(f"q: expected what quantize() returned, got {type(q).__name__}")
    if out is not None and tuple(getattr(out, "shape", ())) != q.shape:
        got = list(getattr(out, "shape", ()))
        raise ValueError(f"out: expected shape {list(q.shape)}, got {got}")
    if out is None:
        if _is_torch(q.codes):
            import torch

            out = torch.empty(q.shape, dtype=q.dtype, device=q.codes.device)
        elif _cuda.on_device(q.codes):
            out = _cuda.empty(q.codes, q.shape, str(q.dtype))
        else:
            out = np.empty(q.shape, dtype=q.dtype)
    codec = dict(q.codec)
    book = codec.pop("codebook")
    decode = _core.cuda_dequantize if _cuda.on_device(q.codes) else _core.dequantize
    decode(q.codes, q.fields, out, _name(book), **codec)
    return out
