"""NqkvCache in transformers: its words, its numbers, what it says and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import tiny
import torch
from tiny import SHORT, prompt, tokens
from transformers.cache_utils import DynamicLayer
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.mamba import MambaConfig
from transformers.models.t5 import T5Config

from nqkv_rs import NqkvCache
from nqkv_rs.integrations.layer import NqkvLayer


def dense_calls(cache: NqkvCache) -> int:
    return cache.stats()["dequantized"]


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
    assert tokens(model, cache, prompt(1, 120)).shape == (1, 160)
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
    held = 2 * 2 * 339 * 2 * 32
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
    with pytest.raises(NotImplementedError, match="2 are skipped"):
        NqkvCache(config, skip_layers=[0, 1])


def test_a_skipped_layer_of_a_sliding_model() -> None:
    """All layers see one mask, so the skipped one grows, too; the window is the mask's."""
    model = tiny.model("mistral")
    cache = NqkvCache(model.config, SHORT, skip_layers=[0], strict=True)
    got = tokens(model, cache, prompt(2, 110, padded=True))
    want = tiny.twin(model.config, SHORT)
    want.layers[0] = DynamicLayer()
    assert torch.equal(got, tokens(model, want, prompt(2, 110, padded=True)))
    assert cache.stats()["packed_decode"] == 39


def test_other_masks_dequantize_and_are_right() -> None:
    """Padding in the middle is no decoder's pattern: said once, and computed as it is."""
    model = tiny.model("llama")
    inputs = prompt(2, 110)
    inputs["attention_mask"][1, 30:40] = 0
    cache = NqkvCache(model.config, SHORT)
    with pytest.warns(UserWarning, match="causal or left-padded mask"):
        got = tokens(model, cache, inputs)
    assert torch.equal(got, tokens(model, tiny.twin(model.config, SHORT), inputs))
    assert dense_calls(cache) > 0


def test_import_is_light() -> None:
    code = "import sys, nqkv_rs; print('torch' in sys.modules or 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_nothing_else_warns() -> None:
    model = tiny.model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens(model, NqkvCache(model.config, strict=True), prompt(1, 120))
