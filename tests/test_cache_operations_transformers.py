"""What transformers, and users, do to a cache beside generating: on packed pages, all of it."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest

pytest.importorskip("transformers")

import tiny
import torch
from tiny import SHORT, prompt, tokens
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from nqkv_rs import NqkvCache
from nqkv_rs.integrations.layer import NqkvLayer
from nqkv_rs.integrations.shared import Shared

MODELS = ["llama", "mistral", "gemma3"]


def filled(name: str, length: int = 200, batch: int = 1, twin: bool = False) -> tuple[Any, Any]:
    model = tiny.model(name)
    make = tiny.twin if twin else NqkvCache
    cache = make(model.config, SHORT)
    feed(model, cache, prompt(batch, length)["input_ids"])
    return model, cache


def feed(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def held(cache: Any) -> list[torch.Tensor]:
    """Keys and values of the packed layers, as the cache gives them back."""
    return [x for layer in cache.layers if isinstance(layer, NqkvLayer) for x in layer.read()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(*pair) for pair in zip(a, b, strict=True))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    # Scales, and the numbers that a dense cache holds, are rounded to fp32.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def go_on_alike(model: Any, a: Any, b: Any, batch: int = 1) -> None:
    """Both caches give the same logits for a chunk and single tokens, across a seal point."""
    more = torch.randint(2, 97, (batch, 80), generator=torch.Generator().manual_seed(8))
    for part in (more[:, :20], *more[:, 20:].split(1, 1)):
        got, want = feed(model, a, part), feed(model, b, part)
        close(got, want)


@pytest.mark.parametrize("removed", [0, 3, 8, 60, 130, 199])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_crop_by_a_number(name: str, removed: int) -> None:
    model, cache = filled(name)
    before = held(cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == 200 - removed
    assert equal(held(cache), [x[:, :, : 200 - removed] for x in before])
    twin = filled(name, twin=True)[1]
    twin.crop(-removed)
    go_on_alike(model, cache, twin)
    assert cache.stats()["dequantized"] == 0


def test_crop_to_a_length_as_before_5_16() -> None:
    _, cache = filled("llama")
    before = held(cache)
    cache.crop(131)
    assert cache.get_seq_length() == 131
    assert equal(held(cache), [x[:, :, :131] for x in before])
    cache.crop(500)
    assert cache.get_seq_length() == 131


def test_crop_of_an_empty_cache() -> None:
    cache = NqkvCache(tiny.CONFIGS["llama"]())
    cache.crop(0)
    cache.crop(-3)
    assert cache.get_seq_length() == 0


def test_rounds_of_crop_and_append_change_nothing_kept() -> None:
    model, cache = filled("llama", 150)
    kept = [x[:, :, :130] for x in held(cache)]
    for i in range(60):
        feed(model, cache, prompt(1, 5 + i % 40)["input_ids"])
        cache.crop(-(cache.get_seq_length() - 130 - i % 3))
        assert equal([x[:, :, :130] for x in held(cache)], kept)
    assert cache.stats()["dequantized"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_batch_operations(name: str) -> None:
    """Two sequences become six, five in another order, three: as the dense twin's."""
    model, cache = filled(name, batch=2)
    twin = filled(name, batch=2, twin=True)[1]
    dense = held(cache)
    for c in (cache, twin):
        c.batch_repeat_interleave(3)
        c.reorder_cache(torch.tensor([5, 0, 0, 4, 2]))
        c.batch_select_indices(torch.tensor([3, 1, 0]))
    order = [1, 0, 1]
    assert equal(held(cache), [x[order] for x in dense])
    go_on_alike(model, cache, twin, batch=3)
    assert cache.stats()["dequantized"] == 0


def test_selecting_by_a_mask_of_sequences() -> None:
    _, cache = filled("llama", batch=3)
    dense = held(cache)
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert equal(held(cache), [x[[0, 2]] for x in dense])


