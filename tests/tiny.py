"""Tiny random models, and a dense cache that holds what the packed one would give back."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.opt import OPTConfig
from transformers.models.phi import PhiConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from nqkv_rs import LayerCache, Scheme
from nqkv_rs.integrations.naming import cache_keyword

# A short window and one sink, so that short texts reach pages.
SHORT = Scheme.of("nqkv4", residual_length=8, sink_tokens=1)

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GQA = {"num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**COMMON, **GQA),
    "qwen2": lambda: Qwen2Config(**COMMON, **GQA),
    "qwen3": lambda: Qwen3Config(**COMMON, **GQA, head_dim=16),
    "opt": lambda: OPTConfig(
        **{**COMMON, "intermediate_size": None} | {"ffn_dim": 96, "word_embed_proj_dim": 64}
    ),
    "neox": lambda: GPTNeoXConfig(**COMMON),
    "phi": lambda: PhiConfig(**COMMON, **GQA),
    # Every layer slides, over less than the tests' prompts and more than a page.
    "mistral": lambda: MistralConfig(**COMMON, **GQA, sliding_window=80),
    # Capped scores: sdpa cannot run it, "nqkv" can. A cap this low bends them.
    "gemma2": lambda: Gemma2Config(
        **COMMON,
        **GQA,
        head_dim=16,
        sliding_window=16,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=16,
        tie_word_embeddings=False,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **{**COMMON, "num_attention_heads": 2},
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=16,
        # Tied, the wide embedding would drown what attention says: one token for ever.
        tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def model(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    """A random model whose keys matter: weights are drawn wide."""
    torch.manual_seed(7)
    made = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention)
    generator = torch.Generator().manual_seed(11)
    for path, parameter in made.named_parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (
                2.0 / parameter.shape[-1] ** 0.5
            )
        elif path.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "query_key_value.bias")):
            # Fresh models have none to speak of; Qwen2's key biases are what breaks caches.
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return made.to(dtype).eval()


class TwinLayer(DynamicLayer):
    """Stores through a LayerCache, attends dense: dequantized values at the same seal points."""

    def __init__(self, scheme: Scheme, prefill: str) -> None:
        super().__init__()
        self.scheme, self.prefill = scheme, prefill
        self.cache: LayerCache | None = None

    def update(self, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        if self.cache is None:
            self.dtype, self.device, self.is_initialized = k.dtype, k.device, True
            self.cache = LayerCache(
                self.scheme,
                kv_heads=k.shape[1],
                key_dim=k.shape[3],
                value_dim=v.shape[3],
                batch=k.shape[0],
                exact_dtype=str(k.dtype).removeprefix("torch."),
            )
        self.cache.append(k, v)
        n, new = self.cache.tokens(), k.shape[2]
        ks = torch.empty(k.shape[0], k.shape[1], n, k.shape[3], dtype=k.dtype)
        vs = torch.empty(v.shape[0], v.shape[1], n, v.shape[3], dtype=v.dtype)
        for b in range(k.shape[0]):
            self.cache.core.read(b, 0, ks[b], vs[b])
        if self.prefill == "exact" and new > 1:
            ks[:, :, n - new :], vs[:, :, n - new :] = k, v
        return ks, vs

    def get_seq_length(self) -> int:
        return 0 if self.cache is None else self.cache.tokens()

    def reorder_cache(self, beam_idx: Any) -> None:
        if self.cache is not None:
            self.cache.core.select([int(i) for i in beam_idx])

    def batch_select_indices(self, indices: Any) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.reorder_cache(torch.arange(self.cache.core.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if self.cache is not None:
            # Up to transformers 5.15 a positive number is what to keep.
            more = self.get_seq_length() if tokens_to_remove > 0 else 0
            self.cache.core.remove_newest(more - tokens_to_remove)


def twin(config: Any, scheme: str | Scheme, prefill: str = "exact") -> DynamicCache:
    """A cache whose full-attention layers are twins; all layers, where all of them slide."""
    cache = DynamicCache(config=config)
    if not cache.layers:
        cache.layers = [DynamicLayer() for _ in range(config.num_hidden_layers)]
    slides = all(type(layer) is DynamicSlidingWindowLayer for layer in cache.layers)
    for i, layer in enumerate(cache.layers):
        if slides or type(layer) is DynamicLayer:
            cache.layers[i] = TwinLayer(Scheme.of(scheme), prefill)
    cache.layer_class_to_replicate = None
    return cache


def prompt(batch: int, length: int, padded: bool = False) -> dict[str, torch.Tensor]:
    """The same random ids every time; with ``padded``, sequence ``b`` has 9 b of padding."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 97, (batch, length), generator=g)
    mask = torch.ones_like(ids)
    if padded:
        for b in range(batch):
            mask[b, : 9 * b] = 0
        ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask}


def tokens(made: Any, cache: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """What a model generates: the prompt and, unless said otherwise, 40 tokens more.

    After a prompt of 110 these cross a seal point of ``SHORT``.
    """
    # The padding's id would be taken for padding where a mask is derived from ids.
    given = {"max_new_tokens": 40, "suppress_tokens": [0], **options}
    return made.generate(**inputs, **{cache_keyword(): cache}, **given)
