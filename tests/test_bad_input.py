"""Wrong calls: each is refused by the name of what was wrong, and leaves the cache as it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from real import everything

import nqkv_rs
from nqkv_rs import LayerCache, Scheme, Side, _core

HEADS, DIM, TOKENS = 2, 16, 150


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


K = normal(1, HEADS, TOKENS, DIM)
NEW = K[:, :, :7]
Q = normal(1, 4, 3, DIM)
OUT = np.empty((1, 3, 4, DIM), np.float32)


def with_number(x: np.ndarray, value: float) -> np.ndarray:
    x = x.copy()
    x[0, 1, 3, 4] = value
    return x


def frozen(x: np.ndarray) -> np.ndarray:
    return np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)


def grad(*shape: int) -> torch.Tensor:
    return torch.ones(shape, requires_grad=True)


def meta(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="meta")


@pytest.fixture
def cache() -> LayerCache:
    made = LayerCache("nqkv4", kv_heads=HEADS, key_dim=DIM)
    made.append(K, K)
    return made


Row = tuple[str, Callable[[LayerCache], Any], type[Exception], str]

APPEND: list[Row] = [
    ("list", lambda c: c.append([1.0], [1.0]), TypeError, r"k: expected an array .*got list"),
    ("none", lambda c: c.append(None, None), TypeError, r"k: expected an array .*got NoneType"),
    ("3-D", lambda c: c.append(NEW[0], NEW[0]), ValueError, r"k: .*4 dimensions .*\[2, 7, 16\]"),
    ("heads", lambda c: c.append(NEW[:, :1], NEW), ValueError, r"k: .*\[1, 2, 7, 16\], got \[1, 1"),
    ("dim", lambda c: c.append(NEW[..., :8], NEW), ValueError, r"k: .*got \[1, 2, 7, 8\]"),
    ("batch", lambda c: c.append(NEW.repeat(2, 0), NEW), ValueError, r"k: .*got \[2, 2, 7, 16\]"),
    ("tokens", lambda c: c.append(K, NEW), ValueError, r"v: expected shape \[1, 2, 150, 16\]"),
    ("int", lambda c: c.append(NEW.astype(np.int64), NEW), TypeError, r"k: .*got int64"),
    ("bytes", lambda c: c.append(NEW, NEW.astype(np.uint8)), TypeError, r"v: .*got uint8"),
    ("bool", lambda c: c.append(NEW, NEW > 0), TypeError, r"v: .*got bool"),
    ("complex", lambda c: c.append(NEW + 0j, NEW), TypeError, r"k: .*got complex64"),
    ("NaN", lambda c: c.append(K, with_number(K, np.nan)), ValueError, r"v: .*NaN .*index 2452;"),
    (
        "inf",
        lambda c: c.append(with_number(NEW, np.inf), NEW),
        ValueError,
        r"k: .*inf .*index 164;",
    ),
    ("1e300", lambda c: c.append(NEW, np.full(NEW.shape, 1e300)), ValueError, r"v: .*float32"),
    ("meta", lambda c: c.append(meta(*NEW.shape), NEW), TypeError, r"k: .*host memory.*meta"),
    ("grad", lambda c: c.append(NEW, grad(*NEW.shape)), TypeError, r"v: .*v\.detach\(\)"),
]

ATTEND: list[Row] = [
    ("list", lambda c: c.attend([1.0]), TypeError, r"q: expected an array .*got list"),
    ("3-D", lambda c: c.attend(Q[0]), ValueError, r"q: expected .*q_heads.*\(4, 3, 16\)"),
    ("heads", lambda c: c.attend(Q[:, :3]), ValueError, r"q_heads: .*multiple of 2 .*got 3"),
    ("no heads", lambda c: c.attend(Q[:, :0]), ValueError, r"q_heads: .*got 0"),
    ("dim", lambda c: c.attend(Q[..., :8]), ValueError, r"q: .*16\], got \[1, 4, 3, 8\]"),
    ("batch", lambda c: c.attend(Q.repeat(2, 0)), ValueError, r"q: .*got \[2, 4, 3, 16\]"),
    ("many", lambda c: c.attend(normal(1, 4, 151, DIM)), ValueError, r"queries: .*150 .*got 151"),
    ("int", lambda c: c.attend(Q.astype(np.int32)), TypeError, r"q: .*got int32"),
    ("meta", lambda c: c.attend(meta(*Q.shape)), TypeError, r"q: .*host memory.*meta"),
    ("grad", lambda c: c.attend(grad(*Q.shape)), TypeError, r"q: .*q\.detach\(\)"),
    (
        "out shape",
        lambda c: c.attend(Q, out=OUT[:, :2].copy()),
        ValueError,
        r"out: .*\[1, 3, 4, 16",
    ),
    ("out frozen", lambda c: c.attend(Q, out=frozen(OUT)), TypeError, r"out: .*read-only"),
    ("out strides", lambda c: c.attend(Q, out=OUT[..., ::-1]), TypeError, r"out: .*contiguous"),
    ("out int", lambda c: c.attend(Q, out=OUT.astype(int)), TypeError, r"out: .*got int64"),
    ("out list", lambda c: c.attend(Q, out=[1]), TypeError, r"out: .*got list"),
    ("q NaN", lambda c: c.attend(Q * np.nan), ValueError, r"q: .*NaN .*index 0;"),
    (
        "fresh inf",
        lambda c: c.attend(Q, fresh=(NEW[:, :, :3], NEW[:, :, :3] * np.inf)),
        ValueError,
        r"fresh v: .*inf .*index 0;",
    ),
    ("scale", lambda c: c.attend(Q, scale=np.nan), ValueError, r"scale: .*finite.*NaN"),
    ("scale inf", lambda c: c.attend(Q, scale=np.inf), ValueError, r"scale: .*finite.*inf"),
    ("starts", lambda c: c.attend(Q, starts=[0, 0]), ValueError, r"starts: .*\[1\], got \[2\]"),
    ("starts < 0", lambda c: c.attend(Q, starts=[-1]), ValueError, r"starts: .*got -1"),
    ("starts 3", lambda c: c.attend(Q, starts=3), TypeError, r"starts: .*per sequence, got 3"),
    ("starts 0.5", lambda c: c.attend(Q, starts=[0.5]), TypeError, r"starts: .*whole.*0\.5"),
    ("window 0", lambda c: c.attend(Q, window=0), ValueError, r"window: .*at least 1, got 0"),
    ("window 1.5", lambda c: c.attend(Q, window=1.5), TypeError, r"window: .*whole.*1\.5"),
    ("soft cap", lambda c: c.attend(Q, soft_cap=0.0), ValueError, r"soft_cap: .*positive.*got 0"),
    ("soft NaN", lambda c: c.attend(Q, soft_cap=np.nan), ValueError, r"soft_cap: .*NaN"),
    (
        "lse",
        lambda c: c.attend(Q, lse=np.empty((1, 4, 3), "f4")),
        ValueError,
        r"lse: .*\[1, 3, 4\]",
    ),
    ("lse f64", lambda c: c.attend(Q, lse=np.empty((1, 3, 4))), TypeError, r"lse: .*float32"),
    ("fresh", lambda c: c.attend(Q, fresh=3), TypeError, r"fresh: .*pair.*got int"),
    ("fresh 1", lambda c: c.attend(Q, fresh=(NEW, None)), ValueError, r"both or neither"),
    ("fresh n", lambda c: c.attend(Q, fresh=(NEW, NEW)), ValueError, r"fresh k: .*\[1, 2, 3, 16\]"),
]

OTHERS: list[Row] = [
    ("sequence", lambda c: c.tokens(1), ValueError, r"sequence: .*got 1"),
    ("sequence -1", lambda c: c.tokens(-1), ValueError, r"sequence: .*got -1"),
    ("crop", lambda c: c.core.remove_newest(151), ValueError, r"at most 150 .*got 151"),
    ("select", lambda c: c.core.select([0, 5]), ValueError, r"sequence index: .*got 5"),
    (
        "rows",
        lambda c: c.core.add_rows(np.zeros((1, 2, 7), "u1")),
        ValueError,
        r"pool: .*\[1, 2, 7\]",
    ),
    ("rows f4", lambda c: c.core.add_rows(np.zeros((1, 2, 7), "f4")), TypeError, r"pool: .*uint8"),
    (
        "read",
        lambda c: c.core.read(0, 149, K[0, :, :2].copy(), K[0, :, :2].copy()),
        ValueError,
        "150",
    ),
    (
        "read far",
        lambda c: c.core.read(0, 2**64 - 1, *[K[0, :, :1].copy()] * 2),
        ValueError,
        "start",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(*r[1:], id=f"{n} {r[0]}")
        for n, t in (("append", APPEND), ("attend", ATTEND), ("", OTHERS))
        for r in t
    ],
)
def test_a_refused_call_leaves_the_cache_as_it_was(
    cache: LayerCache, call: Callable[[LayerCache], Any], error: type[Exception], message: str
) -> None:
    before = everything(cache)
    with pytest.raises(error, match=message):
        call(cache)
    assert everything(cache) == before
    cache.append(NEW, NEW)
    assert cache.tokens() == TOKENS + 7


@pytest.mark.parametrize("scheme", nqkv_rs.presets())
def test_every_preset_survives_a_refused_append(scheme: str) -> None:
    cache = LayerCache(scheme, kv_heads=HEADS, key_dim=64)
    k = normal(1, HEADS, 300, 64)
    cache.append(k, k)
    before = everything(cache)
    for bad in (with_number(k, np.nan), k[..., :32], k.astype(int)):
        with pytest.raises((ValueError, TypeError)):
            cache.append(k, bad)
        assert everything(cache) == before


@pytest.mark.parametrize(
    ("allocate", "error", "message"),
    [
        (lambda rows, heads, size: None, TypeError, r"pool: .*got NoneType"),
        (lambda rows, heads, size: np.zeros((rows, heads, size - 1), "u1"), ValueError, r"pool: "),
        (lambda rows, heads, size: np.zeros((rows, heads, size), "i1"), TypeError, r"pool: .*int8"),
        (
            lambda rows, heads, size: np.zeros((rows - 1, heads, size), "u1"),
            ValueError,
            r"pool: expected shape at least 1 rows, got 0 rows",
        ),
    ],
)
def test_an_allocator_that_fails_leaves_no_tokens(
    allocate: Any, error: type[Exception], message: str
) -> None:
    cache = LayerCache("nqkv4", kv_heads=HEADS, key_dim=DIM, allocate=allocate)
    memory = cache.memory()
    with pytest.raises(error, match=message):
        cache.append(K, K)
    assert (cache.tokens(), cache.memory(), cache.core.table(0)) == (0, memory, [])


def test_an_overflow_of_the_exact_dtype_is_named() -> None:
    cache = LayerCache("nqkv4", kv_heads=HEADS, key_dim=DIM, exact_dtype="float16")
    with pytest.raises(ValueError, match=r"k: .*inf \(as float16\) at row-major index 164"):
        cache.append(with_number(NEW, 7e4), NEW)
    assert cache.tokens() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kv_heads": 0}, ValueError, r"kv_heads: expected 1 to 4096, got 0"),
        ({"kv_heads": -1}, ValueError, r"kv_heads: .*got -1"),
        ({"kv_heads": 2.5}, TypeError, r"kv_heads: .*whole number, got 2\.5"),
        ({"key_dim": 257}, ValueError, r"key_dim: expected 1 to 256, got 257"),
        ({"key_dim": "64"}, TypeError, r"key_dim: .*got '64'"),
        ({"value_dim": 0}, ValueError, r"value_dim: .*got 0"),
        ({"batch": -1}, ValueError, r"batch: .*got -1"),
        ({"batch": 2**40}, ValueError, r"batch: expected 0 to 65536"),
        ({"exact_dtype": "int8"}, TypeError, r"dtype: expected .*bfloat16, got \"int8\""),
        ({"allocate": 3}, TypeError, r"allocate: expected a function, got 3"),
        ({"scheme": "nqkv5"}, ValueError, r"scheme: expected one of nqkv4, .*\"nqkv5\""),
        ({"scheme": 4}, TypeError, r"scheme: expected a preset's name.*got int"),
        ({"scheme": {}}, ValueError, r"scheme: .*missing field"),
    ],
)
def test_a_layer_cache_that_cannot_be(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LayerCache(**{"kv_heads": HEADS, "key_dim": DIM, **arguments})


def side(**changes: Any) -> Side:
    return Side(**{"codebook": "nf4", "axis": "channel", "block": 64, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"residual_length": -1}, ValueError, r"residual_length: expected 0 to 4096, got -1"),
        ({"residual_length": 1.5}, TypeError, r"residual_length: .*whole number, got 1\.5"),
        ({"sink_tokens": 9999}, ValueError, r"sink_tokens: expected 0 to 4096, got 9999"),
        ({"exact_dtype": "float32"}, ValueError, r"unknown variant `float32`.*`f32`"),
        ({"skip_layers": 3}, TypeError, r"skip_layers: expected layer numbers, got 3"),
        ({"skip_layers": ["a"]}, TypeError, r"skip_layers: .*got 'a'"),
        ({"key": "nf4"}, TypeError, r"key: expected a Side, got str"),
        ({"key": side(axis="row")}, ValueError, r"`row`, expected `channel` or `token`"),
        ({"key": side(axis="token", block=48)}, ValueError, r"key\.block: .*tokens, got 48"),
        ({"key": side(block=8)}, ValueError, r"key\.block: expected 16 to 512 .*got 8"),
        ({"key": side(axis="token", span="heads")}, NotImplementedError, r"key\.span"),
        ({"value": side(axis="token")}, NotImplementedError, r"value axis .*\"channel\""),
        ({"key": side(scale="max")}, ValueError, r"`max`, expected one of `absmax`"),
        ({"key": side(scale_dtype="fp8")}, ValueError, r"`fp8`, expected one of `fp32`"),
        ({"key": side(codebook="nf9")}, ValueError, r"codebook bits: expected 2 to 8"),
        ({"key": side(codebook="nf7")}, ValueError, r"key\.codebook width: .*got 7"),
        ({"key": side(codebook=[1.0, 0.0])}, ValueError, r"levels: .*ascending.*index 0"),
        ({"key": side(codebook=[0.0, 1e9])}, ValueError, r"codebook: .*finite and apart in fp16"),
        ({"value": side(widths=[4, 3])}, NotImplementedError, r"values of several widths"),
        ({"value": side(channel_order=[[0]])}, NotImplementedError, r"value\.channel_order"),
    ],
)
def test_a_scheme_that_cannot_be(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    both = Scheme.preset("nqkv4")
    with pytest.raises(error, match=message):
        Scheme(**{"key": both.key, "value": both.value, **changes})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda d: Scheme.preset("x"), ValueError, r"one of nqkv4, .*got \"x\""),
        (lambda d: Scheme.from_json("{"), ValueError, r"scheme: .*EOF"),
        (lambda d: Scheme.from_json("3"), ValueError, r"scheme: .*integer `3`"),
        (lambda d: Scheme.of({**d, "version": 2}), ValueError, r"scheme version: expected 1 .*2"),
        (lambda d: Scheme.of({**d, "colour": 2}), ValueError, r"unknown field `colour`"),
        (lambda d: Scheme.of(3), TypeError, r"scheme: .*got int"),
        (lambda d: Scheme.of("nqkv4", nbits=9), ValueError, r"nbits: expected 1 to 8, got 9"),
        (lambda d: Scheme.of("nqkv4", nbits="4"), TypeError, r"nbits: .*got '4'"),
        (lambda d: Scheme.of("nqkv4", nbits=7), ValueError, r"key\.codebook width: .*got 7"),
        (lambda d: _packed({**d["key"], "widths": [4, 3]}), ValueError, r"slab widths: .*got 2"),
        (
            lambda d: _packed({**d["key"], "channel_order": [[0] * 16] * 2}),
            ValueError,
            "permutation",
        ),
        (lambda d: _packed({**d["key"], "channel_order": [[0]]}), ValueError, r"2 heads, got 1"),
    ],
)
def test_a_scheme_that_cannot_be_made(
    make: Callable[[dict[str, Any]], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(json.loads(Scheme.preset("nqkv4").to_json()))


def _packed(key: dict[str, Any]) -> LayerCache:
    scheme = {**json.loads(Scheme.preset("nqkv4").to_json()), "key": key}
    return LayerCache(scheme, kv_heads=HEADS, key_dim=DIM)


X = normal(4, 64)
DONE = nqkv_rs.quantize(X)
FIVE = nqkv_rs.quantize(X, [0.0, 1.0, 2.0, 3.0, 4.0])


def changed(q: nqkv_rs.Quantized, **fields: Any) -> Any:
    return nqkv_rs.dequantize(dataclasses.replace(q, **fields))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nqkv_rs.quantize([1.0]), TypeError, r"x: expected an array .*got list"),
        (lambda: nqkv_rs.quantize(None), TypeError, r"x: .*got NoneType"),
        (lambda: nqkv_rs.quantize(np.arange(64)), TypeError, r"x: expected dtype .*got int64"),
        (lambda: nqkv_rs.quantize(torch.arange(64)), TypeError, r"x: expected dtype .*got int64"),
        (lambda: nqkv_rs.quantize(np.ones(64, "u1")), TypeError, r"x: .*got uint8"),
        (lambda: nqkv_rs.quantize(np.ones(64, bool)), TypeError, r"x: .*got bool"),
        (lambda: nqkv_rs.quantize(np.ones(64, "c8")), TypeError, r"x: .*got complex64"),
        (lambda: nqkv_rs.quantize(np.ones(64, object)), TypeError, r"x: DLPack export failed"),
        (lambda: nqkv_rs.quantize(meta(64)), TypeError, r"x: .*host memory.*meta"),
        (lambda: nqkv_rs.quantize(torch.eye(16).to_sparse()), TypeError, r"x: DLPack.*strided"),
        (lambda: nqkv_rs.quantize(X, block=0), ValueError, r"block: expected 16 to 512, got 0"),
        (lambda: nqkv_rs.quantize(X, block=-64), ValueError, r"block: .*got -64"),
        (lambda: nqkv_rs.quantize(X, block=20), ValueError, r"block: .*multiple of 8 .*got 20"),
        (lambda: nqkv_rs.quantize(X, block=64.0), TypeError, r"block: .*whole number, got 64\.0"),
        (lambda: nqkv_rs.quantize(X, "NF4"), ValueError, r"codebook: expected nf2\.\.nf8.*\"NF4\""),
        (lambda: nqkv_rs.quantize(X, "nf9"), ValueError, r"codebook bits: expected 2 to 8"),
        (lambda: nqkv_rs.quantize(X, 4), TypeError, r"codebook: expected a name or numbers, got 4"),
        (
            lambda: nqkv_rs.quantize(X, [1.0]),
            ValueError,
            r"levels: expected 2 to 256 levels, got 1",
        ),
        (lambda: nqkv_rs.quantize(X, [0.0, np.nan]), ValueError, r"codebook: .*finite"),
        (lambda: nqkv_rs.quantize(X, [0.0, 0.0]), ValueError, r"levels: .*ascending"),
        (lambda: nqkv_rs.quantize(X, scale="max"), ValueError, r"scale: .*absmax.*got 'max'"),
        (lambda: nqkv_rs.quantize(X, scale_dtype="f32"), ValueError, r"scale_dtype: .*fp32.*'f32'"),
        (lambda: nqkv_rs.quantize(X, scale_dtype=None), TypeError, r"scale_dtype: .*got None"),
        (lambda: nqkv_rs.quantize(X, order="big"), ValueError, r"order: .*\"high\".*\"big\""),
        (lambda: nqkv_rs.quantize(X, "nf3", order="high"), ValueError, r"order: .*got 3 bits"),
        (lambda: nqkv_rs.codebook("x"), ValueError, r"codebook: expected nf2"),
        (lambda: nqkv_rs.codebook(4), TypeError, r"codebook: expected a name, got 4"),
        (lambda: nqkv_rs.dequantize(X), TypeError, r"q: .*got ndarray"),
        (lambda: nqkv_rs.dequantize(DONE, out=X.T), ValueError, r"out: .*\[4, 64\], got \[64, 4\]"),
        (lambda: nqkv_rs.dequantize(DONE, out=frozen(X)), TypeError, r"out: .*read-only"),
        (lambda: nqkv_rs.dequantize(DONE, out=X[:, ::-1]), TypeError, r"out: .*contiguous"),
        (lambda: nqkv_rs.dequantize(DONE, out=X.astype("i4")), TypeError, r"out: .*got int32"),
        (lambda: nqkv_rs.dequantize(DONE, out=meta(4, 64)), TypeError, r"out: .*host memory.*meta"),
        (lambda: nqkv_rs.dequantize(DONE, out=grad(4, 64)), TypeError, r"out: .*out\.detach\(\)"),
        (lambda: changed(DONE, codes=DONE.codes[:-1]), ValueError, r"codes: .*128 bytes, got 127"),
        (lambda: changed(DONE, fields=DONE.fields[:-1]), ValueError, r"fields: .*16 bytes, got 12"),
        (lambda: changed(DONE, codes=DONE.codes.astype("f4")), TypeError, r"codes: .*uint8"),
        (lambda: changed(FIVE, codes=FIVE.codes | 255), ValueError, r"codes: .*below 5 .*got 7"),
    ],
)
def test_a_plain_tensor_that_cannot_be(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_core_refuses_an_empty_block_too() -> None:
    with pytest.raises(ValueError, match=r"block: .*got 0"):
        _core.quantized_sizes([4, 64], "nf4", 0, "absmax", "fp32", False)
