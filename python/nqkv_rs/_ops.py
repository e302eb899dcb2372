"""Operators on caches. A cache is no tensor: an operator gets a tensor that names one."""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import library

from nqkv_rs.cache import LayerCache
from nqkv_rs.decode import decode_attention as attention

if TYPE_CHECKING:
    from nqkv_rs.cuda_cache import CudaLayerCache

__all__ = ["append", "decode_attention", "handle"]

_CACHES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NAMES: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_NUMBERS = itertools.count(1)
_LOCK = threading.Lock()

_LIBRARY: Any = library.Library("nqkv", "FRAGMENT")  # type: ignore[no-untyped-call]
_WORDS = (
    "float? scale=None, Tensor? starts=None, SymInt? window=None, float? soft_cap=None, "
    "SymInt? value_dim=None"
)
# That an append writes to the cache's name is what keeps it before the attention that follows.
_LIBRARY.define("append(Tensor k, Tensor v, Tensor(a!) cache) -> ()")
_LIBRARY.define(f"decode_attention(Tensor q, Tensor cache, *, {_WORDS}) -> Tensor")
_LIBRARY.define(f"decode_attention_lse(Tensor q, Tensor cache, *, {_WORDS}) -> (Tensor, Tensor)")


def handle(cache: LayerCache | CudaLayerCache) -> torch.Tensor:
    """The name of a cache for operators: an int64 scalar on the CPU, whose value stays the same.

    A tensor, so that ``torch.compile`` neither looks into the cache nor compiles again for the next
    layer's: keep it as a buffer of a module, or pass it as an argument.

    Args:
        cache: a :class:`nqkv_rs.LayerCache` or ``CudaLayerCache``. A handle does not keep it alive.

    Returns:
        The handle.
    """
    if not isinstance(cache, LayerCache) and type(cache).__name__ != "CudaLayerCache":
        kind = f"{type(cache).__module__}.{type(cache).__qualname__}"
        raise TypeError(f"cache: expected nqkv_rs.LayerCache or CudaLayerCache, got {kind}")
    with _LOCK:
        number = _NAMES.get(cache)
        if number is None:
            number = _NAMES[cache] = next(_NUMBERS)
            _CACHES[number] = cache
    return torch.tensor(number)


def _cache(name: torch.Tensor) -> Any:
    if name.dtype != torch.int64 or name.dim() != 0 or name.device.type != "cpu":
        got = f"{str(name.dtype).removeprefix('torch.')} {list(name.shape)} on {name.device}"
        raise TypeError(f"cache: expected a handle (int64 scalar on the CPU), got {got}")
    cache = _CACHES.get(int(name))
    if cache is None:
        raise ValueError(
            f"cache: expected the handle of a living cache (a handle keeps none), got {int(name)}"
        )
    return cache


def _append(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor) -> None:
    _cache(cache).append(k.detach(), v.detach())


def _attention(
    q: torch.Tensor, cache: torch.Tensor, value_dim: int | None = None, **words: Any
) -> Any:
    found = _cache(cache)
    expected = q.shape[-1] if value_dim is None else value_dim
    if expected != found.value_dim:
        raise ValueError(f"value_dim: expected {found.value_dim} (the cache's), got {expected}")
    return attention(q.detach(), found, **words)


def _two(q: torch.Tensor, cache: torch.Tensor, **words: Any) -> Any:
    return _attention(q, cache, lse=True, **words)


def _fake_append(k: Any, v: Any, cache: Any) -> None:
    return None


def _fake_one(q: Any, cache: Any, **words: Any) -> Any:
    batch, heads, n, dim = q.shape
    value_dim = words.get("value_dim")
    return q.new_empty((batch, n, heads, dim if value_dim is None else value_dim))


def _fake_two(q: Any, cache: Any, **words: Any) -> Any:
    batch, heads, n, _ = q.shape
    return _fake_one(q, cache, **words), q.new_empty((batch, n, heads), dtype=torch.float32)


_OPERATORS: dict[str, tuple[Any, Any]] = {
    "append": (_append, _fake_append),
    "decode_attention": (_attention, _fake_one),
    "decode_attention_lse": (_two, _fake_two),
}
for _name, (_real, _fake) in _OPERATORS.items():
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _real, _device)
    library.register_fake(f"nqkv::{_name}", _fake, lib=_LIBRARY)


def append(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor) -> None:
    """Append to a cache, as one operator; before all later operators on the same handle.

    Args:
        k: keys, ``[batch, kv_heads, tokens, key_dim]``.
        v: values, ``[batch, kv_heads, tokens, value_dim]``.
        cache: its :func:`handle`.

    Raises:
        ValueError: a wrong shape, or a handle whose cache is gone.
        TypeError: a wrong dtype or device.
    """
    torch.ops.nqkv.append(k, v, cache)


def decode_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    *,
    scale: float | None = None,
    starts: torch.Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    value_dim: int | None = None,
    lse: bool = False,
) -> Any:
    """:func:`nqkv_rs.decode_attention` as one operator, which ``torch.compile`` can hold.

    Args:
        q: ``[batch, q_heads, n, key_dim]``.
        cache: its :func:`handle`.
        scale: multiplies scores; ``key_dim ** -0.5`` if None.
        starts: first attended position of each sequence, int32 or int64 where ``q`` is.
        window: sliding window.
        soft_cap: soft cap of scores.
        value_dim: head size of values; keys' if None. A compiler has to know it beforehand.
        lse: return the log-sum-exp of scores, too.

    Returns:
        ``[batch, n, q_heads, value_dim]`` in the dtype of ``q``; with ``lse``, the pair of it and
        float32 ``[batch, n, q_heads]``.

    Raises:
        ValueError: a wrong shape, or a handle whose cache is gone.
        TypeError: a wrong dtype or device.

    Example:
        ``name = ops.handle(cache)``; in the compiled function ``ops.append(k, v, name)``, then
        ``ops.decode_attention(q, name)``.
    """
    words: dict[str, Any] = {
        "scale": scale,
        "starts": starts,
        "window": window,
        "soft_cap": soft_cap,
        "value_dim": value_dim,
    }
    if lse:
        return torch.ops.nqkv.decode_attention_lse(q, cache, **words)
    return torch.ops.nqkv.decode_attention(q, cache, **words)
