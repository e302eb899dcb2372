"""Decode attention as a plain function over arrays of any library that speaks DLPack."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from nqkv_rs import _cuda
from nqkv_rs._arguments import dimensions, real, whole, wholes
from nqkv_rs.cache import LayerCache

if TYPE_CHECKING:
    from nqkv_rs.cuda_cache import CudaLayerCache

__all__ = ["decode_attention"]

_FLOATS = ("float64", "float32", "float16", "bfloat16")


def decode_attention(
    q: Any,
    cache: LayerCache | CudaLayerCache,
    *,
    scale: float | None = None,
    starts: Any | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    out: Any | None = None,
    lse: Any | bool | None = None,
) -> Any:
    """Attention of the newest tokens' queries on a cache, read from codes where it lies.

    Call it after the queries' own tokens were appended: query ``i`` of ``n`` stands at position
    ``tokens - n + i`` and attends every earlier position and its own. On a CUDA device a decode
    step is one launch on the current stream of PyTorch, which waits for nothing and may be captured
    in a CUDA graph; what no kernel takes goes over dequantized tiles, with a warning
    (docs/limits.md).

    Args:
        q: ``[batch, q_heads, n, key_dim]``; ``q_heads`` is a multiple of the cache's ``kv_heads``.
            In host memory for a :class:`LayerCache` (NumPy, PyTorch, ...), on the cache's device
            for a ``CudaLayerCache`` (PyTorch, CuPy; JAX if CuPy is there to hold the result).
            float16 and bfloat16 are the fast dtypes on CUDA; float32 asks for fp32 arithmetic.
        cache: a :class:`LayerCache` or ``nqkv_rs.cuda_cache.CudaLayerCache``.
        scale: multiplies scores; ``key_dim ** -0.5`` if None.
        starts: for each sequence the first position that may be attended (left padding): integers,
            or an int32 or int64 array on the cache's device.
        window: a query at ``p`` attends ``p - window + 1 ..= p``.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``.
        out: where to write, ``[batch, n, q_heads, value_dim]``, contiguous; a new array of the
            library and dtype of ``q`` if None.
        lse: True for the log-sum-exp of scores besides, or where to write it, float32
            ``[batch, n, q_heads]``.

    Returns:
        ``out``; with ``lse``, the pair ``(out, lse)``. A query that may attend nothing gets zeros,
        and log-sum-exp minus infinity.

    Raises:
        ValueError: a wrong shape, or fewer tokens in the cache than queries.
        TypeError: a wrong dtype or device, or another kind of cache.

    Example:
        >>> import numpy as np
        >>> cache = LayerCache("nqkv4", kv_heads=2, key_dim=64)
        >>> k, v = np.random.randn(2, 1, 2, 200, 64).astype("float32")
        >>> cache.append(k, v)
        >>> decode_attention(np.ones((1, 8, 1, 64), "float32"), cache).shape
        (1, 1, 8, 64)
    """
    on_device = _is_on_device(cache)
    shape = dimensions("q", q)
    if len(shape) != 4:
        raise ValueError(f"q: expected shape [batch, q_heads, n, key_dim], got {list(shape)}")
    name = str(getattr(q, "dtype", None)).removeprefix("torch.")
    if name not in _FLOATS:
        raise TypeError(f"q: expected dtype {', '.join(_FLOATS)}, got {name}")
    for what, x in (("q", q), ("out", out), ("lse", lse)):
        if x is not None and not isinstance(x, bool):
            _check_place(what, x, cache if on_device else None)
    scale = None if scale is None else real("scale", scale)
    window = None if window is None else whole("window", window, 1)
    soft_cap = None if soft_cap is None else real("soft_cap", soft_cap)
    batch, heads, n, _ = shape
    if out is None:
        if n > 1 and cache.core.batch > 0 and n > (held := cache.tokens(0)):
            # Said here, before memory is asked for.
            expected = f"at most {held} (the tokens held, queries included)"
            raise ValueError(f"queries: expected {expected}, got {n}")
        out = _empty(q, (batch, n, heads, cache.value_dim), name)
    if lse is True:
        lse = _empty(q, (batch, n, heads), "float32")
    elif lse is False:
        lse = None
    if isinstance(cache, LayerCache):
        cache.attend_into(q, out, scale, starts=starts, window=window, soft_cap=soft_cap, lse=lse)
    else:
        _on_device(q, cache, out, scale, starts, window, soft_cap, lse)
    return out if lse is None else (out, lse)


def _is_on_device(cache: Any) -> bool:
    if isinstance(cache, LayerCache):
        return False
    # Whoever has such a cache has imported its module: this function must not import torch.
    module = sys.modules.get("nqkv_rs.cuda_cache")
    if module is not None and isinstance(cache, module.CudaLayerCache):
        return True
    kind = f"{type(cache).__module__}.{type(cache).__qualname__}"
    raise TypeError(f"cache: expected nqkv_rs.LayerCache or CudaLayerCache, got {kind}")


def _check_place(what: str, x: Any, cache: Any) -> None:
    if cache is None:
        if _cuda.on_device(x):
            expected = "an array in host memory, where the cache is"
            raise TypeError(f"{what}: expected {expected}, got one on a CUDA device")
        return
    if not hasattr(x, "__dlpack_device__"):
        got = type(x).__name__
        raise TypeError(f"{what}: expected an array with __dlpack__, got {got}")
    if getattr(x, "device", None) == cache.device:
        return
    kind, ordinal = (int(i) for i in x.__dlpack_device__())
    if (kind, ordinal) != (2, cache.device.index):
        place = f"one on CUDA device {ordinal}" if kind == 2 else "one elsewhere"
        raise TypeError(f"{what}: expected an array on {cache.device}, got {place}")


def _empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """A new array where ``like`` is, of its library where that can be."""
    if type(like).__module__.split(".")[0] == "torch":
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if _cuda.on_device(like):
        return _cuda.empty(like, shape, dtype)
    # NumPy knows bfloat16 by ml_dtypes' object only.
    return np.empty(shape, dtype=like.dtype if str(like.dtype) == dtype else dtype)


def _on_device(
    q: Any,
    cache: CudaLayerCache,
    out: Any,
    scale: float | None,
    starts: Any,
    window: int | None,
    soft_cap: float | None,
    lse: Any,
) -> None:
    import torch
    import torch.utils.dlpack

    from nqkv_rs import _attend

    def tensor(x: Any) -> Any:
        return x if x is None or isinstance(x, torch.Tensor) else torch.utils.dlpack.from_dlpack(x)

    q, out, lse = tensor(q), tensor(out), tensor(lse)
    if q.requires_grad:
        raise TypeError("q: expected a tensor without a gradient, got one that requires it")
    if starts is not None:
        if _cuda.on_device(starts):
            starts = tensor(starts)
        else:
            starts = wholes("starts", starts, 0)
    _attend.into(cache, q, out, scale, starts, None, window, soft_cap, lse)
