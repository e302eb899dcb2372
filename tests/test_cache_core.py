"""The cache of one layer and its attention, held against the plain implementation."""

from __future__ import annotations

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import plain
import pytest

core = pytest.importorskip("nqkv_rs._core")

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def preset(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads(core.preset(name)), **changes}


def inputs(tokens: int, heads: int, dim: int, seed: int, batch: int = 1) -> plain.Array:
    """fp32 [batch, heads, tokens, dim]."""
    x = [plain.keys_like(tokens, heads, dim, seed + 77 * b) for b in range(batch)]
    return np.stack(x).transpose(0, 2, 1, 3)


class Real:
    """The extension's cache with a pool that grows by what a call needs, as callers do it."""

    def __init__(
        self,
        scheme: dict[str, Any],
        heads: int,
        kd: int,
        vd: int,
        exact: str = "float32",
        batch: int = 1,
    ) -> None:
        self.core = core.LayerCache(json.dumps(scheme), heads, kd, vd, exact, batch)
        self.heads, self.kd, self.vd = heads, kd, vd
        self.rows: list[plain.Array] = []

    def append(self, k: Any, v: Any) -> None:
        missing = self.core.rows_missing(k.shape[2])
        if missing > 0:
            pool = np.zeros((missing, self.heads, self.core.page_bytes), np.uint8)
            self.core.add_rows(pool)
            self.rows.extend(pool)
        self.core.append(k, v)

    def read(self, b: int = 0) -> tuple[plain.Array, plain.Array]:
        tokens = self.core.tokens(b)
        out = [np.empty((self.heads, tokens, d), np.float32) for d in (self.kd, self.vd)]
        self.core.read(b, 0, *out)
        return out[0], out[1]

    def state(self) -> list[Any]:
        """Everything that can be seen of it, as comparable values."""
        out: list[Any] = [self.core.free_rows]
        for b in range(self.core.batch):
            table = self.core.table(b)
            out += [table, [self.rows[r].tobytes() for r, _ in table]]
            out += [x.tobytes() for x in self.read(b)]
        return out

    def attend(self, q: plain.Array, **more: Any) -> tuple[plain.Array, plain.Array]:
        b, heads, n, d = q.shape
        out = np.empty((b, n, heads, self.vd), np.float64 if q.dtype == np.float64 else np.float32)
        lse = np.empty((b, n, heads), np.float32)
        self.core.attend(q, out, 1 / math.sqrt(d), lse=lse, **more)
        return out, lse


def same(real: Real, want: plain.Cache, bytes_too: bool = True) -> None:
    """Tables, page bytes, and every number read back."""
    for b, s in enumerate(want.sequences):
        table = real.core.table(b)
        assert [count for _, count in table] == [count for _, count in s.pages]
        assert real.core.tokens(b) == want.tokens(b)
        if bytes_too:
            for (row, _), (expected, _) in zip(table, s.pages, strict=True):
                np.testing.assert_array_equal(real.rows[row], expected)
        for got, expected in zip(real.read(b), want.read(b), strict=True):
            np.testing.assert_array_equal(got, expected.astype(np.float32))


LENGTHS = (0, 1, 3, 4, 5, 63, 64, 65, 95, 96, 97, 100, 163, 164)


