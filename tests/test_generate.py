"""Every way to generate: the tokens of a dense cache that holds the same numbers."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import tiny
import torch
import transformers
from packaging.version import Version
from tiny import SHORT, prompt, tokens
from transformers import DynamicCache

from nqkv_rs import NqkvCache, Scheme, enable
from nqkv_rs.integrations.layer import NqkvLayer

KIVI = Scheme.of("kivi2", residual_length=8)
# Before, its own sliding layers could not go back once their window was full.
ROLLS_BACK = Version(transformers.__version__) >= Version("5.16")
EVERY_MODEL = [name for name in tiny.CONFIGS if name != "gemma2"]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"num_beams": 3},
    "sampled-beams": {"num_beams": 2, "do_sample": True},
    "returned-sequences": {"num_return_sequences": 3, "do_sample": True},
    "chunks": {"prefill_chunk_size": 31},
    # With an end token that cannot come: looking up needs one in 5.5.
    "lookup": {"prompt_lookup_num_tokens": 4, "eos_token_id": 98},
}


def repeating(length: int) -> dict[str, torch.Tensor]:
    """A prompt in which looking up the next tokens finds some."""
    ids = prompt(1, 23)["input_ids"].repeat(1, 1 + length // 23)[:, :length]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def same_tokens(
    name: str,
    inputs: dict[str, torch.Tensor],
    scheme: Any = SHORT,
    prefill: Any = "exact",
    attention: str = "sdpa",
    reference: str = "sdpa",
    **options: Any,
) -> NqkvCache:
    """Generate with both caches; the packed path must have been taken, and give the same."""
    model = tiny.model(name, attention=attention)
    cache = NqkvCache(model.config, scheme, prefill=prefill)
    torch.manual_seed(0)
    got = tokens(model, cache, inputs, **options)
    dense = model if attention == "sdpa" else tiny.model(name, attention=reference)
    torch.manual_seed(0)
    want = tokens(dense, tiny.twin(model.config, scheme, prefill), inputs, **options)
    assert torch.equal(got, want)
    # 5.5 may accept one candidate too many at the end.
    new = got.shape[1] - inputs["input_ids"].shape[1]
    assert new == 40 or (new == 41 and "prompt_lookup_num_tokens" in options)
    stats = cache.stats()
    assert stats["dequantized"] == 0
    assert stats["packed_positions"] > 0
    return cache


@pytest.mark.parametrize("name", EVERY_MODEL)
@pytest.mark.parametrize("scheme", [SHORT, "nqkv", KIVI], ids=["nqkv4", "nqkv", "kivi2"])
def test_greedy(name: str, scheme: Any) -> None:
    cache = same_tokens(name, prompt(1, 110), scheme)
    packed = sum(isinstance(x, NqkvLayer) for x in cache.layers)
    assert cache.stats()["packed_decode"] == 39 * packed


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_keys_matter(name: str) -> None:
    """No test here could fail if the keys of the packed layers did not shape the tokens."""
    model = tiny.model(name)
    want = tokens(model, DynamicCache(config=model.config), prompt(1, 110), max_new_tokens=8)
    # GPT-NeoX has q, k and v of a head side by side.
    linears = [m for n, m in model.named_modules() if n.endswith(("k_proj", "query_key_value"))]
    for layer, linear in zip(NqkvCache(model.config).layers, linears, strict=True):
        if isinstance(layer, NqkvLayer):
            rows = linear.weight.data
            (rows.view(4, 3, 16, -1)[:, 1] if name == "neox" else rows).zero_()
    got = tokens(model, DynamicCache(config=model.config), prompt(1, 110), max_new_tokens=8)
    assert not torch.equal(got, want)


@pytest.mark.parametrize("mode", [m for m in MODES if m not in ("greedy", "lookup")])
@pytest.mark.parametrize("name", ["llama", "opt", "mistral"])
def test_modes(name: str, mode: str) -> None:
    same_tokens(name, prompt(2, 110), **MODES[mode])


@pytest.mark.parametrize("mode", ["beams", "sampling"])
def test_modes_of_a_hybrid_model(mode: str) -> None:
    same_tokens("gemma3", prompt(2, 110), **MODES[mode])


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_left_padded_batches(name: str, prefill: Any) -> None:
    same_tokens(name, prompt(3, 110, padded=True), prefill=prefill)


@pytest.mark.parametrize("mode", ["sampling", "beams", "chunks"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_left_padded_modes(name: str, mode: str) -> None:
    same_tokens(name, prompt(3, 110, padded=True), prefill="quantized", **MODES[mode])


def test_padding_longer_than_a_chunk() -> None:
    """Queries of the first chunk attend nothing at all in the last sequence."""
    same_tokens("llama", prompt(3, 110, padded=True), prefill_chunk_size=9)


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("name", ["qwen3", "neox", "gemma3", "mistral"])
def test_chunked_prefill(name: str, prefill: Any) -> None:
    cache = same_tokens(name, prompt(1, 150), prefill=prefill, prefill_chunk_size=31)
    assert cache.stats()["packed_chunk"] > 0


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi", "mistral", "gemma3"])
def test_prompt_lookup(name: str, prefill: Any) -> None:
    if name == "gemma3" and not ROLLS_BACK:
        pytest.skip("this transformers cannot crop its own sliding layers")
    cache = same_tokens(name, repeating(110), prefill=prefill, **MODES["lookup"])
    assert cache.stats()["packed_chunk"] > 0


@pytest.mark.parametrize("name", ["llama", "opt", "mistral", "gemma3"])
def test_assisted(name: str) -> None:
    """Our cache as the target's and, because the assistant is enabled, as the assistant's."""
    if name == "gemma3" and not ROLLS_BACK:
        pytest.skip("this transformers cannot crop its own sliding layers")
    assistant = enable(tiny.model("llama"), SHORT)
    caches = []
    step = assistant.generate

    def seen(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **kwargs)
        caches.append(out.past_key_values)
        return out

    assistant.generate = seen
    cache = same_tokens(name, prompt(1, 110), assistant_model=assistant)
    assert cache.stats()["packed_chunk"] > 0
    # One cache through all rounds, cropped after each; and it was read packed.
    assert len(caches) > 2 and {type(c) for c in caches} == {NqkvCache}
    used = caches[-1].stats()
    assert used["dequantized"] == 0 and used["packed_decode"] > 0


def test_an_assistant_that_agrees_saves_steps() -> None:
    model = tiny.model("llama")
    cache = same_tokens("llama", prompt(1, 110), assistant_model=model)
    assert cache.stats()["packed_chunk"] < 2 * 30


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("batch", [1, 3])
def test_turns(name: str, batch: int) -> None:
    """Three turns in one cache: what was said is not encoded again."""
    model = tiny.model(name)
    caches = [NqkvCache(model.config, SHORT), tiny.twin(model.config, SHORT)]
    text = prompt(batch, 70, padded=True)
    ids, mask = text["input_ids"], text["attention_mask"]
    for turn in range(3):
        got, want = (
            tokens(model, c, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=30)
            for c in caches
        )
        assert torch.equal(got, want)
        said = prompt(batch, 40 + turn)["input_ids"]
        ids = torch.cat([got, said], 1)
        mask = torch.cat([mask, mask.new_ones(batch, ids.shape[1] - mask.shape[1])], 1)
    assert caches[0].stats()["dequantized"] == 0
    assert caches[0].stats()["packed_chunk"] > 0


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_nqkv_attention_name(name: str) -> None:
    same_tokens(name, prompt(2, 110, padded=True), attention="nqkv")


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("mode", ["greedy", "beams", "chunks"])
@pytest.mark.parametrize("reference", ["eager", "nqkv"])
def test_soft_cap(reference: str, mode: str, prefill: Any) -> None:
    """Gemma 2: full layers on pages, sliding ones dense, both capped as in the model's own code."""
    cache = same_tokens(
        "gemma2",
        # In float64 the model's own code gives NaN where a query may attend nothing.
        prompt(2, 110, padded=reference != "eager"),
        prefill=prefill,
        attention="nqkv",
        reference=reference,
        **MODES[mode],
    )
    kinds = [isinstance(x, NqkvLayer) for x in cache.layers]
    assert kinds == [False, True]


def test_what_would_be_ignored_is_refused() -> None:
    from nqkv_rs.integrations.attention import nqkv_attention_forward

    x = torch.randn(1, 2, 3, 16)
    for name in ("s_aux", "position_bias"):
        with pytest.raises(NotImplementedError, match=f"no {name}, got one"):
            nqkv_attention_forward(torch.nn.Module(), x, x, x, None, **{name: torch.ones(2)})
    with pytest.raises(NotImplementedError, match=r"dropout with a soft cap, got 0\.5"):
        nqkv_attention_forward(torch.nn.Module(), x, x, x, None, dropout=0.5, softcap=2.0)


def test_inference_mode() -> None:
    with torch.inference_mode():
        same_tokens("llama", prompt(2, 110, padded=True))
