"""The attention function ``"nqkv"``; importing this registers it with transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nqkv_rs.integrations.packed import PackedKV

__all__ = ["nqkv_attention_forward"]


def nqkv_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention on pages where the cache is packed, as ``sdpa`` elsewhere.

    What it adds to ``sdpa`` is the soft cap of scores, on pages and elsewhere.

    Args:
        module: the attention layer.
        query: ``[batch, q_heads, queries, key_dim]``.
        key: what the cache's ``update`` returned.
        value: likewise.
        attention_mask: None, or a boolean mask ``[batch, 1, queries, tokens]``.
        dropout: must be 0 on pages and with a soft cap.
        scaling: multiplies scores.
        sliding_window: attended tokens, or None.
        softcap: soft cap of scores, or None.
        **kwargs: passed on to ``sdpa``.

    Returns:
        ``[batch, queries, q_heads, value_dim]``, and None.

    Raises:
        NotImplementedError: learned sinks or a position bias, which would be ignored otherwise; or
            dropout with a soft cap.
    """
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"nqkv attention: expected no {name}, got one: use 'eager'")
    if isinstance(key, PackedKV) and isinstance(value, PackedKV) and dropout == 0.0:
        layer, new = key.layer, key.queries
        tokens = layer.get_seq_length()
        plain = attention_mask is None and (new == 1 or new == tokens)
        starts = None
        if attention_mask is not None:
            starts = layer.shared.left_padding(attention_mask, new, tokens, sliding_window, layer)
        if (plain or starts is not None) and query.shape[2] == new:
            out = layer.attend(
                query,
                scaling,
                key.fresh,
                value.fresh,
                starts=starts,
                window=sliding_window,
                soft_cap=softcap,
            )
            return out, None
    if softcap is not None:
        if dropout != 0.0:
            raise NotImplementedError(
                f"nqkv attention: expected no dropout with a soft cap, got {dropout}"
            )
        return _soft_capped(query, key, value, attention_mask, scaling, softcap), None
    out, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        **kwargs,
    )
    return out, None


def _soft_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    soft_cap: float,
) -> torch.Tensor:
    """Dense attention with a soft cap, which ``sdpa`` has not."""
    batch, heads, queries, dim = query.shape
    # A group of query heads shares its keys: nothing is repeated.
    grouped = query.reshape(batch, key.shape[1], -1, queries, dim)
    scores = grouped @ key[:, :, None].transpose(-1, -2) * (scaling or dim**-0.5)
    scores = soft_cap * torch.tanh(scores / soft_cap)
    tokens = key.shape[2]
    if mask is None:
        # As `sdpa_mask` leaves it out: causal, and no window begins within these tokens.
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=query.device)
        mask = mask.tril(tokens - queries)[None, None]
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    # A query that may attend nothing gets zeros, as on pages.
    weights = scores.softmax(-1, dtype=_at_least_fp32(query.dtype)).nan_to_num(0.0)
    out = weights.to(query.dtype) @ value[:, :, None]
    return out.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous()


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


AttentionInterface.register("nqkv", nqkv_attention_forward)
AttentionMaskInterface.register("nqkv", sdpa_mask)