@pytest.mark.parametrize("name", ["nqkv4", "nqkv", "kivi2"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_one_by_one_is_bulk_is_plain(name: str, tokens: int) -> None:
    shape = (2, 16, 32)
    k, v = inputs(tokens, 2, 16, 1), inputs(tokens, 2, 32, 2)
    caches = [Real(preset(name), *shape) for _ in range(3)]
    caches[0].append(k, v)
    for t in range(tokens):
        caches[1].append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    for t in range(0, tokens, 7):
        caches[2].append(k[:, :, t : t + 7], v[:, :, t : t + 7])
    assert caches[0].state() == caches[1].state() == caches[2].state()
    want = plain.Cache(preset(name), *shape)
    want.append(k, v)
    same(caches[0], want)


@pytest.mark.parametrize("name", ["nqkv4", "nqkv"])
def test_a_long_sequence(name: str) -> None:
    k, v = inputs(4097, 1, 16, 3), inputs(4097, 1, 16, 4)
    bulk, single = Real(preset(name), 1, 16, 16), Real(preset(name), 1, 16, 16)
    bulk.append(k, v)
    for t in range(4097):
        single.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert bulk.state() == single.state()
    want = plain.Cache(preset(name), 1, 16, 16)
    want.append(k, v)
    same(bulk, want)


HEADS = [
    (2, 16, 16),
    (3, 64, 64),
    (3, 80, 80),
    (2, 96, 96),
    (2, 128, 128),
    (1, 256, 256),
    (2, 20, 20),
    (5, 33, 33),
    (2, 64, 128),
    (2, 192, 80),
]


def check_attention(
    real: Real, want: plain.Cache, q: plain.Array, **how: Any
) -> tuple[plain.Array, plain.Array]:
    """Both paths against dense fp64 attention on what the plain cache holds."""
    starts = how.get("starts") or [0] * len(q)
    rest = {key: how[key] for key in ("window", "soft_cap") if key in how}
    outs, sums, top = [], [], 1.0
    for b in range(len(q)):
        k, v = want.read(b)
        if "fresh_k" in how:
            n = q.shape[2]
            k, v = k.copy(), v.copy()
            k[:, -n:], v[:, -n:] = how["fresh_k"][b], how["fresh_v"][b]
        top = max(top, np.abs(v).max())
        scale = 1 / math.sqrt(q.shape[3])
        out, lse = plain.attention(q[b], k, v, scale, start=starts[b], **rest)
        outs.append(out)
        sums.append(lse)
    expected, expected_lse = np.stack(outs), np.stack(sums)
    out, lse = real.attend(q.astype(np.float64), **how)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12 * top)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-7, atol=2e-7)
    out, lse = real.attend(q.astype(np.float32), **how)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * top)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
    return expected, expected_lse


@pytest.mark.parametrize("name", ["nqkv4", "nqkv", "kivi2", "nqkv4-signed"])
@pytest.mark.parametrize("heads, kd, vd", HEADS)
def test_head_sizes_and_attention(name: str, heads: int, kd: int, vd: int) -> None:
    scheme = preset(name)
    if name == "kivi2":
        scheme["residual_length"] = 32
    tokens = 165
    k, v = inputs(tokens, heads, kd, 5), inputs(tokens, heads, vd, 6)
    real, want = Real(scheme, heads, kd, vd), plain.Cache(scheme, heads, kd, vd)
    real.append(k, v)
    want.append(k, v)
    same(real, want)
    for group, queries in ((1, 1), (4, 1), (2, 5), (3, 70)):
        q = plain.numbers((1, heads * group, queries, kd), 7) * np.float32(0.5)
        check_attention(real, want, q)


@pytest.mark.parametrize("name", ["nqkv4", "nqkv"])
def test_batches_starts_windows_caps_and_fresh_tokens(name: str) -> None:
    heads, d, tokens, batch = 2, 64, 230, 3
    k, v = inputs(tokens, heads, d, 8, batch), inputs(tokens, heads, d, 9, batch)
    real, want = Real(preset(name), heads, d, d, batch=batch), None
    real.append(k, v)
    want = plain.Cache(preset(name), heads, d, d, batch=batch)
    want.append(k, v)
    same(real, want)
    for queries in (1, 33):
        q = plain.numbers((batch, heads * 3, queries, d), 10) * np.float32(0.5)
        fresh = {"fresh_k": k[:, :, -queries:], "fresh_v": v[:, :, -queries:]}
        for how in (
            {"starts": [0, 100, 3]},
            {"starts": [0, 229, 230]},  # the last sees one key at most, and then none
            {"window": 1},
            {"window": 100},
            {"soft_cap": 2.0},
            {"window": 70, "soft_cap": 5.0, "starts": [0, 200, 100], **fresh},
            fresh,
        ):
            check_attention(real, want, q, **how)


def test_a_query_that_attends_nothing_gives_zeros() -> None:
    real = Real(preset("nqkv4"), 1, 16, 16)
    real.append(inputs(3, 1, 16, 1), inputs(3, 1, 16, 2))
    for dtype in (np.float32, np.float64):
        out, lse = real.attend(np.ones((1, 2, 1, 16), dtype), starts=[3])
        assert not out.any() and (lse == -np.inf).all()


