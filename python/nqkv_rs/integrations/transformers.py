"""`NqkvCache`, a packed cache for transformers' ``generate``, and the ``nqkv`` attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nqkv_rs.integrations.layer import NqkvLayer, Shared
from nqkv_rs.integrations.packed import PackedKV
from nqkv_rs.scheme import Scheme

__all__ = ["NqkvCache", "nqkv_attention_forward"]


class NqkvCache(Cache):
    """A KV cache in 4-bit pages for a decoder model of transformers 5, read without being unpacked.

    Pass it as ``past_key_values``. Under the default ``sdpa`` attention every decode step and every
    chunk reads packed pages; there is nothing else to switch on. Layers that are not full
    attention (sliding windows, linear attention) keep the library's own classes.

    Args:
        config: the model's config.
        scheme: a preset's name (:func:`nqkv_rs.presets`), a :class:`nqkv_rs.Scheme`, or a mapping.
        prefill: ``"exact"``: a prompt attends its own tokens as they came, and is packed for what
            follows; ``"quantized"``: it attends what the cache holds, as decoding does.
        nbits: bits of a code, keys and values alike; the scheme's if None.
        residual_length: newest tokens that are always exact; the scheme's if None.
        sink_tokens: first tokens that are always exact; the scheme's if None.
        skip_layers: layers that keep an ordinary cache, negative ones from the last.
        strict: raise where a slow path would be taken, instead of warning once.

    Raises:
        NotImplementedError: multi-head latent attention, encoder-decoder and state-space models.
        ValueError: a scheme or an argument outside its domain.

    Example:
        ``cache = NqkvCache(model.config)``;
        ``model.generate(**inputs, past_key_values=cache)``; ``cache.memory_usage()``.
    """

    def __init__(
        self,
        config: Any,
        scheme: str | Scheme | Mapping[str, Any] = "nqkv4",
        *,
        prefill: Literal["exact", "quantized"] = "exact",
        nbits: int | None = None,
        residual_length: int | None = None,
        sink_tokens: int | None = None,
        skip_layers: Sequence[int] | None = None,
        strict: bool = False,
    ) -> None:
        if prefill not in ("exact", "quantized"):
            raise ValueError(f"prefill: expected 'exact' or 'quantized', got {prefill!r}")
        self.scheme = Scheme.of(
            scheme,
            nbits=nbits,
            residual_length=residual_length,
            sink_tokens=sink_tokens,
            skip_layers=skip_layers,
        )
        _refuse(config)
        text = config.get_text_config(decoder=True)
        self._shared = Shared(prefill, strict)
        # The library's own classes, by its own rules; full attention is then replaced.
        layers = list(DynamicCache(config=text).layers)
        count = text.num_hidden_layers
        if len(layers) != count:
            layers = [DynamicLayer() for _ in range(count)]  # type: ignore[no-untyped-call]
        skipped = set()
        for i in self.scheme.skip_layers:
            if not -count <= i < count:
                raise ValueError(f"skip_layers: expected {-count} to {count - 1}, got {i}")
            skipped.add(i % count)
        packed = [i for i, x in enumerate(layers) if type(x) is DynamicLayer and i not in skipped]
        if not packed:
            kinds = sorted({type(x).__name__ for x in layers})
            raise NotImplementedError(
                "NqkvCache: expected at least one full-attention layer to pack, got "
                f"{count} layers of {', '.join(kinds)}"
            )
        for i in packed:
            layers[i] = NqkvLayer(self.scheme, self._shared)
        super().__init__(layers=layers)

    def stats(self) -> dict[str, int]:
        """Calls of attention by path since the cache was made.

        Returns:
            ``packed_decode`` (one query per sequence) and ``packed_chunk`` (several), read from
            pages; ``exact_prefill``, a prompt on its own tokens; ``dequantized``, slow calls;
            ``attended_positions`` and ``packed_positions`` (those read from pages), summed over
            layers, sequences and queries.
        """
        return dict(self._shared.counters)

    def memory_usage(self) -> dict[str, float]:
        """Bytes really allocated for keys and values.

        Returns:
            ``codes``, ``scales`` (fields, padding, page tables), ``tail``, ``sinks``; ``other``
            (layers of the library's own classes); ``total``; ``dense``, the same tokens in 16
            bits; ``ratio``, dense over total; ``effective_bits``, total bits per element held.
        """
        used = dict.fromkeys(("codes", "scales", "tail", "sinks", "other"), 0)
        elements = 0
        for layer in self.layers:
            if isinstance(layer, NqkvLayer):
                if layer.cache is not None:
                    memory = layer.cache.memory()
                    for name in ("codes", "scales", "tail", "sinks"):
                        used[name] += memory[name]
                    width = layer.kv_heads * (layer.cache.key_dim + layer.cache.value_dim)
                    tokens = (layer.cache.tokens(b) for b in range(layer.cache.core.batch))
                    elements += width * sum(tokens)
            else:
                for x in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                    if isinstance(x, torch.Tensor):
                        used["other"] += x.untyped_storage().nbytes()
                        elements += x.numel()
        total = sum(used.values())
        return {
            **used,
            "total": total,
            "dense": 2 * elements,
            "ratio": 2 * elements / total if total else 0.0,
            "effective_bits": 8 * total / elements if elements else 0.0,
        }


def _refuse(config: Any) -> None:
    """Name the kinds of models whose caches are something else."""
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder model"
    elif getattr(text, "kv_lora_rank", None) is not None:
        what = "a model with multi-head latent attention (MLA)"
    elif text.model_type in ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"):
        what = "a state-space model"
    else:
        return
    raise NotImplementedError(
        f"NqkvCache: expected a decoder with full-attention layers, got {what} ({text.model_type})"
    )


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
    """The attention function ``"nqkv"``: pages where the cache is packed, ``sdpa`` elsewhere.

    What it adds to ``sdpa`` is the soft cap of scores.

    Args:
        module: the attention layer.
        query: ``[batch, q_heads, queries, key_dim]``.
        key: what the cache's ``update`` returned.
        value: likewise.
        attention_mask: None, or a boolean mask ``[batch, 1, queries, tokens]``.
        dropout: must be 0 on pages.
        scaling: multiplies scores.
        sliding_window: attended tokens, or None.
        softcap: soft cap of scores, or None.
        **kwargs: passed on to ``sdpa``.

    Returns:
        ``[batch, queries, q_heads, value_dim]``, and None.
    """
    packed = isinstance(key, PackedKV) and isinstance(value, PackedKV)
    if packed and dropout == 0.0 and not {"position_bias", "s_aux"} & _given(kwargs):
        assert isinstance(key, PackedKV) and isinstance(value, PackedKV)
        layer, new = key.layer, key.queries
        tokens = layer.get_seq_length()
        plain = attention_mask is None and (new == 1 or new == tokens)
        starts = None
        if attention_mask is not None:
            starts = layer.shared.left_padding(attention_mask, new, tokens)
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
        raise NotImplementedError("nqkv attention: a soft cap without packed keys: use 'eager'")
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


def _given(kwargs: Mapping[str, Any]) -> set[str]:
    return {k for k, v in kwargs.items() if v is not None}


AttentionInterface.register("nqkv", nqkv_attention_forward)
AttentionMaskInterface.register("nqkv", sdpa_mask)
