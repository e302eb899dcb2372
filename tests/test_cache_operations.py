"""Remove, crop, select, reset, fork, split, join: as the plain cache does, and bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import plain
import pytest
from real import Real, check_attention, inputs, preset, same

import nqkv_rs
from nqkv_rs import LayerCache


@pytest.mark.parametrize("name", ["nqkv4", "nqkv", "kivi2"])
def test_remove_select_and_reset_follow_the_plain_cache(name: str) -> None:
    scheme = preset(name)
    if name == "kivi2":
        scheme["residual_length"] = 16
    real, want = Real(scheme, 2, 20, 16, batch=2), plain.Cache(scheme, 2, 20, 16, batch=2)
    random = np.random.default_rng(1)
    for step in range(40):
        batch, tokens = len(want.sequences), want.tokens(0)
        kind = random.choice(
            ["append", "append", "remove", "select", "reset"], p=[0.3, 0.25, 0.25, 0.15, 0.05]
        )
        if kind == "append":
            n = int(random.choice([1, 3, 40, 64, 100]))
            k, v = inputs(n, 2, 20, 100 + step, batch), inputs(n, 2, 16, 200 + step, batch)
            real.append(k, v)
            want.append(k, v)
        elif kind == "remove":
            n = int(random.integers(0, min(tokens, 120) + 1))
            real.core.remove_newest(n)
            want.remove_newest(n)
        elif kind == "select":
            chosen = [int(i) for i in random.integers(0, batch, random.integers(1, 4))]
            real.core.select(chosen)
            want.select(chosen)
        else:
            real.core.reset()
            want.reset()
        same(real, want, bytes_too=False)
        held = {row for b in range(real.core.batch) for row, _ in real.core.table(b)}
        assert real.core.free_rows == real.core.rows - len(held)
        if want.tokens(0) > 3:
            q = plain.numbers((len(want.sequences), 2, 3, 20), step) * np.float32(0.5)
            check_attention(real, want, q)


@pytest.mark.parametrize("name", ["nqkv4", "nqkv"])
def test_shared_rows_are_never_written_by_one_of_their_owners(name: str) -> None:
    real = Real(preset(name), 1, 16, 16)
    real.append(inputs(230, 1, 16, 1), inputs(230, 1, 16, 2))
    first = [x.copy() for x in real.read(0)]
    used = real.core.rows - real.core.free_rows
    real.core.select([0, 0, 0])
    assert real.core.rows - real.core.free_rows == used
    for step in range(70):
        k = inputs(1, 1, 16, 1000 + step, 3)
        real.append(k, k)
    for b in range(3):
        for x, y in zip(real.read(b), first, strict=True):
            # Tokens that were exact may have been sealed meanwhile; page tokens are untouched.
            packed = 192 if name == "nqkv4" else 230
            np.testing.assert_array_equal(x[:, 4:packed], y[:, 4:packed])


@pytest.mark.parametrize("name", ["nqkv4", "nqkv", "kivi4"])
def test_slack_is_at_most_one_row_per_sequence(name: str) -> None:
    real = Real(preset(name), 1, 16, 16, batch=2)
    for step, n in enumerate([1, 1, 62, 1, 95, 100, 3, 64, 1, 1, 500]):
        real.append(inputs(n, 1, 16, step, 2), inputs(n, 1, 16, step + 50, 2))
        assert real.core.free_rows == 0
        for b in range(2):
            assert len(real.core.table(b)) * 64 - real.core.packed(b) < 64
    page_memory = real.core.rows * real.core.page_bytes
    memory = real.core.memory()
    # Of a row: two entries in a table that doubles, 16 bytes each, and a handle of 32.
    tables = real.core.rows * 64
    assert page_memory <= memory["codes"] + memory["scales"] <= page_memory + tables
    assert memory["total"] == sum(memory[x] for x in ("codes", "scales", "tail", "sinks"))


# --- crop, fork, split, join: no kept value changes, bit for bit ----------------------------------


def short(name: str) -> nqkv_rs.Scheme:
    """A preset whose windows are so short that a hundred tokens fill pages; "nqkv" has none."""
    return nqkv_rs.Scheme.of(name, residual_length=None if name == "nqkv" else 8)


def numbers(batch: int, tokens: int, seed: int) -> plain.Array:
    shape = (2, batch, 2, tokens, 16)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def filled(name: str, batch: int, tokens: int, seed: int) -> LayerCache:
    cache = LayerCache(short(name), kv_heads=2, key_dim=16, batch=batch)
    cache.append(*numbers(batch, tokens, seed))
    return cache


def read(cache: LayerCache, b: int) -> plain.Array:
    """Keys and values of one sequence as bits, ``[2, heads, tokens, dim]``."""
    out = np.empty((2, 2, cache.tokens(b), 16), np.float32)
    cache.core.read(b, 0, out[0], out[1])
    return out.view(np.uint32)


def bits(cache: LayerCache) -> list[bytes]:
    return [read(cache, b).tobytes() for b in range(cache.core.batch)]


def fixed(cache: LayerCache, b: int) -> int:
    """Tokens in sinks and pages, which only a crop may touch."""
    sinks = min(cache.tokens(b), cache.scheme.sink_tokens)
    return sinks + cache.core.packed(b)


@pytest.mark.parametrize("name", ["nqkv4", "nqkv", "kivi2"])
def test_a_thousand_rounds_of_crop_and_append_change_no_kept_value(name: str) -> None:
    random = np.random.default_rng(3)
    cache = filled(name, 2, 150, 0)
    sealed_values = 0
    before = [read(cache, b) for b in range(2)]
    for step in range(1000):
        # Mostly a few tokens, as verifying a draft does; now and then past several pages.
        cuts = [int(random.integers(0, 200 if random.random() < 0.05 else 9)) for _ in range(2)]
        lengths = [max(cache.tokens(b) - cut, 0) for b, cut in enumerate(cuts)]
        cache.crop(lengths)
        for b, length in enumerate(lengths):
            assert cache.tokens(b) == length
            assert np.array_equal(read(cache, b), before[b][:, :, :length])
        final = [fixed(cache, b) for b in range(2)]
        new = numbers(2, 150 if min(lengths) < 40 else int(random.integers(0, 10)), step)
        cache.append(*new)
        for b, length in enumerate(lengths):
            now, end = read(cache, b), fixed(cache, b)
            assert cache.tokens(b) == length + new.shape[3]
            assert np.array_equal(now[:, :, : final[b]], before[b][:, :, : final[b]])
            # What is in no page yet is what came in.
            exact = np.concatenate([before[b][:, :, :length], new[:, b].view(np.uint32)], axis=2)
            assert np.array_equal(now[:, :, end:], exact[:, :, end:])
            sealed_values += end - final[b]
            before[b] = now
    assert sealed_values > 1000, "the rounds sealed next to nothing"
    held = {row for b in range(2) for row, _ in cache.core.table(b)}
    assert cache.core.free_rows == cache.core.rows - len(held), "a row leaked"


@pytest.mark.parametrize("how", [LayerCache.fork, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("name", ["nqkv4", "nqkv"])
def test_a_fork_and_its_origin_go_their_own_ways(name: str, how: Any) -> None:
    origin, twin, other = (filled(name, 2, 150, 1) for _ in range(3))
    pages = [x.tobytes() for x in origin.pool]
    fork = how(origin)
    assert bits(fork) == bits(origin) and fork.core.rows == 0
    assert [x.tobytes() for x in fork.pool] == pages
    for step in range(40):
        a, b = numbers(2, 7, 100 + step), numbers(2, 7, 200 + step)
        origin.append(*a)
        fork.append(*b)
        twin.append(*a)
        other.append(*b)
    assert bits(origin) == bits(twin)
    assert bits(fork) == bits(other)
    kept = bits(fork)
    origin.reset()
    del origin
    assert bits(fork) == kept, "the fork keeps alive what it shares"


@pytest.mark.parametrize("name", ["nqkv4", "nqkv"])
def test_split_and_join_are_inverse(name: str) -> None:
    cache = filled(name, 4, 150, 2)
    cache.crop([150, 3, 80, 0])
    before = bits(cache)
    parts = cache.split([1, 0, 2, 1])
    assert [p.core.batch for p in parts] == [1, 0, 2, 1]
    assert [x for p in parts for x in bits(p)] == before
    joined = LayerCache.join(parts)
    assert bits(joined) == before
    assert [joined.core.table(b) for b in range(4)] == [cache.core.table(b) for b in range(4)]
    joined.append(*numbers(4, 90, 3))
    parts[0].append(*numbers(1, 90, 4))
    assert bits(cache) == before
    assert [x for p in parts[1:] for x in bits(p)] == before[1:]
    cache.append(*numbers(4, 90, 3))
    assert bits(joined) == bits(cache), "joined, it goes on as if it had never been split"


def test_join_takes_one_cache_twice_and_caches_of_all_lengths() -> None:
    a, b = filled("nqkv4", 1, 150, 5), filled("nqkv4", 2, 5, 6)
    joined = LayerCache.join(x for x in (a, b, a))
    assert bits(joined) == bits(a) + bits(b) + bits(a)
    assert joined.core.table(0) == joined.core.table(3), "the same rows"
    q = np.ones((4, 4, 1, 16), np.float32)
    got = joined.attend(q)
    parts = [x.attend(q[: x.core.batch]) for x in (a, b, a)]
    np.testing.assert_array_equal(got, np.concatenate(parts))


def test_select_repeats_without_new_rows_and_each_copy_goes_its_own_way() -> None:
    cache = filled("nqkv", 2, 150, 7)
    before, rows = bits(cache), cache.core.rows
    cache.select([1, 0, 1])
    assert bits(cache) == [before[1], before[0], before[1]] and cache.core.rows == rows
    cache.append(*numbers(3, 20, 8))
    for b, old in enumerate([1, 0, 1]):
        kept = np.frombuffer(before[old], np.uint32).reshape(2, 2, 150, 16)
        np.testing.assert_array_equal(read(cache, b)[:, :, :150], kept)
    assert bits(cache)[0] != bits(cache)[2]
    cache.select([])
    assert cache.core.batch == 0 and cache.core.free_rows == cache.core.rows