def test_attention_counts_what_it_read_from_pages() -> None:
    real = Real(preset("nqkv4"), 1, 16, 16)
    real.append(inputs(200, 1, 16, 1), inputs(200, 1, 16, 2))
    q, out = np.ones((1, 1, 2, 16), np.float32), np.empty((1, 2, 1, 16), np.float32)
    # 4 sinks, then 2 pages, then a tail of 68.
    assert real.core.packed(0) == 128
    assert real.core.attend(q, out, 1.0) == (199 + 200, 256)
    assert real.core.attend(q, out, 1.0, starts=[70]) == (129 + 130, 2 * 62)


# --- inputs ---------------------------------------------------------------------------------------


def strided(x: plain.Array) -> plain.Array:
    """The same numbers with every axis strided, one backwards."""
    wide = np.zeros((*x.shape[:3], 2 * x.shape[3]), x.dtype)[:, :, ::-1].transpose(0, 3, 2, 1)
    view = wide.transpose(0, 3, 2, 1)[..., ::2]
    view[...] = x
    assert not view.flags.c_contiguous
    return view


def misaligned(x: plain.Array) -> plain.Array:
    raw = np.zeros(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


def read_only(x: plain.Array) -> plain.Array:
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("exact", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_every_input_dtype_is_rounded_to_the_exact_one_first(exact: str, given: str) -> None:
    for name in ("nqkv4", "nqkv"):
        k, v = (inputs(101, 2, 32, s).astype(np.float64) * 1.0001 for s in (11, 12))
        k, v = k.astype(DTYPES[given]), v.astype(DTYPES[given])
        real, want = (
            Real(preset(name), 2, 32, 32, exact),
            plain.Cache(preset(name), 2, 32, 32, exact),
        )
        real.append(k, v)
        want.append(k.astype(np.float64), v.astype(np.float64))
        assert real.core.exact_dtype == exact
        same(real, want)
        check_attention(real, want, plain.numbers((1, 4, 2, 32), 13))


@pytest.mark.parametrize("layout", [strided, misaligned, read_only])
@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_memory_is_read_as_it_lies(layout: Any, dtype: str) -> None:
    k, v = (inputs(101, 2, 32, s).astype(DTYPES[dtype]) for s in (14, 15))
    straight, awkward = (Real(preset("nqkv4"), 2, 32, 32, dtype) for _ in range(2))
    straight.append(k, v)
    awkward.append(layout(k), layout(v))
    assert straight.state() == awkward.state()
    q = plain.numbers((1, 4, 3, 32), 16).astype(DTYPES[dtype])
    for x, y in zip(straight.attend(q), awkward.attend(layout(q)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    k, v = (inputs(101, 2, 32, s) for s in (17, 18))
    a, b = (Real(preset("nqkv4"), 2, 32, 32, dtype) for _ in range(2))
    a.append(k.astype(DTYPES[dtype]), v.astype(DTYPES[dtype]))
    tk, tv = (torch.tensor(x.copy()).to(getattr(torch, dtype)) for x in (k, v))
    # [batch, tokens, heads, dim] in memory, as models make them.
    b.append(tk.transpose(1, 2).contiguous().transpose(1, 2), tv)
    assert a.state() == b.state()
    with pytest.raises(TypeError, match="detach"):
        b.core.append(tk.clone().requires_grad_(), tv)
    assert a.state() == b.state()


class Elsewhere:
    """What a CUDA tensor says of itself."""

    shape = (1, 2, 101, 32)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("must not be asked for memory")


def test_other_devices_are_refused_by_name() -> None:
    real = Real(preset("nqkv4"), 2, 32, 32)
    with pytest.raises(TypeError, match=r"host memory.*device type 2"):
        real.core.append(Elsewhere(), inputs(101, 2, 32, 1))


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nqkv4", "nqkv"])
@pytest.mark.parametrize("held", [0, 50, 130])
def test_a_failed_call_leaves_the_cache_as_it_was(name: str, held: int) -> None:
    real = Real(preset(name), 2, 32, 16, "float16", batch=2)
    real.append(inputs(held, 2, 32, 19, 2), inputs(held, 2, 16, 20, 2))
    pool = np.zeros((8, 2, real.core.page_bytes), np.uint8)
    real.core.add_rows(pool)
    real.rows.extend(pool)
    k, v = inputs(100, 2, 32, 21, 2), inputs(100, 2, 16, 22, 2)

    def spoilt(x: plain.Array, at: tuple[int, ...], value: float) -> plain.Array:
        x = x.copy()
        x[at] = value
        return x

    calls: list[tuple[type[Exception], str, Any, Any]] = [
        (ValueError, "NaN", spoilt(k, (1, 1, 99, 31), np.nan), v),
        (ValueError, "inf", k, spoilt(v, (1, 0, 50, 3), -np.inf)),
        (ValueError, r"as float16", spoilt(k, (0, 0, 0, 0), 7e4), v),
        (ValueError, r"v: expected shape", k, v[..., :15]),
        (ValueError, r"k: expected shape", k[:1], v),
        (ValueError, r"v: expected shape", k, v[:, :, :99]),
        (ValueError, r"4 dimensions", k[0], v),
        (TypeError, "int32", k.astype(np.int32), v),
        (TypeError, "uint8", k, v.astype(np.uint8)),
        (TypeError, "complex", k.astype(np.complex64), v),
        (TypeError, "__dlpack__", [[1.0]], v),
        (RuntimeError, "free rows", np.tile(k, (1, 1, 20, 1)), np.tile(v, (1, 1, 20, 1))),
    ]
    before = real.state()
    memory = pool.tobytes()
    for error, text, bad_k, bad_v in calls:
        with pytest.raises(error, match=text):
            real.core.append(bad_k, bad_v)
        assert real.state() == before and pool.tobytes() == memory, text
    with pytest.raises(ValueError, match="at most"):
        real.core.remove_newest(held + 1)
    with pytest.raises(ValueError, match="sequence index"):
        real.core.select([0, 2])
    with pytest.raises((ValueError, OverflowError)):
        real.core.select([-1])
    with pytest.raises(ValueError, match="sequence"):
        real.core.table(2)
    for bad in (
        np.zeros((1, 2, real.core.page_bytes + 1), np.uint8),
        np.zeros((1, 2, real.core.page_bytes * 2), np.uint8)[..., ::2],
        np.zeros((1, 2, real.core.page_bytes), np.float32),
        read_only(np.zeros((1, 2, real.core.page_bytes), np.uint8)),
    ):
        with pytest.raises((ValueError, TypeError, BufferError)):
            real.core.add_rows(bad)
    assert real.state() == before
    # And it still works, as if nothing had happened.
    twin = Real(preset(name), 2, 32, 16, "float16", batch=2)
    twin.append(inputs(held, 2, 32, 19, 2), inputs(held, 2, 16, 20, 2))
    twin.append(k, v)
    real.append(k, v)
    for b in range(2):
        for x, y in zip(real.read(b), twin.read(b), strict=True):
            np.testing.assert_array_equal(x, y)


def test_attention_refuses_by_name() -> None:
    real = Real(preset("nqkv4"), 2, 32, 16)
    real.append(inputs(10, 2, 32, 1), inputs(10, 2, 16, 2))
    q, out = np.ones((1, 4, 1, 32), np.float32), np.empty((1, 1, 4, 16), np.float32)
    for text, bad_q, bad_out, how in (
        ("q: expected shape", q[..., :31], out, {}),
        ("q_heads", np.ones((1, 3, 1, 32), np.float32), np.empty((1, 1, 3, 16), np.float32), {}),
        ("at most 10", np.ones((1, 4, 11, 32), "f4"), np.empty((1, 11, 4, 16), "f4"), {}),
        ("out", q, out[..., :8], {}),
        ("out", q, np.empty((1, 1, 4, 32), np.float32)[..., ::2], {}),
        ("out", q, read_only(out), {}),
        ("starts", q, out, {"starts": [0, 0]}),
        ("window", q, out, {"window": 0}),
        ("soft_cap", q, out, {"soft_cap": -1.0}),
        ("both or neither", q, out, {"fresh_k": np.ones((1, 2, 1, 32), np.float32)}),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            real.core.attend(bad_q, bad_out, 1.0, **how)
    with pytest.raises(ValueError, match="scale"):
        real.core.attend(q, out, math.nan)


# --- remove, select, reset, slack -----------------------------------------------------------------


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
    assert page_memory <= memory["codes"] + memory["scales"] <= page_memory + 2 * 8 * 64
    assert memory["total"] == sum(memory[x] for x in ("codes", "scales", "tail", "sinks"))