def test_operations_before_the_first_token() -> None:
    cache = NqkvCache(tiny.CONFIGS["llama"]())
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.reorder_cache(torch.tensor([0]))
    cache.reset()
    assert [x[:2] for x in cache] == [(None, None)] * 2
    copied = copy.deepcopy(cache)
    assert copied.get_seq_length() == 0 and not copied.layers[0].is_initialized


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_goes_on_alone(name: str) -> None:
    """The prefix recipe: encode once, continue often. Pages are shared, and nobody writes them."""
    model, cache = filled(name, 150)
    before = held(cache)
    copies = [copy.deepcopy(cache) for _ in range(3)]
    texts = []
    for i, c in enumerate(copies):
        text = torch.cat([prompt(1, 150)["input_ids"], prompt(1, 10 + i)["input_ids"]], 1)
        texts.append(tokens(model, c, {"input_ids": text, "attention_mask": text.ne(0).long()}))
        fresh = NqkvCache(model.config, SHORT)
        feed(model, fresh, text[:, :150])
        assert torch.equal(
            texts[-1],
            tokens(model, fresh, {"input_ids": text, "attention_mask": text.ne(0).long()}),
        )
    assert equal(held(cache), before)
    # Counters and the warning belong to each copy; what one layer shares with the next stays so.
    assert copies[0].stats()["packed_decode"] > cache.stats()["packed_decode"] == 0
    assert len({id(x.shared) for x in copies[0].layers if isinstance(x, NqkvLayer)}) == 1
    if name != "gemma3":  # its own sliding layers cannot go back
        copies[0].crop(-40)
    copies[1].reset()
    assert equal(held(cache), before)


def test_a_copy_shares_its_pages() -> None:
    _, cache = filled("llama", 1000)
    other = copy.deepcopy(cache)
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        shared = {p.data_ptr() for p in mine.pool} & {p.data_ptr() for p in theirs.pool}
        assert shared == {p.data_ptr() for p in mine.pool}
    del cache
    assert all(x.isfinite().all() for x in held(other))


def test_pickling_names_what_to_use() -> None:
    with pytest.raises(TypeError, match="save"):
        pickle.dumps(NqkvCache(tiny.CONFIGS["llama"]()))


def test_early_initialization() -> None:
    model = tiny.model("llama")
    cache = NqkvCache(model.config, SHORT)
    cache.early_initialization(2, 2, 16, torch.float64, torch.device("cpu"))
    assert cache.is_initialized and cache.get_seq_length() == 0
    fresh = NqkvCache(model.config, SHORT)
    assert torch.equal(tokens(model, cache, prompt(2, 110)), tokens(model, fresh, prompt(2, 110)))


def test_reset_takes_another_batch_and_dtype() -> None:
    model, cache = filled("llama", batch=2)
    cache.reset()
    assert cache.get_seq_length() == 0
    got = tokens(model, cache, prompt(1, 110))
    assert torch.equal(got, tokens(model, NqkvCache(model.config, SHORT), prompt(1, 110)))
    cache.reset()
    single = tiny.model("llama", dtype=torch.float32)
    tokens(single, cache, prompt(3, 110))
    assert cache.layers[0].keys.dtype == torch.float32


