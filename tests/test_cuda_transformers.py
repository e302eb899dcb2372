"""Models on a CUDA device give the tokens that they give on the CPU, from the same pages."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import nqkv_rs

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402

from nqkv_rs import NqkvCache  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not nqkv_rs.cuda_is_available(), reason="needs a CUDA device"),
]


def prompt(tokens: int, batch: int = 1) -> Any:
    return torch.randint(2, 97, (batch, tokens), generator=torch.Generator().manual_seed(5))


def both(name: str, ids: Any, scheme: Any = tiny.SHORT, **words: Any) -> NqkvCache:
    """Generate on either side; the tokens must be equal. Returns the cache on the device."""
    made = []
    for device in ("cpu", "cuda"):
        model = tiny.model(name).to(device)
        cache = NqkvCache(model.config, scheme)
        inputs = {k: v.to(device) for k, v in words.items() if isinstance(v, torch.Tensor)}
        plain = {k: v for k, v in words.items() if k not in inputs}
        torch.manual_seed(1)
        out = model.generate(
            ids.to(device), past_key_values=cache, max_new_tokens=24, **inputs, **plain
        )
        made.append((out.cpu().tolist(), cache))
    assert made[0][0] == made[1][0]
    assert made[0][1].stats() == made[1][1].stats()
    return made[1][1]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "mistral", "opt", "neox"])
def test_greedy(name: str) -> None:
    cache = both(name, prompt(150), do_sample=False)
    assert cache.stats()["dequantized"] == 0
    assert cache.memory_usage()["total"] > 0


@pytest.mark.parametrize("scheme", ["nqkv", "kivi2"])
def test_schemes(scheme: str) -> None:
    both("llama", prompt(300), scheme, do_sample=False)


def test_beams_share_pages() -> None:
    both("llama", prompt(140), do_sample=False, num_beams=3)


def test_left_padding() -> None:
    ids = prompt(130, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    mask[2, :100] = 0
    ids = ids * mask
    both("llama", ids, do_sample=False, attention_mask=mask)


def test_chunks_crops_and_copies() -> None:
    ids = prompt(200)
    found = []
    for device in ("cpu", "cuda"):
        model = tiny.model("llama").to(device)
        cache = NqkvCache(model.config, tiny.SHORT, prefill="quantized")
        with torch.no_grad():
            for chunk in ids.to(device).split(33, dim=1):
                logits = model(chunk, past_key_values=cache).logits
            branch = copy.deepcopy(cache)
            cache.crop(-70)
            after = model(ids[:, 130:].to(device), past_key_values=cache).logits
            again = model(ids[:, :5].to(device), past_key_values=branch).logits
        dense = branch.to_dense()
        keys = dense.layers[0].keys.cpu()
        found.append([x.cpu() for x in (logits, after, again)] + [keys])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4)


def test_a_dense_cache_is_packed_there() -> None:
    from transformers import DynamicCache

    model = tiny.model("llama").to("cuda")
    ids = prompt(120).to("cuda")
    dense = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=dense)
        packed = NqkvCache.from_cache(dense, tiny.SHORT, config=model.config)
        other = NqkvCache(model.config, tiny.SHORT)
        model(ids, past_key_values=other)
    for (k, v, _), (k2, v2, _) in zip(packed, other, strict=True):
        assert torch.equal(k, k2) and torch.equal(v, v2)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_saved_cache_goes_on_on_either_side(name: str, tmp_path: Path) -> None:
    ids, path = prompt(200), tmp_path / "c"
    found = []
    for device in ("cpu", "cuda"):
        model = tiny.model(name).to(device)
        cache = NqkvCache(model.config, tiny.SHORT)
        with torch.no_grad():
            model(ids[:, :-1].to(device), past_key_values=cache)
        cache.save(path)
        for other in ("cpu", "cuda"):
            model = tiny.model(name).to(other)
            loaded = NqkvCache.load(path, model.config, strict=True, device=other)
            out = model.generate(
                ids.to(other), past_key_values=loaded, max_new_tokens=20, do_sample=False
            )
            assert loaded.stats()["dequantized"] == 0
            found.append(out.cpu().tolist())
    assert all(x == found[0] for x in found)


@pytest.mark.parametrize("padded", [False, True])
def test_a_decode_step_is_one_launch_a_layer(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from nqkv_rs import _core

    torch.manual_seed(0)
    # SmolLM2's heads: 9 of queries, 3 of keys, 64 channels.
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    config = LlamaConfig(
        hidden_size=576, intermediate_size=64, num_hidden_layers=2, vocab_size=97, **heads
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    ids = prompt(300, batch=2).cuda()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :77] = 0
    launches: list[int] = []
    launch = _core.cuda_attend
    monkeypatch.setattr(_core, "cuda_attend", lambda *a: (launches.append(1), launch(*a))[1])
    cache = NqkvCache(config, strict=True)
    words = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    model.generate(ids, attention_mask=mask, past_key_values=cache, **words)
    assert cache.stats()["packed_decode"] == len(launches) == 2 * 19


def test_a_step_that_no_kernel_takes_warns_once_or_raises() -> None:
    from nqkv_rs import _attend

    model = tiny.model("llama").to("cuda", torch.bfloat16)
    ids = prompt(60).cuda()
    _attend._WARNED.clear()
    cache = NqkvCache(model.config, "kivi2")
    with pytest.warns(UserWarning, match="attention on CUDA dequantizes tiles") as seen:
        model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert sum("dequantizes tiles" in str(w.message) for w in seen) == 1
    cache = NqkvCache(model.config, "kivi2", strict=True)
    with pytest.raises(RuntimeError, match="strict=True: attention on CUDA"):
        model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
