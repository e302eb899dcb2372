"""The cache of one layer and its attention, held against the plain implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import plain
import pytest
from real import DTYPES, Real, check_attention, inputs, misaligned, preset, read_only, same, strided

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
