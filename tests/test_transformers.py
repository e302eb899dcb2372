"""NqkvCache in transformers: the tokens of a dense cache that holds the same numbers."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.mamba import MambaConfig
from transformers.models.t5 import T5Config

from nqkv_rs import NqkvCache, Scheme
from nqkv_rs.integrations.layer import NqkvLayer

# A short window and one sink, so that short texts reach pages.
SHORT = Scheme.of("nqkv4", residual_length=8, sink_tokens=1)
KIVI = Scheme.of("kivi2", residual_length=8)


def prompt(batch: int, length: int, padded: bool = False) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 97, (batch, length), generator=g)
    mask = torch.ones_like(ids)
    if padded:
        for b in range(batch):
            mask[b, : 9 * b] = 0
        ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask}


def tokens(model: Any, cache: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return model.generate(**inputs, past_key_values=cache, **{"max_new_tokens": 60, **options})


def dense_calls(cache: NqkvCache) -> int:
    return cache.stats()["dequantized"]


@pytest.mark.parametrize("scheme", [SHORT, "nqkv", KIVI], ids=["nqkv4", "nqkv", "kivi2"])
@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_greedy_is_the_twins_tokens(name: str, scheme: Any) -> None:
    model = tiny.model(name)
    cache = NqkvCache(model.config, scheme)
    got = tokens(model, cache, prompt(1, 90))
    want = tokens(model, tiny.twin(model.config, scheme), prompt(1, 90))
    assert torch.equal(got, want)
    stats = cache.stats()
    layers = sum(isinstance(x, NqkvLayer) for x in cache.layers)
    assert stats["dequantized"] == 0
    assert stats["packed_decode"] == 59 * layers
    assert stats["packed_positions"] > 0


def test_keys_matter() -> None:
    """The tests above could not fail if attention did not shape the tokens."""
    model = tiny.model("llama")
    want = tokens(model, DynamicCache(config=model.config), prompt(1, 90))
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data.zero_()
    assert not torch.equal(want, tokens(model, DynamicCache(config=model.config), prompt(1, 90)))


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("name", ["llama", "opt", "qwen3", "gemma3"])
def test_left_padded_batches_stay_packed(name: str, prefill: Any) -> None:
    model = tiny.model(name)
    cache = NqkvCache(model.config, SHORT, prefill=prefill)
    got = tokens(model, cache, prompt(3, 100, padded=True))
    want = tokens(model, tiny.twin(model.config, SHORT, prefill), prompt(3, 100, padded=True))
    assert torch.equal(got, want)
    assert dense_calls(cache) == 0


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("name", ["llama", "neox", "gemma3"])
def test_chunked_prefill_stays_packed(name: str, prefill: Any) -> None:
    model = tiny.model(name)
    cache = NqkvCache(model.config, SHORT, prefill=prefill)
    got = tokens(model, cache, prompt(1, 150), prefill_chunk_size=31)
    twin = tiny.twin(model.config, SHORT, prefill)
    want = tokens(model, twin, prompt(1, 150), prefill_chunk_size=31)
    assert torch.equal(got, want)
    assert dense_calls(cache) == 0
    assert cache.stats()["packed_chunk"] > 0


def test_sampling_with_a_seed() -> None:
    model = tiny.model("llama")
    results = []
    for cache in (NqkvCache(model.config, SHORT), tiny.twin(model.config, SHORT)):
        torch.manual_seed(0)
        results.append(tokens(model, cache, prompt(2, 80), do_sample=True, temperature=1.3))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_beam_search_shares_pages(name: str) -> None:
    model = tiny.model(name)
    cache = NqkvCache(model.config, SHORT)
    got = tokens(model, cache, prompt(1, 90), num_beams=3)
    want = tokens(model, tiny.twin(model.config, SHORT), prompt(1, 90), num_beams=3)
    assert torch.equal(got, want)


def test_nqkv_attention_name() -> None:
    model = tiny.model("llama", attention="nqkv")
    cache = NqkvCache(model.config, SHORT)
    got = tokens(model, cache, prompt(2, 100, padded=True))
    sdpa = tiny.model("llama")
    want = tokens(sdpa, tiny.twin(sdpa.config, SHORT), prompt(2, 100, padded=True))
    assert torch.equal(got, want)
    assert dense_calls(cache) == 0


def test_eager_dequantizes_and_says_so_once() -> None:
    model = tiny.model("llama", attention="eager")
    cache = NqkvCache(model.config, SHORT)
    with pytest.warns(UserWarning, match="dequantized") as seen:
        got = tokens(model, cache, prompt(1, 90))
    assert len([w for w in seen if "nqkv_rs" in str(w.message)]) == 1
    assert dense_calls(cache) > 0
    want = tokens(model, tiny.twin(model.config, SHORT), prompt(1, 90))
    assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="strict"):
        tokens(model, NqkvCache(model.config, SHORT, strict=True), prompt(1, 90))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_generate(dtype: torch.dtype) -> None:
    model = tiny.model("llama", dtype=dtype)
    cache = NqkvCache(model.config)
    assert tokens(model, cache, prompt(1, 120)).shape == (1, 180)
    assert dense_calls(cache) == 0


def test_continuation_and_reset() -> None:
    model = tiny.model("llama")
    cache = NqkvCache(model.config, SHORT)
    first = tokens(model, cache, prompt(1, 90))
    again = tokens(model, cache, {"input_ids": first, "attention_mask": torch.ones_like(first)})
    assert again.shape[1] == 210
    assert dense_calls(cache) == 0
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(tokens(model, cache, prompt(1, 90)), first)


def test_inference_mode_with_left_padding() -> None:
    model = tiny.model("llama")
    cache = NqkvCache(model.config, SHORT)
    with torch.inference_mode():
        got = tokens(model, cache, prompt(2, 100, padded=True))
    want = tokens(model, tiny.twin(model.config, SHORT), prompt(2, 100, padded=True))
    assert torch.equal(got, want)
    assert dense_calls(cache) == 0


def test_memory_usage_counts_what_is_allocated() -> None:
    model = tiny.model("llama", dtype=torch.float32)
    cache = NqkvCache(model.config, "nqkv4")
    tokens(model, cache, prompt(2, 300))
    used = cache.memory_usage()
    pools = sum(p.numel() for layer in cache.layers for p in layer.pool)
    tables = used["codes"] + used["scales"] - pools
    assert 0 < tables < 2000
    # Two layers of 2 sequences; exact tokens of 2 heads x (16 + 16) floats.
    assert used["tail"] == 2 * 2 * 96 * 2 * 32 * 4
    assert used["sinks"] == 2 * 2 * 4 * 2 * 32 * 4
    held = 2 * 2 * 359 * 2 * 32
    assert used["dense"] == 2 * held
    assert used["effective_bits"] == pytest.approx(8 * used["total"] / held)


def test_words_of_transformers_users() -> None:
    config = tiny.CONFIGS["llama"]()
    cache = NqkvCache(config, nbits=2, residual_length=16, skip_layers=[-1])
    assert cache.scheme.key.codebook == "nf2"
    assert cache.scheme.residual_length == 16
    assert [isinstance(x, NqkvLayer) for x in cache.layers] == [True, False]


def test_refusals() -> None:
    for config, what in [
        (DeepseekV3Config(num_hidden_layers=1), "latent"),
        (T5Config(), "encoder-decoder"),
        (MambaConfig(), "state-space"),
    ]:
        with pytest.raises(NotImplementedError, match=what):
            NqkvCache(config)
    config = tiny.CONFIGS["llama"]()
    with pytest.raises(ValueError, match="'exact' or 'quantized'"):
        NqkvCache(config, prefill="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nqkv4"):
        NqkvCache(config, "nope")
    with pytest.raises(ValueError, match="-2 to 1"):
        NqkvCache(config, skip_layers=[2])
    assert EncoderDecoderCache is not None


def test_import_is_light() -> None:
    code = "import sys, nqkv_rs; print('torch' in sys.modules or 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_nothing_else_warns() -> None:
    model = tiny.model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens(model, NqkvCache(model.config, strict=True), prompt(1, 120))
