"""Attention of a cache on a CUDA device by one launch: what it takes, and its workspaces."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from nqkv_rs import _core, _tiles

if TYPE_CHECKING:
    from nqkv_rs.cuda_cache import CudaLayerCache

__all__ = ["attend", "into", "make_ready", "refusal", "slow"]

# By device and stream: launches on one stream follow each other. Graphs have one of their own for
# each device; what a graph was captured with is kept for ever.
_WORKSPACES: dict[tuple[int, int | str], torch.Tensor] = {}
_KEPT: list[torch.Tensor] = []
_WARNED: set[str] = set()
_GRAPH = "graph"
# Padding of a batch by device, the newest few: all layers of all steps of a text pass the same.
_STARTS: dict[tuple[int | None, tuple[int, ...]], torch.Tensor] = {}
_MOST_STARTS = 256
_HALF = (torch.float16, torch.bfloat16)
_OUT = (*_HALF, torch.float32)


def _grown(key: tuple[int, int | str], size: int, device: torch.device) -> torch.Tensor:
    found = _WORKSPACES.get(key)
    if found is None or found.numel() < size:
        if found is not None and key[1] == _GRAPH:
            _KEPT.append(found)
        found = torch.zeros(size, dtype=torch.uint8, device=device)
        if key[1] == _GRAPH:
            # Zeroed before any stream that a graph is captured or replayed on.
            torch.cuda.current_stream(device).synchronize()
        _WORKSPACES[key] = found
    return found


def make_ready(cache: CudaLayerCache) -> None:
    """Make the workspace of CUDA graphs ready: nothing can be allocated while one is captured.

    Args:
        cache: whose attention a graph may hold.
    """
    size, _ = _core.cuda_attend_workspace(cache.core, 1)
    assert cache.device.index is not None
    if size is not None and not torch.cuda.is_current_stream_capturing():
        _grown((cache.device.index, _GRAPH), size, cache.device)


def _workspace(size: int, device: torch.device, stream: int, captured: bool) -> torch.Tensor:
    assert device.index is not None
    if captured:
        found = _WORKSPACES.get((device.index, _GRAPH))
        if found is None or found.numel() < size:
            raise RuntimeError(
                "attention in a CUDA graph: expected a call of the same shape before the capture, "
                "or CudaLayerCache.reserve()"
            )
        return found
    _grown((device.index, _GRAPH), size, device)
    return _grown((device.index, stream), size, device)


def refusal(
    cache: CudaLayerCache,
    q: torch.Tensor,
    out: torch.Tensor,
    fresh: tuple[torch.Tensor, torch.Tensor] | None,
) -> str | None:
    """Why a call cannot be one launch; None if it can.

    Args:
        cache: the cache.
        q: ``[batch, q_heads, queries, dim]``.
        out: where the result goes.
        fresh: exact keys and values of the newest tokens.
    """
    reason = _planned(cache, q, out, fresh)
    return reason if isinstance(reason, str) else None


def _planned(
    cache: CudaLayerCache,
    q: torch.Tensor,
    out: torch.Tensor,
    fresh: tuple[torch.Tensor, torch.Tensor] | None,
) -> int | str:
    """Bytes of workspace that one launch takes, or why it cannot be one."""
    if q.dtype not in _HALF:
        return f"expected queries in float16 or bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    if out.dtype not in _OUT or not out.is_contiguous():
        return "expected a contiguous output in float16, bfloat16 or float32"
    _, heads, queries, _ = q.shape
    core = cache.core
    size, expected = _core.cuda_attend_workspace(core, queries * max(heads // core.kv_heads, 1))
    if size is None:
        return f"expected {expected}"
    if fresh is not None and (
        not _core.cuda_newest_are_exact(core, queries)
        or str(fresh[0].dtype) != f"torch.{core.exact_dtype}"
    ):
        return "expected the newest tokens among those that the cache holds exactly"
    return size


def slow(reason: str, q: torch.Tensor, strict: bool) -> None:
    """Say once that attention dequantizes; raise if strict.

    Queries in float32 or float64 ask for that arithmetic, and many at a time are a prompt's: these
    are no slow path.

    Args:
        reason: why the fast way was not taken.
        q: the queries.
        strict: raise.
    """
    if q.dtype not in _HALF or q.shape[2] > _tiles.FEW_QUERIES:
        return
    text = f"attention on CUDA dequantizes tiles of the cache: {reason}"
    if strict:
        raise RuntimeError(f"strict=True: {text}")
    if reason not in _WARNED:
        _WARNED.add(reason)
        warnings.warn(f"nqkv_rs: {text}", stacklevel=5)


def _starts_on(
    cache: CudaLayerCache, starts: Sequence[int] | torch.Tensor | None, captured: bool
) -> torch.Tensor | None:
    """First positions as the kernel takes them; None if nothing is padded."""
    if starts is None:
        return None
    if isinstance(starts, torch.Tensor):
        return starts.to(torch.int32).contiguous().view(torch.uint8)
    if not any(starts):
        return None
    key = (cache.device.index, tuple(starts))
    found = _STARTS.get(key)
    if found is None:
        if captured:
            raise RuntimeError(
                "attention in a CUDA graph: expected starts as an int32 tensor on the device, or "
                "a call with the same ones before the capture"
            )
        if len(_STARTS) >= _MOST_STARTS:
            _STARTS.pop(next(iter(_STARTS)), None)
        on_device = torch.tensor(key[1], dtype=torch.int32, device=cache.device)
        found = _STARTS[key] = on_device.view(torch.uint8)
    if captured:
        _KEPT.append(found)
    return found


def attend(
    cache: CudaLayerCache,
    q: torch.Tensor,
    out: torch.Tensor,
    size: int,
    scale: float,
    starts: Sequence[int] | torch.Tensor | None,
    window: int | None,
    soft_cap: float | None,
    lse: torch.Tensor | None,
) -> None:
    """Attention into ``out`` by one launch; see :func:`refusal`.

    Args:
        cache: the cache.
        q: ``[batch, q_heads, queries, dim]``, float16 or bfloat16.
        out: ``[batch, queries, q_heads, dim]``.
        size: bytes of workspace.
        scale: multiplies scores.
        starts: first attended position of each sequence.
        window: sliding window.
        soft_cap: soft cap of scores.
        lse: where log-sum-exps go, float32 ``[batch, queries, q_heads]``.
    """
    a, b, c, d = q.stride()
    if d != 1 or (a | b | c) % 2 or q.data_ptr() % 4:
        q = q.contiguous()
    # Asked of the core, in one call: it launches on the same one.
    stream, captured = _core.cuda_stream(q)
    room = _workspace(size, cache.device, stream, captured)
    first = _starts_on(cache, starts, captured)
    _core.cuda_attend(cache.core, q, out, scale, room, first, window, soft_cap, lse)


def into(
    cache: CudaLayerCache,
    q: torch.Tensor,
    out: torch.Tensor,
    scale: float | None,
    starts: Sequence[int] | torch.Tensor | None = None,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """Attention into ``out``: one launch where a kernel takes it, tiles elsewhere.

    Args:
        cache: the cache.
        q: ``[batch, q_heads, queries, dim]``.
        out: ``[batch, queries, q_heads, dim]``.
        scale: multiplies scores; ``dim ** -0.5`` if None.
        starts: first attended position of each sequence; integers, or a tensor on the device.
        fresh: exact keys and values of the newest tokens.
        window: sliding window.
        soft_cap: soft cap of scores.
        lse: where log-sum-exps go, float32 ``[batch, queries, q_heads]``.

    Raises:
        ValueError: a wrong shape, or fewer tokens in the cache than queries.
        TypeError: a wrong dtype or device.
    """
    if q.dim() != 4:
        expected = "[batch, q_heads, queries, key_dim]"
        raise ValueError(f"q: expected shape {expected}, got {list(q.shape)}")
    if starts is not None:
        _check_starts(cache, starts)
    scale = 1 / math.sqrt(cache.key_dim) if scale is None else scale
    planned = _planned(cache, q, out, fresh)
    if isinstance(planned, int):
        attend(cache, q, out, planned, scale, starts, window, soft_cap, lse)
        return
    _check(cache, q, out, lse)
    slow(planned, q, cache.strict)
    _tiles.attend(cache, q, out, scale, starts, fresh, window, soft_cap, lse)


def _check_starts(cache: CudaLayerCache, starts: Sequence[int] | torch.Tensor) -> None:
    batch = cache.core.batch
    if isinstance(starts, torch.Tensor):
        if starts.dtype not in (torch.int32, torch.int64) or starts.device != cache.device:
            expected = f"int32 or int64 on {cache.device}"
            got = f"{str(starts.dtype).removeprefix('torch.')} on {starts.device}"
            raise TypeError(f"starts: expected {expected}, got {got}")
        if starts.shape != (batch,):
            raise ValueError(f"starts: expected shape [{batch}], got {list(starts.shape)}")
    elif len(starts) != batch:
        raise ValueError(f"starts: expected {batch} positions, got {len(starts)}")


def _check(
    cache: CudaLayerCache, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
) -> None:
    """What the core checks where it launches, for those who do not get there."""
    batch, heads, queries, dim = q.shape
    core = cache.core
    given: list[tuple[str, Any]] = [("q", q), ("out", out), ("lse", lse)]
    for what, x in given:
        if x is None:
            continue
        if x.device != cache.device:
            raise TypeError(f"{what}: expected a tensor on {cache.device}, got one on {x.device}")
        if not x.is_floating_point() or (what == "lse" and x.dtype != torch.float32):
            expected = "float32" if what == "lse" else "a float type"
            got = str(x.dtype).removeprefix("torch.")
            raise TypeError(f"{what}: expected dtype {expected}, got {got}")
    if batch != core.batch or dim != cache.key_dim:
        expected = f"[{core.batch}, q_heads, queries, {cache.key_dim}]"
        raise ValueError(f"q: expected shape {expected}, got {list(q.shape)}")
    if heads == 0 or heads % core.kv_heads:
        raise ValueError(f"q_heads: expected a multiple of {core.kv_heads} KV heads, got {heads}")
    held = min(core.lengths(), default=0)
    if queries > held and batch > 0:
        expected = f"at most {held} (the tokens held, queries included)"
        raise ValueError(f"queries: expected {expected}, got {queries}")
    for what, x, shape in (
        ("out", out, [batch, queries, heads, cache.value_dim]),
        ("lse", lse, [batch, queries, heads]),
    ):
        if x is not None and list(x.shape) != shape:
            raise ValueError(f"{what}: expected shape {shape}, got {list(x.shape)}")
