"""Wrong calls of crop, select, split, join, pools and plain numbers: named, and nothing changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from real import everything

import nqkv_rs
from nqkv_rs import LayerCache, Scheme, Side

HEADS, DIM = 2, 16


def numbers(batch: int, tokens: int) -> np.ndarray:
    random = np.random.default_rng(tokens)
    return random.standard_normal((batch, HEADS, tokens, DIM)).astype(np.float32)


def made(tokens: int = 150, batch: int = 2, **more: Any) -> LayerCache:
    cache = LayerCache(**{"kv_heads": HEADS, "key_dim": DIM, "batch": batch, **more})
    cache.append(numbers(batch, tokens), numbers(batch, tokens))
    return cache


def pool(cache: LayerCache, rows: int = 2, dtype: Any = np.uint8) -> np.ndarray:
    return np.zeros((rows, HEADS, cache.core.page_bytes), dtype)


def frozen(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


def twice(cache: LayerCache) -> None:
    """Rows in the middle of memory that another cache was given."""
    rows = pool(cache, 3)
    other = LayerCache(kv_heads=HEADS, key_dim=DIM)
    other.core.add_rows(rows)
    other.append(numbers(1, 200), numbers(1, 200))
    cache.core.add_rows(rows[1:2])


class Shaped:
    """Nothing but a shape."""

    def __init__(self, *shape: Any) -> None:
        self.shape = shape


Q = np.ones((2, 4, 1, DIM), np.float32)
META = torch.ones(2, 2, 7, DIM, device="meta")
Row = tuple[str, Callable[[LayerCache], Any], type[Exception], str]

CROP: list[Row] = [
    ("none", lambda c: c.crop(None), TypeError, r"lengths: expected a whole number, got None"),
    ("text", lambda c: c.crop("12"), TypeError, r"lengths: .*got '1' \(str\)"),
    ("object", lambda c: c.crop(object()), TypeError, r"lengths: .*<object"),
    ("0.5", lambda c: c.crop(0.5), TypeError, r"lengths: .*got 0\.5"),
    ("NaN", lambda c: c.crop(float("nan")), TypeError, r"lengths: .*got nan"),
    ("array of floats", lambda c: c.crop(np.ones(2)), TypeError, r"lengths: .*1\.0"),
    ("-1", lambda c: c.crop(-1), ValueError, r"lengths: expected at least 0, got -1"),
    ("second -1", lambda c: c.crop([3, -1]), ValueError, r"lengths: .*got -1"),
    ("more", lambda c: c.crop(151), ValueError, r"lengths\[0\]: .*at most 150 .*got 151"),
    ("second more", lambda c: c.crop([0, 151]), ValueError, r"lengths\[1\]: .*got 151"),
    ("one length", lambda c: c.crop([3]), ValueError, r"lengths: expected shape \[2\].*\[1\]"),
    ("no length", lambda c: c.crop([]), ValueError, r"lengths: expected shape \[2\].*\[0\]"),
    ("2**63", lambda c: c.crop(2**63), ValueError, r"lengths: .*got 9223372036854775808"),
    ("2**70", lambda c: c.crop([0, 2**70]), ValueError, r"lengths: .*got 1180591620717411303424"),
    ("nested", lambda c: c.crop([[1], [2]]), TypeError, r"lengths: .*got \[1\]"),
    ("meta", lambda c: c.crop(META), (TypeError, RuntimeError), r"lengths|meta"),
]

SELECT: list[Row] = [
    ("none", lambda c: c.select(None), TypeError, r"sequences: expected whole numbers, got None"),
    ("3", lambda c: c.select(3), TypeError, r"sequences: expected whole numbers, got 3"),
    ("text", lambda c: c.select("0"), TypeError, r"sequences: .*got '0'"),
    ("0.0", lambda c: c.select([0.0]), TypeError, r"sequences: .*got 0\.0"),
    ("-1", lambda c: c.select([0, -1]), ValueError, r"sequences: .*got -1"),
    ("2", lambda c: c.select([0, 2]), ValueError, r"sequence index: expected 0 to 1, got 2"),
    ("2**70", lambda c: c.select([2**70]), ValueError, r"sequences: .*got 1180591620717411303424"),
]

SPLIT: list[Row] = [
    ("none", lambda c: c.split(None), TypeError, r"sizes: expected whole numbers, got None"),
    ("2", lambda c: c.split(2), TypeError, r"sizes: expected whole numbers, got 2"),
    ("empty", lambda c: c.split([]), ValueError, r"sizes: expected a sum of 2 .*got \[\]"),
    ("too many", lambda c: c.split([1, 2]), ValueError, r"sizes: .*got \[1, 2\]"),
    ("negative", lambda c: c.split([3, -1]), ValueError, r"sizes: expected at least 0, got -1"),
    ("2**70", lambda c: c.split([2**70]), ValueError, r"sizes: .*got 1180591620717411303424"),
    ("0.5", lambda c: c.split([0.5, 1.5]), TypeError, r"sizes: .*got 0\.5"),
    ("fork", lambda c: c.fork(3), TypeError, r"fork\(\) takes 1 positional"),
]

JOIN: list[Row] = [
    ("none", lambda c: LayerCache.join(None), TypeError, r"caches: .*got NoneType"),
    ("a cache", lambda c: LayerCache.join(c), TypeError, r"caches: expected several LayerCache"),
    ("empty", lambda c: LayerCache.join([]), ValueError, r"caches to join: .*at least one, got 0"),
    ("text", lambda c: LayerCache.join([c, "c"]), TypeError, r"caches: .*got builtins\.str"),
    ("core", lambda c: LayerCache.join([c.core]), TypeError, r"got nqkv_rs\._core\.LayerCache"),
    (
        "dim",
        lambda c: LayerCache.join([c, LayerCache(kv_heads=2, key_dim=32)]),
        ValueError,
        r"32 and 32",
    ),
    ("scheme", lambda c: LayerCache.join([c, made(scheme="nqkv")]), ValueError, r"schemes differ"),
    (
        "dtype",
        lambda c: LayerCache.join([c, made(exact_dtype="float16")]),
        ValueError,
        r"cache 1 to join: .*float32\), got .*float16",
    ),
]

POOL: list[Row] = [
    ("none", lambda c: c.core.add_rows(None), TypeError, r"pool: .*got NoneType"),
    ("bytes", lambda c: c.core.add_rows(b"123"), TypeError, r"pool: .*got bytes"),
    ("read-only", lambda c: c.core.add_rows(frozen(pool(c))), TypeError, r"pool: .*read-only"),
    ("floats", lambda c: c.core.add_rows(pool(c, 2, "f4")), TypeError, r"pool: .*uint8"),
    ("signed", lambda c: c.core.add_rows(pool(c, 2, "i1")), TypeError, r"pool: .*int8"),
    ("strides", lambda c: c.core.add_rows(pool(c, 4)[::2]), TypeError, r"pool: .*contiguous"),
    ("backwards", lambda c: c.core.add_rows(pool(c, 4)[::-1]), TypeError, r"pool: .*contiguous"),
    ("2-D", lambda c: c.core.add_rows(pool(c)[0]), ValueError, r"pool: expected shape \[rows, 2"),
    ("0-D", lambda c: c.core.add_rows(np.array(0, "u1")), ValueError, r"pool: .*got \[\]"),
    ("short page", lambda c: c.core.add_rows(pool(c)[..., 1:].copy()), ValueError, r"pool: "),
    (
        "one row for all",
        lambda c: c.core.add_rows(np.broadcast_to(pool(c, 1), pool(c, 9).shape)),
        TypeError,
        r"pool: expected a (contiguous|writable)",
    ),
    ("meta", lambda c: c.core.add_rows(META), TypeError, r"pool: .*host memory.*meta"),
    ("its own", lambda c: c.core.add_rows(c.pool[0]), ValueError, r"pool: .*no cache holds"),
    ("part of its own", lambda c: c.core.add_rows(c.pool[0][1:]), ValueError, r"pool: .*overlaps"),
    ("another's", twice, ValueError, r"pool: expected memory that no cache holds, got memory that"),
    ("too few", lambda c: c.core.add_rows(pool(c), 3), ValueError, r"at least 3 rows, got 2 rows"),
]

NUMBERS: list[Row] = [
    ("tokens none", lambda c: c.tokens(None), TypeError, r"sequence: .*got None"),
    ("tokens 2**70", lambda c: c.tokens(2**70), ValueError, r"sequence: .*got 118059"),
    ("scale text", lambda c: c.attend(Q, scale="1"), TypeError, r"scale: .*number, got '1'"),
    ("scale 1j", lambda c: c.attend(Q, scale=1j), TypeError, r"scale: .*number, got 1j"),
    ("scale huge", lambda c: c.attend(Q, scale=10**400), ValueError, r"scale: .*fits in float64"),
    ("cap object", lambda c: c.attend(Q, soft_cap=object()), TypeError, r"soft_cap: .*number"),
    ("cap huge", lambda c: c.attend(Q, soft_cap=10**400), ValueError, r"soft_cap: .*fits"),
    ("cap inf", lambda c: c.attend(Q, soft_cap=float("inf")), ValueError, r"soft_cap: .*inf"),
    ("window 2**70", lambda c: c.attend(Q, window=2**70), ValueError, r"window: .*got 118059"),
    ("starts 2**70", lambda c: c.attend(Q, starts=[0, 2**70]), ValueError, r"starts: .*118059"),
    ("starts 0-D", lambda c: c.attend(Q, starts=np.array(3)), TypeError, r"starts: .*array\(3\)"),
    (
        "queries without end",
        lambda c: c.attend(np.broadcast_to(np.float32(0), (2, 4, 2**40, DIM))),
        ValueError,
        r"queries: expected at most 150 .*got 1099511627776",
    ),
    ("q shape", lambda c: c.attend(Shaped(2, 4, -1, DIM)), ValueError, r"q\.shape: .*got -1"),
    ("q text", lambda c: c.attend(Shaped(2, 4, "x", DIM)), TypeError, r"q\.shape: .*got 'x'"),
    ("q only", lambda c: c.attend(Shaped(2, 4, 1, DIM)), TypeError, r"q: .*__dlpack__.*Shaped"),
    (
        "k only",
        lambda c: c.append(Shaped(2, 2, 2**70, 1), Q),
        TypeError,
        r"k: .*__dlpack__.*Shaped",
    ),
    (
        "read beyond",
        lambda c: c.core.read(0, 149, *np.zeros((2, HEADS, 2, DIM), "f4")),
        ValueError,
        r"token range: expected inside 0\.\.150, got 149\.\.151",
    ),
    (
        "no heads, no end",
        lambda c: c.attend(np.empty((2, 2**40, 0, DIM), "f4")[:, :3]),
        ValueError,
        r"q_heads: .*multiple of 2 .*got 3",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(*row[1:], id=f"{name} {row[0]}")
        for name, table in (
            ("crop", CROP),
            ("select", SELECT),
            ("split", SPLIT),
            ("join", JOIN),
            ("pool", POOL),
            ("", NUMBERS),
        )
        for row in table
    ],
)
def test_a_refused_call_changes_nothing(
    call: Callable[[LayerCache], Any], error: Any, message: str
) -> None:
    cache = made()
    before = everything(cache)
    with pytest.raises(error, match=message):
        call(cache)
    assert everything(cache) == before
    cache.append(numbers(2, 70), numbers(2, 70))
    assert [cache.tokens(b) for b in range(2)] == [220, 220]


def raising(rows: int, heads: int, size: int) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("allocate", "error", "message"),
    [
        (raising, OSError, r"No space left"),
        (lambda *shape: "rows", TypeError, r"pool: .*got str"),
        (
            lambda *shape: np.zeros(shape, "u1")[:-1],
            ValueError,
            r"pool: .*at least \d rows, got \d",
        ),
        (lambda *shape: np.zeros(shape, "u1").T, ValueError, r"pool: expected shape"),
        (lambda *shape: frozen(np.zeros(shape, "u1")), TypeError, r"pool: .*read-only"),
        (lambda *shape: torch.zeros(shape, dtype=torch.int8), TypeError, r"pool: .*int8"),
        (lambda *shape: torch.zeros(shape, device="meta"), TypeError, r"pool: .*meta"),
        (lambda rows: None, TypeError, r"takes 1 positional argument"),
        ("what another cache has", ValueError, r"pool: .*no cache holds"),
    ],
)
@pytest.mark.parametrize("tokens", [0, 90])
def test_an_allocator_that_fails_changes_nothing(
    tokens: int, allocate: Any, error: Any, message: str
) -> None:
    held = LayerCache(kv_heads=HEADS, key_dim=DIM)
    rows = pool(held, 4)
    held.core.add_rows(rows)
    if isinstance(allocate, str):
        allocate = lambda *shape: rows  # noqa: E731
    cache = LayerCache(kv_heads=HEADS, key_dim=DIM, allocate=allocate)
    cache.append(numbers(1, tokens), numbers(1, tokens))
    before = everything(cache)
    with pytest.raises(error, match=message):
        cache.append(numbers(1, 100), numbers(1, 100))
    assert everything(cache) == before


def test_memory_that_a_cache_gave_back_may_be_given_again() -> None:
    cache = LayerCache(kv_heads=HEADS, key_dim=DIM)
    rows = pool(cache)
    cache.core.add_rows(rows)
    cache.append(numbers(1, 200), numbers(1, 200))
    fork = cache.fork()
    del cache
    other = LayerCache(kv_heads=HEADS, key_dim=DIM)
    with pytest.raises(ValueError, match=r"pool: .*no cache holds"):
        other.core.add_rows(rows)
    del fork
    other.core.add_rows(rows)
    other.append(numbers(1, 200), numbers(1, 200))
    # Beside each other in one piece of memory is no overlap, and no rows are none.
    both = pool(other, 4)
    for part in (both[:2], both[2:], both[:0]):
        LayerCache(kv_heads=HEADS, key_dim=DIM).core.add_rows(part)
        other.core.add_rows(part)


FIELDS: dict[str, Any] = json.loads(Scheme.preset("nqkv4").to_json())
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]
CIRCLE: dict[str, Any] = {}
CIRCLE["key"] = CIRCLE


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Scheme.of(None), TypeError, r"scheme: expected a preset's name.*NoneType"),
        (lambda: Scheme.of(""), ValueError, r"scheme: expected one of nqkv4"),
        (lambda: Scheme.of(b"nqkv4"), TypeError, r"scheme: .*got bytes"),
        (lambda: Scheme.of({**FIELDS, "name": object()}), TypeError, r"scheme: .*type object"),
        (lambda: Scheme.of({**FIELDS, "sink_tokens": np.nan}), ValueError, r"scheme: .*finite"),
        (lambda: Scheme.of({**FIELDS, "sink_tokens": -1}), ValueError, r"`-1`"),
        (lambda: Scheme.of({**FIELDS, "sink_tokens": 2**70}), ValueError, r"scheme: "),
        (lambda: Scheme.of({**FIELDS, "key": DEEP}), ValueError, r"scheme: .*nesting"),
        (lambda: Scheme.of(CIRCLE), ValueError, r"scheme: .*Circular"),
        (lambda: Scheme.of("nqkv4", nbits=2**70), ValueError, r"nbits: expected 1 to 8"),
        (lambda: Scheme.of("nqkv4", nbits=0), ValueError, r"nbits: expected 1 to 8, got 0"),
        (lambda: Scheme.of("nqkv4", residual_length=2**63), ValueError, r"residual_length: "),
        (lambda: Scheme.of("nqkv4", residual_length="8"), TypeError, r"residual_length: .*'8'"),
        (lambda: Scheme.of("nqkv4", sink_tokens=-1), ValueError, r"sink_tokens: .*got -1"),
        (lambda: Scheme.of("nqkv4", skip_layers="01"), TypeError, r"skip_layers: .*'01'"),
        (lambda: Scheme.of("nqkv4", skip_layers={0}), TypeError, r"skip_layers: .*\{0\}"),
        (lambda: Scheme.of("nqkv4", skip_layers=[2**70]), ValueError, r"skip_layers: "),
        (lambda: Scheme.of("nqkv4", skip_layers=[None]), TypeError, r"skip_layers: .*None"),
        (lambda: Scheme.preset(3), TypeError, r"preset: expected a str, got int"),
        (lambda: Scheme.from_json(None), TypeError, r"text: expected a str, got NoneType"),
        (lambda: Scheme.from_json(b"{}"), TypeError, r"text: expected a str, got bytes"),
        (lambda: Scheme.from_json("\ud800"), ValueError, r"surrogates"),
        (lambda: Scheme.from_json("[" * 10**5), ValueError, r"scheme: "),
        (lambda: Scheme.from_json('{"a":' * 10**5), ValueError, r"scheme: "),
        (lambda: Side(codebook=object(), axis="channel", block=64), None, ""),
        (lambda: nqkv_rs.quantize(Shaped("a")), TypeError, r"x\.shape: .*got 'a'"),
        (lambda: nqkv_rs.quantize(Shaped(-1)), ValueError, r"x\.shape: .*got -1"),
        (lambda: nqkv_rs.quantize(Shaped(2**70)), ValueError, r"x\.shape: .*got 118059"),
        (lambda: nqkv_rs.quantize(Shaped(64)), TypeError, r"x: .*__dlpack__.*Shaped"),
        (lambda: nqkv_rs.quantize(Q, [0, 10**400]), ValueError, r"codebook: .*finite"),
        (lambda: nqkv_rs.quantize(Q, flat="yes"), TypeError, r"flat: .*got 'yes'"),
        (lambda: nqkv_rs.quantize(Q, order=1), TypeError, r"order: .*got 1"),
        (lambda: made(exact_dtype=None), TypeError, r"exact_dtype: .*got None"),
        (lambda: made(exact_dtype=torch.float32), TypeError, r"exact_dtype: .*torch\.float32"),
        (lambda: made(kv_heads=2**70), ValueError, r"kv_heads: expected 1 to 4096"),
    ],
)
def test_a_value_that_cannot_be_is_named(make: Callable[[], Any], error: Any, message: str) -> None:
    if error is None:
        # Not checked by itself, but by the scheme that it becomes part of.
        with pytest.raises(TypeError, match=r"scheme: .*type object"):
            Scheme(key=make(), value=Scheme.preset("nqkv4").value)
        return
    with pytest.raises(error, match=message):
        make()
