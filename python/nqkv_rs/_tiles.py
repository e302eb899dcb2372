"""Attention of a cache on a CUDA device over tiles of it, dequantized one after the other.

What no kernel takes, and chunks of a prompt. A bounded workspace holds a tile: never a second copy
of the cache. There are two ways. In general a tile is fp32 (fp64 for such queries) and so is the
arithmetic. Many queries in fp16 or bf16 go through PyTorch's flash attention, tile by tile, merged
by log-sum-exp in fp32: keys and values are rounded to the queries' dtype, as those of a dense cache
are, and so is each tile's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nqkv_rs.cuda_cache import CudaLayerCache

__all__ = ["FEW_QUERIES", "attend"]

# Up to this many queries are a decode step; more are a prompt's.
FEW_QUERIES = 8
# Tokens of a tile in fp32.
TILE = 4096
# Bytes of keys and values of a tile for flash attention, and the fewest tokens worth a launch.
WORKSPACE = 64 << 20
FEWEST = 1024


def attend(
    cache: CudaLayerCache,
    q: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    starts: Sequence[int] | torch.Tensor | None,
    fresh: tuple[torch.Tensor, torch.Tensor] | None,
    window: int | None,
    soft_cap: float | None,
    lse: torch.Tensor | None,
) -> None:
    """Attention into ``out``; arguments as for :func:`nqkv_rs._attend.into`, checked before.

    Args:
        cache: the cache.
        q: ``[batch, q_heads, queries, dim]``.
        out: ``[batch, queries, q_heads, dim]``.
        scale: multiplies scores.
        starts: first attended position of each sequence.
        fresh: exact keys and values of the newest tokens.
        window: sliding window.
        soft_cap: soft cap of scores.
        lse: where log-sum-exps go.
    """
    lengths = cache.core.lengths()
    if not lengths or q.numel() == 0:
        return
    plain = soft_cap is None and (window is None or window >= lengths[0])
    if starts is not None:
        plain = plain and not isinstance(starts, torch.Tensor) and not any(starts)
    if plain and _flash_takes(cache, q, out, lengths):
        _flash(cache, q, out, scale, lengths[0], fresh, lse)
    else:
        _wide(cache, q, out, scale, lengths, starts, fresh, window, soft_cap, lse)


def _flash_takes(
    cache: CudaLayerCache, q: torch.Tensor, out: torch.Tensor, lengths: list[int]
) -> bool:
    """Whether tiles go through flash attention: a prompt's chunk on texts of one length."""
    return (
        q.shape[2] > FEW_QUERIES
        and q.dtype in (torch.float16, torch.bfloat16)
        and out.dtype == q.dtype
        and cache.key_dim == cache.value_dim
        and cache.key_dim % 8 == 0
        and min(lengths) == max(lengths)
        and (not q.is_cuda or torch.backends.cuda.is_flash_attention_available())
    )


