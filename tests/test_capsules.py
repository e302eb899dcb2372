"""DLPack capsules built by hand: what is right is read as NumPy reads it, what is hostile refused.

A capsule that lies about the size of its memory cannot be found out by anybody; every other lie is
in here. `NQKV_FUZZ_INPUTS` is the number of capsules (300 unless set), made from the numbers
that follow `NQKV_FUZZ_SEED`; one that fails is named by its number.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
from collections.abc import Callable
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from capsules import DTYPES, Array, address, alive, deleted

from nqkv_rs import LayerCache, _core

INPUTS = int(os.environ.get("NQKV_FUZZ_INPUTS", "300"))
SEED = int(os.environ.get("NQKV_FUZZ_SEED", "0"))
EXPECTED = (TypeError, ValueError, BufferError, NotImplementedError)


def right(r: Random, least: int = 0) -> Array:
    """A right description of memory, in any order, with steps forwards, backwards and none."""
    name = r.choice(sorted(DTYPES))
    dtype = np.dtype(DTYPES[name][2])
    extents = tuple(r.randint(least, 9) for _ in range(r.randint(least, 5)))
    kinds = r.choices([1, 1, -1, 2, 0], k=5)
    steps, reach, first = [0] * len(extents), 1, 0
    for axis in r.sample(range(len(extents)), len(extents)):
        steps[axis] = reach * kinds[axis]
        if kinds[axis] < 0:
            first += reach * max(extents[axis] - 1, 0)
        reach *= max(extents[axis], 1) * max(abs(kinds[axis]), 1)
    plain = r.random() < 0.5
    if plain:
        steps, first, reach = [], 0, math.prod(max(n, 1) for n in extents)
    lead = r.randint(0, 9)
    at = r.randrange(len(NUMBERS))
    numbers = np.take(NUMBERS, range(at, at + reach), mode="wrap").astype(dtype)
    memory = np.frombuffer(bytes(lead) + numbers.tobytes(), np.uint8).copy()
    return Array(
        memory,
        name,
        extents,
        None if plain else tuple(steps),
        lead + first * dtype.itemsize,
        r.choice([None, 0, 1, 9, 2**32 - 1]),
        r.choice([0, 1, 2, 4, 2**63]),
    )


NUMBERS = np.random.default_rng(0).standard_normal(65537)


def replaced(x: tuple[int, ...], value: int) -> Any:
    """The address of ``x`` with another last entry, kept: a hostile description needs it."""
    kept.append((ctypes.c_int64 * len(x))(*x[:-1], value))
    return address(kept[-1])


kept: list[Any] = []
# Of any element type: the last one only for extents, whose product counts.
HUGE = (2**63 - 1, 2**62, 2**61)
NAMES = (b"used_dltensor", b"used_dltensor_versioned", b"DLTENSOR", b"", b"x" * 4096)
DEVICES = ((2, 0), (0, 0), (2**31, 0), (2**70, 0), (-1, 0), (1,), (1, 0, 0), None, "1")
# What is wrong, and how an array of at least one dimension, no extent below 2, becomes so.
LIES: list[tuple[str, Callable[[Array, Random], dict[str, Any]]]] = [
    ("code", lambda a, r: {"code": r.choice([0, 3, 5, 6, 7, 17, 255])}),
    ("bits", lambda a, r: {"bits": r.choice([0, 1, 4, 8, 24, 128, 255])}),
    ("uint8", lambda a, r: {"code": 1, "bits": 8}),
    ("lanes", lambda a, r: {"lanes": r.choice([0, 2, 4, 65535])}),
    (
        "device",
        lambda a, r: {"device_type": r.choice([0, 2, 3, 10, -1, 2**31 - 1])},
    ),
    ("ndim", lambda a, r: {"ndim": r.choice([-1, 65, 2**31 - 1, -(2**31)])}),
    ("NULL shape", lambda a, r: {"shape": None}),
    ("NULL data", lambda a, r: {"data": None}),
    (
        "offset",
        lambda a, r: {"byte_offset": r.choice([2**63, 2**64 - 1, 2**62 * 3])},
    ),
    (
        "extent",
        lambda a, r: {"shape": replaced(a.extents, r.choice([-1, -(2**63), *HUGE]))},
    ),
    (
        "stride",
        lambda a, r: {"strides": replaced(a.steps or a.extents, r.choice([-(2**63), *HUGE[:2]]))},
    ),
    ("major", lambda a, r: {"major": r.choice([0, 2, 3, 2**32 - 1])}),
    (
        "name",
        lambda a, r: {
            "name": r.choice(
                [b"used_dltensor", b"used_dltensor_versioned", b"DLTENSOR", b"", b"x" * 4096]
            )
        },
    ),
    (
        "returns",
        lambda a, r: {"returns": r.choice([None, 3, "dltensor", b"", object(), ()])},
    ),
    (
        "says",
        lambda a, r: {
            "says": r.choice(
                [(2, 0), (0, 0), (2**31, 0), (2**70, 0), (-1, 0), (1,), (1, 0, 0), None, "1"]
            )
        },
    ),
]


RAISED = (RuntimeError, KeyError, MemoryError, BufferError, TypeError, StopIteration, OSError)
LIES += [
    (f"{what} raises", lambda a, r, what=what: {what: r.choice(RAISED)("x")})
    for what in ("returns", "says")
]


def hostile(r: Random) -> Array:
    array = right(r, least=2)
    lie, change = r.choice(LIES)
    if lie == "major" and array.minor is None:
        array.minor = 0
    array.change = change(array, r)
    return array


def each(make: Callable[[Random], Array], count: int, check: Callable[[Array], None]) -> None:
    """Checks so many; one that fails is named."""
    for number in range(SEED, SEED + max(count, 1)):
        array = make(Random(number))
        try:
            check(array)
        except BaseException:
            print(f"failed on {make.__name__}(Random({number})): {array}")
            raise


def quantized(x: Any, extents: tuple[int, ...]) -> list[bytes]:
    sizes = _core.quantized_sizes(extents, "nf4", 16, "absmax", "fp32", False)
    out = [np.zeros(n, np.uint8) for n in sizes]
    _core.quantize(x, *out, "nf4", 16, "absmax", "fp32", False, "low")
    return [y.tobytes() for y in out]


def settled(array: Array) -> None:
    """Every capsule was deleted, once."""
    assert array.made or array.change.keys() & {"returns", "says"}
    for at in array.made:
        assert deleted.pop(at, 0) == 1 and at not in alive


def test_a_right_capsule_is_read_as_numpy_reads_it() -> None:
    def check(array: Array) -> None:
        x = np.array(array.numpy(), order="C")
        assert quantized(array, array.extents) == quantized(x, array.extents)
        settled(array)

    each(right, INPUTS // 2, check)


def test_a_hostile_capsule_is_refused_by_name() -> None:
    def check(array: Array) -> None:
        with pytest.raises(EXPECTED, match="x: ") as caught:
            quantized(array, array.extents)
        assert type(caught.value) in EXPECTED
        # Its traceback holds what it came through.
        del caught
        kept.clear()
        settled(array)

    each(hostile, INPUTS // 2, check)


def of(x: np.ndarray, **more: Any) -> Array:
    return Array(x.reshape(-1).view(np.uint8), "float32", x.shape, **more)


def filled() -> LayerCache:
    cache = LayerCache("nqkv4", kv_heads=2, key_dim=16)
    x = np.random.default_rng(1).standard_normal((1, 2, 150, 16)).astype(np.float32)
    cache.append(x, x)
    return cache


def test_a_refused_capsule_leaves_a_cache_as_it_was() -> None:
    cache = filled()
    q, good = np.ones((1, 2, 1, 16), np.float32), np.ones((1, 2, 3, 16), np.float32)

    def state() -> Any:
        return cache.attend(q).tobytes(), cache.memory(), cache.core.table(0)

    before = state()

    def check(array: Array) -> None:
        for call in (
            lambda: cache.append(array, good),
            lambda: cache.append(good, array),
            lambda: cache.attend_into(array, np.empty((1, 1, 2, 16), "f4"), None),
            lambda: cache.attend_into(q, array, None),
            lambda: cache.core.add_rows(array),
            lambda: _core.SavedCache(array),
        ):
            with pytest.raises(EXPECTED):
                call()
            assert state() == before

    each(hostile, INPUTS // 10, check)


@pytest.mark.parametrize("minor", [None, 0, 1, 9])
def test_a_right_capsule_is_every_argument(minor: int | None) -> None:
    one, two = filled(), filled()
    x = np.random.default_rng(2).standard_normal((1, 2, 90, 16)).astype(np.float32)
    one.append(x, x)
    two.append(of(x, minor=minor), of(x, minor=minor))
    out, lse = np.zeros((1, 3, 2, 16), np.float32), np.zeros((1, 3, 2), np.float32)
    q = x[:, :, :3].copy()
    expected = one.attend(q)
    two.attend_into(of(q, minor=minor), of(out, minor=minor), None, lse=of(lse, minor=minor))
    np.testing.assert_array_equal(out, expected)
    assert lse.all()


@pytest.mark.parametrize(("flags", "word"), [(1, "read-only"), (2, "read-only"), (3, "read-only")])
def test_what_is_written_must_not_be_lost(flags: int, word: str) -> None:
    cache, out = filled(), np.zeros((1, 1, 2, 16), np.float32)
    with pytest.raises(TypeError, match=rf"out: expected a writable tensor, got a {word}"):
        cache.attend_into(np.ones((1, 2, 1, 16), "f4"), of(out, flags=flags), None)
    assert not out.any()


def test_a_pool_keeps_its_capsule_as_long_as_its_pages_are_used() -> None:
    made: list[Array] = []

    def allocate(rows: int, heads: int, size: int) -> Array:
        memory = np.zeros(rows * heads * size, np.uint8)
        change = {"code": 1, "bits": 8}
        made.append(Array(memory, "float32", (rows, heads, size), change=change))
        return made[-1]

    cache = LayerCache("nqkv", kv_heads=2, key_dim=16, allocate=allocate)
    x = np.ones((1, 2, 100, 16), np.float32)
    cache.append(x, x)
    fork = cache.fork()
    del cache
    gc.collect()
    assert made[0].made[0] in alive and made[0].memory.any()
    assert fork.attend(np.ones((1, 2, 1, 16), np.float32)).any()
    del fork
    gc.collect()
    settled(made[0])


def test_a_view_of_other_elements_than_it_says_is_refused() -> None:
    class Brain:
        """Says bfloat16, of which ``view`` gives bytes: half as many as would be read."""

        dtype = np.dtype(ml_dtypes.bfloat16)
        shape = (64,)

        def view(self, name: str) -> np.ndarray:
            return np.ones(64, np.uint8)

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

        def __dlpack__(self, **how: Any) -> Any:
            raise AssertionError("must ask the view")

    with pytest.raises(TypeError, match=r"x: expected dtype 16-bit elements"):
        quantized(Brain(), (64,))


def test_what_ends_a_program_passes() -> None:
    for change in ({"returns": KeyboardInterrupt()}, {"says": SystemExit()}):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            quantized(of(np.ones(64, np.float32), change=change), (64,))
