"""A model that uses packed caches by itself, and one that is spread over devices."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("transformers")

import tiny
import torch
from tiny import SHORT, prompt, tokens
from transformers import AutoModelForSeq2SeqLM, DynamicCache, GenerationConfig
from transformers.models.t5 import T5Config

import nqkv_rs
from nqkv_rs import NqkvCache, disable, enable
from nqkv_rs.integrations.naming import cache_keyword


def run(model: Any, **options: Any) -> Any:
    """What the model generates, and the cache it did it with."""
    given = {"max_new_tokens": 40, "suppress_tokens": [0], **options}
    out = model.generate(**prompt(2, 110), return_dict_in_generate=True, **given)
    return out.sequences, out.past_key_values


def test_enabled_models_use_a_fresh_cache_each_time() -> None:
    model = tiny.model("llama")
    dense, cache = run(model)
    assert type(cache) is DynamicCache
    assert enable(model, SHORT, strict=True) is model
    packed, cache = run(model)
    assert type(cache) is NqkvCache and cache.scheme == SHORT
    assert cache.stats()["packed_decode"] == 2 * 39
    assert torch.equal(packed, tokens(model, NqkvCache(model.config, SHORT), prompt(2, 110)))
    again, other = run(model)
    assert torch.equal(again, packed) and other is not cache
    assert other.get_seq_length() == cache.get_seq_length() == 149
    assert disable(model) is model
    after, cache = run(model)
    assert type(cache) is DynamicCache and torch.equal(after, dense)


def test_what_a_call_brings_wins() -> None:
    model = enable(tiny.model("llama"), SHORT)
    for word in {"past_key_values", cache_keyword()}:
        mine = DynamicCache(config=model.config)
        assert run(model, **{word: mine})[1] is mine
    assert run(model, use_cache=False)[1] is None
    assert type(run(model, cache_implementation="static")[1]).__name__ == "StaticCache"
    theirs = GenerationConfig(cache_implementation="static", max_new_tokens=5, pad_token_id=0)
    out = model.generate(
        prompt(1, 20)["input_ids"], theirs, max_new_tokens=5, return_dict_in_generate=True
    )
    assert type(out.past_key_values).__name__ == "StaticCache"
    plain = GenerationConfig(max_new_tokens=5, pad_token_id=0, return_dict_in_generate=True)
    out = model.generate(prompt(1, 20)["input_ids"], plain)
    assert type(out.past_key_values) is NqkvCache


def test_enabling_twice_and_disabling_twice() -> None:
    model = tiny.model("llama")
    untouched = set(vars(model))
    enable(model, "nqkv")
    enable(model, "kivi2", residual_length=16, prefill="quantized")
    cache = run(model)[1]
    assert cache.scheme.key.codebook == "uniform2" and cache.scheme.residual_length == 16
    disable(model)
    disable(model)
    assert set(vars(model)) == untouched
    assert type(run(model)[1]) is DynamicCache


def test_an_earlier_wrapper_stays() -> None:
    model = tiny.model("llama")
    inner, calls = model.generate, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return inner(*args, **kwargs)

    model.generate = counted
    enable(model, SHORT)
    run(model)
    disable(model)
    assert model.generate is counted
    assert [type(c[cache_keyword()]) for c in calls] == [NqkvCache]


def test_a_copy_of_an_enabled_model_stands_alone() -> None:
    model = enable(tiny.model("llama"), SHORT)
    before = run(model)[0]
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    out, cache = run(other)
    assert torch.equal(out, before) and type(cache) is NqkvCache
    disable(other)
    assert type(run(other)[1]) is DynamicCache
    assert type(run(model)[1]) is NqkvCache


def test_beams_and_sampling_through_an_enabled_model() -> None:
    model = tiny.model("llama")
    want = []
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        torch.manual_seed(2)
        want.append(tokens(model, NqkvCache(model.config, SHORT), prompt(2, 110), **options))
        enable(model, SHORT)
        torch.manual_seed(2)
        assert torch.equal(run(model, **options)[0], want[-1])
        disable(model)


def test_enable_refuses_by_name() -> None:
    with pytest.raises(TypeError, match="generate"):
        enable(torch.nn.Linear(1, 1))
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        enable(AutoModelForSeq2SeqLM.from_config(T5Config(d_model=8, num_layers=1, vocab_size=9)))
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="nqkv4"):
        enable(model, "nope")
    with pytest.raises(TypeError, match="colour"):
        enable(model, colour="red")
    assert "generate" not in vars(model)
    model.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match=r"cache_implementation.*'static'"):
        enable(model)


def test_lazy_names_are_there() -> None:
    assert {"NqkvCache", "enable", "disable"} <= set(nqkv_rs.__all__)
    assert nqkv_rs.enable is enable
    with pytest.raises(AttributeError, match="nothing"):
        _ = nqkv_rs.nothing


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_model_spread_by_a_device_map(name: str) -> None:
    """Every layer hooked on its own, as where they stand on different devices."""
    accelerate = pytest.importorskip("accelerate")
    want = tokens(tiny.model(name), NqkvCache(tiny.CONFIGS[name](), SHORT), prompt(2, 110))
    model = tiny.model(name)
    inner = model.model
    places = {f"model.{n}": "cpu" for n, _ in inner.named_children() if n != "layers"}
    places |= {f"model.layers.{i}": "cpu" for i in range(2)} | {"lm_head": "cpu"}
    model = accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert hasattr(inner.layers[1], "_hf_hook")
    cache = NqkvCache(model.config, SHORT, strict=True)
    assert torch.equal(tokens(model, cache, prompt(2, 110)), want)
    assert cache.stats()["dequantized"] == 0 and cache.stats()["packed_positions"] > 0
    enable(model, SHORT)
    assert torch.equal(run(model)[0], want)


def test_a_model_whose_weights_come_and_go() -> None:
    """accelerate's offloading hooks move weights for each call; the cache is not theirs to move."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny.model("llama")
    want = tokens(model, NqkvCache(model.config, SHORT), prompt(1, 110))
    model = accelerate.cpu_offload(tiny.model("llama"), execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    cache = NqkvCache(model.config, SHORT, strict=True)
    assert torch.equal(tokens(model, cache, prompt(1, 110)), want)