def _piece(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flash attention, and its log-sum-exp ``[batch, heads, queries]``."""
    aten = torch.ops.aten
    if q.is_cuda:
        found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    else:
        found = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return found[0], found[1]


def _flash(
    cache: CudaLayerCache,
    q: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    length: int,
    fresh: tuple[torch.Tensor, torch.Tensor] | None,
    lse: torch.Tensor | None,
) -> None:
    batch, q_heads, queries, dim = q.shape
    heads = cache.core.kv_heads
    group, history = q_heads // heads, length - queries
    # The newest tokens, among which order counts. Few, so that their heads may be repeated.
    k, v = fresh if fresh is not None else cache.read(history, queries, q.dtype)
    k, v = (
        x.to(q.dtype)[:, :, None]
        .expand(batch, heads, group, queries, dim)
        .reshape(batch, q_heads, queries, dim)
        for x in (k, v)
    )
    newest, top = _piece(q, k, v, True, scale)
    # All else is seen by every query: those of a group are rows of one matrix.
    rows = (batch, heads, group * queries)
    summed, top = newest.float().reshape(*rows, dim), top.reshape(rows)
    grouped = q.reshape(*rows, dim)
    token = 2 * q.element_size() * batch * heads * dim
    tile = max(FEWEST, WORKSPACE // token // 64 * 64)
    room: tuple[torch.Tensor, torch.Tensor] | None = None
    for start in range(0, history, tile):
        tokens = min(tile, history - start)
        if room is None or room[0].shape[2] != tokens:
            room = None  # before the next is asked for
            shape = (batch, heads, tokens, dim)
            room = (q.new_empty(shape), q.new_empty(shape))
        cache.core.read(start, *room)
        part, its = _piece(grouped, *room, False, scale)
        # exp(its) / (exp(its) + exp(top)) of the new result is the tile's.
        summed.lerp_(part.float(), torch.sigmoid(its - top)[..., None])
        top = torch.logaddexp(top, its)
    both = (batch, heads, group, queries)
    result = summed.reshape(*both, dim).permute(0, 3, 1, 2, 4)
    out.copy_(result.reshape(batch, queries, q_heads, dim))
    if lse is not None:
        lse.copy_(top.reshape(both).permute(0, 3, 1, 2).reshape(batch, queries, q_heads))


def _wide(
    cache: CudaLayerCache,
    q: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    lengths: list[int],
    starts: Sequence[int] | torch.Tensor | None,
    fresh: tuple[torch.Tensor, torch.Tensor] | None,
    window: int | None,
    soft_cap: float | None,
    lse: torch.Tensor | None,
) -> None:
    """In fp32, or fp64: any mask, any lengths."""
    batch, q_heads, queries, _ = q.shape
    heads, group = cache.core.kv_heads, q_heads // cache.core.kv_heads
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    ends = torch.tensor(lengths, device=q.device)
    position = ends[:, None] - queries + torch.arange(queries, device=q.device)
    if isinstance(starts, torch.Tensor):
        first = starts
    elif starts is not None:
        first = torch.tensor(list(starts), device=q.device)
    else:
        first = torch.zeros(batch, dtype=torch.long, device=q.device)
    low = first[:, None].expand(batch, queries)
    if window is not None:
        low = torch.maximum(low, position - window + 1)
    grouped = q.to(wide).reshape(batch, heads, group * queries, cache.key_dim) * scale
    top = torch.full((batch, heads, group, queries), -torch.inf, dtype=wide, device=q.device)
    total = torch.zeros_like(top)
    shape = (batch, heads, group, queries, cache.value_dim)
    summed = torch.zeros(shape, dtype=wide, device=q.device)
    for start in range(0, max(lengths), TILE):
        tokens = min(TILE, max(lengths) - start)
        k, v = cache.read(start, tokens, wide)
        at = start + torch.arange(tokens, device=q.device)
        if fresh is not None:
            for mine, given in ((k, fresh[0]), (v, fresh[1])):
                _put_fresh(mine, given.to(wide), start, lengths, queries)
        scores = torch.matmul(grouped, k.transpose(2, 3))
        scores = scores.reshape(batch, heads, group, queries, tokens)
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        seen = (at >= low[..., None]) & (at <= position[..., None])
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        newest = torch.maximum(top, scores.amax(-1))
        still = torch.where(torch.isinf(newest), 0.0, newest)
        weights = torch.exp(scores - still[..., None])
        keep = torch.exp(top - still)
        total = total * keep + weights.sum(-1)
        flat = weights.reshape(batch, heads, group * queries, tokens)
        summed = summed * keep[..., None] + torch.matmul(flat, v).reshape(shape)
        top = newest
    result = summed / torch.where(total == 0, 1.0, total)[..., None]
    # [batch, kv_heads, group, queries, dim] to [batch, queries, q_heads, dim]
    out.copy_(result.permute(0, 3, 1, 2, 4).reshape(batch, queries, q_heads, cache.value_dim))
    if lse is not None:
        log = top + torch.log(total)
        lse.copy_(log.permute(0, 3, 1, 2).reshape(batch, queries, q_heads))


def _put_fresh(
    tile: torch.Tensor, given: torch.Tensor, start: int, lengths: list[int], queries: int
) -> None:
    for b, length in enumerate(lengths):
        low, high = max(length - queries, start), min(length, start + tile.shape[2])
        if low < high:
            offset = length - queries
            tile[b, :, low - start : high - start] = given[b, :, low - offset : high - offset]