def test_offloading_has_nothing_to_move() -> None:
    _, cache = filled("llama")
    before = held(cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert equal(held(cache), before)


@pytest.mark.parametrize("name", MODELS)
def test_iterating_gives_dequantized_tensors(name: str) -> None:
    _, cache = filled(name, batch=2)
    for (k, v, window), layer in zip(cache, cache.layers, strict=True):
        assert type(k) is type(v) is torch.Tensor
        if isinstance(layer, NqkvLayer):
            assert k.shape[0] == 2 and k.shape[2] == v.shape[2] == 200
            assert torch.equal(k, layer.keys) and torch.equal(v, layer.values)
            assert window is None
        else:
            assert int(window) == 16
    with pytest.raises(AttributeError, match="update"):
        cache.layers[-1].keys = torch.zeros(1)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_from_cache_is_what_prefill_makes(name: str, with_config: bool) -> None:
    model, packed = filled(name, batch=2)
    dense = DynamicCache(config=model.config)
    feed(model, dense, prompt(2, 200)["input_ids"])
    before = dense.layers[-1].keys.clone()
    made = NqkvCache.from_cache(dense, SHORT, config=model.config if with_config else None)
    assert [type(x) for x in made.layers] == [type(x) for x in packed.layers]
    assert equal(held(made), held(packed))
    go_on_alike(model, made, packed, batch=2)
    assert torch.equal(dense.layers[-1].keys, before)
    assert dense.get_seq_length() == 200


def test_from_a_cache_without_a_config() -> None:
    """Its layers all grow; with the model's config, the sliding ones slide again."""
    model, packed = filled("gemma3", 120)
    dense = DynamicCache()
    with torch.no_grad():
        model(prompt(1, 120)["input_ids"], past_key_values=dense)
    made = NqkvCache.from_cache(dense, SHORT, config=model.config)
    part = prompt(1, 1)["input_ids"]
    assert torch.equal(feed(model, made, part), feed(model, packed, part))


def test_from_cache_refuses() -> None:
    config = tiny.CONFIGS["llama"]()
    with pytest.raises(TypeError, match="expected a DynamicCache, got EncoderDecoderCache"):
        NqkvCache.from_cache(EncoderDecoderCache(DynamicCache(), DynamicCache()))
    with pytest.raises(TypeError, match="got StaticCache"):
        NqkvCache.from_cache(StaticCache(config=config, max_cache_len=8))
    with pytest.raises(ValueError, match="at least 1 layers, got 0"):
        NqkvCache.from_cache(DynamicCache())
    with pytest.raises(ValueError, match=r"2 \(config's\) layers, got 0"):
        NqkvCache.from_cache(DynamicCache(), config=config)
    with pytest.raises(ValueError, match="nqkv4"):
        NqkvCache.from_cache(DynamicCache(config=config), "nope")
    with pytest.raises(ValueError, match="'exact' or 'quantized'"):
        NqkvCache.from_cache(DynamicCache(config=config), prefill="both")  # type: ignore[arg-type]
    mistral = tiny.model("mistral")
    slid = DynamicCache(config=mistral.config)
    feed(mistral, slid, prompt(1, 100)["input_ids"])
    with pytest.raises(ValueError, match="the last 79 of 100"):
        NqkvCache.from_cache(slid)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_to_dense_and_back(name: str) -> None:
    model, cache = filled(name, 190, batch=2)
    dense = cache.to_dense()
    assert type(dense) is DynamicCache and dense.get_seq_length() == 190
    assert equal([x for k, v, _ in dense for x in (k, v)], held(cache))
    # Attending it step by step is what attending the pages is, until the next tokens are sealed.
    part = prompt(2, 1)["input_ids"]
    close(feed(model, dense, part), feed(model, cache, part))
    assert cache.get_seq_length() == 191


def test_to_dense_of_a_hybrid_keeps_its_own_layers() -> None:
    model, cache = filled("gemma3", 190)
    dense = cache.to_dense()
    assert [type(x) for x in dense.layers] == [
        type(x) for x in DynamicCache(config=model.config).layers
    ]
    assert dense.layers[0].keys is not cache.layers[0].keys
    part = prompt(1, 1)["input_ids"]
    close(feed(model, dense, part), feed(model, cache, part))


@pytest.mark.parametrize("inference", [True, False])
def test_a_mask_that_was_written_to_is_judged_again(inference: bool) -> None:
    with torch.inference_mode(inference):
        shared = Shared("exact", strict=False)
        mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
        assert shared.left_padding(mask, 1, 9) == [0, 0]
        mask[1, :, :, :4] = False
        assert shared.left_padding(mask, 1, 9) == [0, 4]
        assert shared.left_padding(mask, 1, 9) == [0, 4]
        mask[0, :, :, 5] = False
        assert shared.left_padding(mask, 1, 9) is None


def test_masks_that_are_causal_and_those_that_are_not() -> None:
    shared = Shared("exact", strict=False)
    ones = torch.ones(1, 1, 3, 8, dtype=torch.bool)
    causal = ones.tril(5)
    assert shared.left_padding(causal, 3, 8) == [0]
    assert shared.left_padding(ones, 3, 8) is None
    assert shared.left_padding(causal.float(), 3, 8) is None
    assert shared.left_padding(causal, 3, 9) is None
    window = causal & ~ones.tril(5 - 4)
    assert shared.left_padding(window, 3, 8) is None
    assert shared.left_padding(window, 3, 8, 5) is None
    assert shared.left_padding(window, 3, 8, 4) == [2]
    late = window.clone()
    late[..., :4] = False
    assert shared.left_padding(late, 3, 8, 4) == [4]
    assert shared.left_padding(torch.zeros_like(ones), 3, 8) == [8]


def test_layers_are_independent() -> None:
    """A thread per layer: what layers share is a mask and counters, and neither is lost."""
    cache = NqkvCache(tiny.CONFIGS["llama"](), SHORT)
    alone = NqkvCache(tiny.CONFIGS["llama"](), SHORT)
    g = torch.Generator().manual_seed(5)
    k, v = torch.randn(2, 2, 2, 300, 16, generator=g, dtype=torch.float64)
    q = torch.randn(2, 4, 1, 16, generator=g, dtype=torch.float64)
    out: dict[tuple[int, int], torch.Tensor] = {}

    def run(c: Any, layer: int, key: int) -> None:
        for t in range(300):
            new = slice(t, t + 1)
            mask = torch.ones(2, 1, 1, t + 1, dtype=torch.bool)
            mask[1, ..., : min(t, 7)] = False
            keys, values = c.update(k[:, :, new], v[:, :, new] + layer, layer)
            out[key, layer] = torch.nn.functional.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, enable_gqa=True
            )

    threads = [threading.Thread(target=run, args=(cache, i, 0)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(2):
        run(alone, i, 1)
        assert torch.equal(out[0, i], out[1, i])
    assert cache.stats() == alone.stats()
    assert cache.stats()["packed_decode"] == 600
