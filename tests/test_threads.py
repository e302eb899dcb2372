"""Threads: on caches of their own they get what one thread gets; on one cache they see whole calls.

Nothing here asserts a time. Results are compared with those of one thread, and what several threads
did to one cache with what some order of their calls would have given.
"""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nqkv_rs
from nqkv_rs import LayerCache, Scheme

HEADS, DIM = 2, 16


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Threads change places often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls, each in a thread of its own, started at once; raises what they raise."""
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def run(i: int) -> None:
        try:
            start.wait()
            results[i] = calls[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        # Far beyond what the slowest machine needs: only a deadlock gets there.
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return results


def numbers(tokens: int, seed: int, batch: int = 1) -> np.ndarray:
    shape = (2, batch, HEADS, tokens, DIM)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def made(scheme: str = "nqkv4", batch: int = 1) -> LayerCache:
    # "nqkv" has no window at all; a short one for the others, so that few tokens fill pages.
    recipe = scheme if scheme == "nqkv" else Scheme.of(scheme, residual_length=8)
    return LayerCache(recipe, kv_heads=HEADS, key_dim=DIM, batch=batch)


def read(cache: LayerCache, b: int = 0) -> list[np.ndarray]:
    out = [np.empty((HEADS, cache.tokens(b), DIM), np.float32) for _ in range(2)]
    cache.core.read(b, 0, *out)
    return out


def bits(cache: LayerCache) -> list[bytes]:
    return [x.tobytes() for b in range(cache.core.batch) for x in read(cache, b)]


def a_day(seed: int, scheme: str) -> list[bytes]:
    """A life of one cache with every operation in it."""
    cache = made(scheme)
    results: list[bytes] = []
    for step in range(60):
        cache.append(*numbers(1 + 13 * (step % 4), seed + step))
        results.append(cache.attend(np.ones((1, 2 * HEADS, 1, DIM), np.float32)).tobytes())
        if step % 7 == 6:
            cache.crop(cache.tokens() - 5)
        if step % 11 == 10:
            cache = LayerCache.join([cache.fork()])
    return results + bits(cache)


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
def test_two_threads_on_two_caches_get_what_one_gets(scheme: str) -> None:
    alone = [a_day(seed, scheme) for seed in (0, 1000)]
    assert together(*(lambda s=s: a_day(s, scheme) for s in (0, 1000))) == alone


def test_two_threads_on_one_cache_see_whole_calls() -> None:
    cache = made("nqkv")
    # Tokens of one call carry one number: those of a call stand together, or it was no whole call.
    rounds, size = 150, 5
    done = threading.Event()

    def append(who: int) -> None:
        for i in range(rounds):
            x = np.full((1, HEADS, size, DIM), 1 + who * rounds + i, np.float32)
            cache.append(x, x)

    def writers() -> None:
        together(lambda: append(0), lambda: append(1))
        done.set()

    def look() -> int:
        looks = before = 0
        while not done.is_set() or looks == 0:
            tokens = cache.tokens()
            assert tokens >= before and tokens % size == 0, tokens
            memory = cache.memory()
            assert memory["total"] == sum(memory[x] for x in ("codes", "scales", "tail", "sinks"))
            if tokens:
                out = cache.attend(np.zeros((1, HEADS, 1, DIM), np.float32))
                assert np.isfinite(out).all()
                k, v = np.empty((2, HEADS, tokens, DIM), np.float32)
                cache.core.read(0, 0, k, v)
                assert np.array_equal(k, v)
            before = tokens
            looks += 1
        return looks

    together(writers, look, look)
    assert cache.tokens() == 2 * rounds * size
    # Blocks of one number are exact: the largest magnitude is its scale, in fp16.
    k = read(cache)[0][0, :, 0].reshape(2 * rounds, size)
    assert (k == k[:, :1]).all(), "tokens of two calls stand among each other"
    assert sorted(k[:, 0]) == list(range(1, 2 * rounds + 1)), "a call was lost or came twice"
    first = [x for x in k[:, 0] if x <= rounds]
    assert first == sorted(first), "the calls of one thread keep their order"
    assert cache.core.free_rows == cache.core.rows - len(cache.core.table(0))


def test_every_operation_on_one_cache_at_once_leaves_it_whole() -> None:
    cache = made("nqkv4", batch=2)
    # More than all that is taken away, whoever comes first.
    cache.append(*numbers(200, 0, 2))

    def grow() -> None:
        for step in range(80):
            cache.append(*numbers(7, step, 2))

    def shrink() -> None:
        for _ in range(40):
            cache.core.remove_newest(3)
            cache.select([1, 0])

    def fork() -> None:
        for _ in range(40):
            parts = cache.split([1, 1])
            assert len({p.tokens() for p in parts}) >= 1
            joined = LayerCache.join([*parts, cache])
            assert joined.core.batch == 4
            bits(joined)

    together(grow, shrink, fork, lambda: [gc.collect() for _ in range(8)])
    assert [cache.tokens(b) for b in range(2)] == [200 + 80 * 7 - 40 * 3] * 2
    held = {row for b in range(2) for row, _ in cache.core.table(b)}
    assert cache.core.free_rows == cache.core.rows - len(held), "a row leaked"


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
def test_forks_are_used_in_other_threads_while_the_origin_appends(scheme: str) -> None:
    cache = made(scheme)
    cache.append(*numbers(150, 0))
    forks = [cache.fork() for _ in range(2)]

    def extend(x: LayerCache, seed: int) -> tuple[list[bytes], np.ndarray]:
        for step in range(60):
            x.append(*numbers(5, seed + step))
        return bits(x), x.attend(np.ones((1, HEADS, 1, DIM), np.float32))

    got = together(*(lambda x=x, s=s: extend(x, s) for s, x in enumerate([cache, *forks])))
    for seed, result in enumerate(got):
        alone = made(scheme)
        alone.append(*numbers(150, 0))
        expected = extend(alone, seed)
        assert result[0] == expected[0]
        # A fork starts a page of its own, so sums may be taken in another order.
        np.testing.assert_allclose(result[1], expected[1], rtol=0, atol=1e-3)


def test_save_join_and_split_while_another_thread_appends(tmp_path: Path) -> None:
    cache = made("nqkv")
    cache.append(*numbers(50, 0))
    done = threading.Event()

    def append() -> None:
        for step in range(200):
            cache.append(*numbers(3, 1 + step))
        done.set()

    def save(name: str) -> list[Any]:
        seen = []
        while not done.is_set() or not seen:
            cache.save(tmp_path / name)
            # Two threads save to one path: what is loaded may be the other's, but is whole.
            loaded = LayerCache.load(tmp_path / name)
            assert (loaded.tokens() - 50) % 3 == 0
            seen.append([x.tobytes() for x in read(loaded)] + [loaded.tokens()])
            seen = seen[-3:]
        return seen

    def join() -> list[Any]:
        seen = []
        while not done.is_set() or not seen:
            joined = LayerCache.join([cache, cache])
            seen.append([x.tobytes() for x in read(joined, 1)] + [joined.tokens(1)])
            seen = seen[-3:]
        return seen

    results = together(append, lambda: save("one"), lambda: save("one"), join)
    final = read(cache)
    for k, v, tokens in itertools.chain(*results[1:]):
        for got, all_tokens in zip((k, v), final, strict=True):
            assert got == np.ascontiguousarray(all_tokens[:, :tokens]).tobytes()
    assert [x.name for x in tmp_path.iterdir()] == ["one"], "a part of a file was left behind"


def test_two_threads_quantize_at_once() -> None:
    x = numbers(512, 5)

    def work(codebook: str, seed: int) -> list[bytes]:
        out = []
        for i in range(20):
            q = nqkv_rs.quantize(x + np.float32(seed + i), codebook)
            y = np.asarray(nqkv_rs.dequantize(q))
            out += [q.codes.tobytes(), q.fields.tobytes(), y.tobytes()]
        return out

    plans = [("nf4", 0), ("lloyd3", 7), ("nf4", 9)]
    alone = [work(*plan) for plan in plans]
    assert together(*(lambda p=p: work(*p) for p in plans)) == alone


def test_a_cache_may_end_in_another_thread() -> None:
    pools: list[weakref.ref[Any]] = []

    def allocate(rows: int, heads: int, size: int) -> np.ndarray:
        pool = np.empty((rows, heads, size), np.uint8)
        pools.append(weakref.ref(pool))
        return pool

    shape: dict[str, Any] = {"kv_heads": HEADS, "key_dim": DIM, "allocate": allocate}
    caches = [LayerCache("nqkv", **shape) for _ in range(4)]
    for cache in caches:
        cache.append(*numbers(200, 1))
    forks = [cache.fork() for cache in caches]
    before = bits(forks[0])

    def drop(these: list[LayerCache]) -> None:
        while these:
            these.pop()
            gc.collect()

    del cache
    together(lambda: drop(caches), lambda: [bits(forks[3]) for _ in range(20)])
    assert len(pools) == 4 and all(ref() is not None for ref in pools), "forks keep the pages"
    assert bits(forks[0]) == before
    together(lambda: drop(forks), gc.collect)
    assert [ref() for ref in pools] == [None] * 4


def test_a_finalizer_may_call_the_cache_that_drops_the_memory() -> None:
    said: list[int] = []

    class Pool(np.ndarray):  # type: ignore[type-arg]
        pass

    def allocate(rows: int, heads: int, size: int) -> Any:
        pool = np.empty((rows, heads, size), np.uint8).view(Pool)
        weakref.finalize(pool, lambda: said.append(fork.tokens()))
        return pool

    origin = LayerCache("nqkv", kv_heads=HEADS, key_dim=DIM, allocate=allocate)
    origin.append(*numbers(200, 1))
    fork = origin.fork()
    del origin
    assert said == []
    # The last row of the origin's memory goes inside this call, which must not hold its lock.
    together(fork.reset)
    assert said == [0]


def test_an_allocator_and_a_tensor_may_call_their_cache() -> None:
    seen: list[int] = []

    def allocate(rows: int, heads: int, size: int) -> np.ndarray:
        seen.append(cache.tokens())
        return np.empty((rows, heads, size), np.uint8)

    class Curious(np.ndarray):  # type: ignore[type-arg]
        def __dlpack__(self, **how: Any) -> Any:
            seen.append(cache.tokens())
            return super().__dlpack__(**how)

    cache = LayerCache("nqkv", kv_heads=HEADS, key_dim=DIM, allocate=allocate)
    together(lambda: cache.append(*(x.view(Curious) for x in numbers(200, 1))))
    pool = np.empty((1, HEADS, cache.core.page_bytes), np.uint8)
    together(lambda: cache.core.add_rows(pool.view(Curious)))
    assert cache.tokens() == 200 and len(seen) > 3
