"""Attention of a cache on a CUDA device by one launch: what it takes, and its workspaces."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from nqkv_rs import _core

if TYPE_CHECKING:
    from nqkv_rs.cuda_cache import CudaLayerCache

__all__ = ["ENABLED", "attend", "make_ready", "refusal", "slow"]

# Off until this version of the kernels has been tested on a device: NQKV_CUDA_ATTEND=1 is for those
# who do that. What is off is not a slow path that anybody is warned about.
ENABLED = os.environ.get("NQKV_CUDA_ATTEND") == "1"

# By device and stream: launches on one stream follow each other. Graphs have one of their own for
# each device; what a graph was captured with is kept for ever.
_WORKSPACES: dict[tuple[int, int | str], torch.Tensor] = {}
_KEPT: list[torch.Tensor] = []
_WARNED: set[str] = set()
_GRAPH = "graph"


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


def _reserve(size: int, device: torch.device) -> None:
    assert device.index is not None
    if not torch.cuda.is_current_stream_capturing():
        _grown((device.index, _GRAPH), size, device)


def make_ready(cache: CudaLayerCache) -> None:
    """Make the workspace of CUDA graphs ready: nothing can be allocated while one is captured.

    Args:
        cache: whose attention a graph may hold.
    """
    size, _ = _core.cuda_attend_workspace(cache.core, 1) if ENABLED else (None, "")
    if size is not None:
        _reserve(size, cache.device)


def _workspace(size: int, device: torch.device) -> torch.Tensor:
    assert device.index is not None
    if torch.cuda.is_current_stream_capturing():
        found = _WORKSPACES.get((device.index, _GRAPH))
        if found is None or found.numel() < size:
            raise RuntimeError(
                "attention in a CUDA graph: expected a call of the same shape before the capture, "
                "or CudaLayerCache.reserve()"
            )
        return found
    _reserve(size, device)
    return _grown((device.index, torch.cuda.current_stream(device).cuda_stream), size, device)


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
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"expected queries in float16 or bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    if out.dtype not in (torch.float16, torch.bfloat16, torch.float32) or not out.is_contiguous():
        return "expected a contiguous output in float16, bfloat16 or float32"
    heads, queries = q.shape[1], q.shape[2]
    columns = queries * max(heads // cache.core.kv_heads, 1)
    size, expected = _core.cuda_attend_workspace(cache.core, columns)
    if size is None:
        return f"expected {expected}"
    if fresh is not None and (
        not _core.cuda_newest_are_exact(cache.core, queries)
        or str(fresh[0].dtype) != f"torch.{cache.core.exact_dtype}"
    ):
        return "expected the newest tokens among those that the cache holds exactly"
    return None


def slow(reason: str, q: torch.Tensor, strict: bool) -> None:
    """Say once that attention dequantizes; raise if strict.

    Queries in float32 or float64 ask for that arithmetic, and many at a time are a prompt's: these
    are no slow path.

    Args:
        reason: why the fast way was not taken.
        q: the queries.
        strict: raise.
    """
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[2] > 8:
        return
    text = f"attention on CUDA dequantizes tiles of the cache: {reason}"
    if strict:
        raise RuntimeError(f"strict=True: {text}")
    if reason not in _WARNED:
        _WARNED.add(reason)
        warnings.warn(f"nqkv_rs: {text}", stacklevel=5)


def _starts_on(cache: CudaLayerCache, starts: Sequence[int] | None) -> torch.Tensor | None:
    if starts is None or not any(starts):
        return None
    key = tuple(starts)
    kept: tuple[Any, torch.Tensor] | None = vars(cache).get("_starts")
    if kept is None or kept[0] != key:
        on_device = torch.tensor(key, dtype=torch.int32, device=cache.device).view(torch.uint8)
        kept = vars(cache)["_starts"] = (key, on_device)
    return kept[1]


def attend(
    cache: CudaLayerCache,
    q: torch.Tensor,
    out: torch.Tensor,
    scale: float | None,
    starts: Sequence[int] | None,
    window: int | None,
    soft_cap: float | None,
    lse: torch.Tensor | None,
) -> None:
    """Attention into ``out`` by one launch; see :func:`refusal`.

    Args:
        cache: the cache.
        q: ``[batch, q_heads, queries, dim]``, float16 or bfloat16.
        out: ``[batch, queries, q_heads, dim]``.
        scale: multiplies scores; ``dim ** -0.5`` if None.
        starts: first attended position of each sequence.
        window: sliding window.
        soft_cap: soft cap of scores.
        lse: where log-sum-exps go, float32 ``[batch, queries, q_heads]``.
    """
    if q.stride(3) != 1 or any(s % 2 for s in q.stride()[:3]) or q.data_ptr() % 4:
        q = q.contiguous()
    columns = q.shape[2] * max(q.shape[1] // cache.core.kv_heads, 1)
    size, _ = _core.cuda_attend_workspace(cache.core, columns)
    assert size is not None
    _core.cuda_attend(
        cache.core,
        q,
        out,
        1 / math.sqrt(cache.key_dim) if scale is None else scale,
        _workspace(size, cache.device),
        _starts_on(cache, starts),
        window,
        soft_cap,
        lse,
    )
