"""Attention by one launch on pages with zero points; see ``test_cuda_attend.py``."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from cuda_attend import (  # noqa: E402
    check,
    check_graph,
    check_masks,
    check_plain,
    check_repeatable,
    code_bytes,
    cut_and_go_on,
    make,
    pytestmark,  # noqa: F401
    tokens,
)
from test_attend_grouped_emulated import kivi  # noqa: E402


@pytest.mark.parametrize("group", [1, 4, 7, 8, 9, 16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [4, 2])
def test_shapes(bits: int, dim: int, group: int) -> None:
    for exact in ("bfloat16", "float16"):
        cache = make(f"kivi{bits}", heads=3, dim=dim, batch=2, exact=exact)
        for i, n in enumerate((1, 190, 2, 700)):
            cache.append(*tokens(cache, n, seed=i))
            check(cache, group)
            check_plain(cache, group)


@pytest.mark.parametrize("bits", [4, 2])
def test_batches_of_mixed_lengths(bits: int) -> None:
    for batch, heads in ((1, 1), (3, 8), (40, 2), (129, 1)):
        cache = make(f"kivi{bits}", heads=heads, dim=128, batch=batch)
        cache.append(*tokens(cache, 900))
        cache.crop([1 + (b * 337) % 900 for b in range(batch)])
        check(cache, 4)
        check_plain(cache, 4)
        cache.append(*tokens(cache, 200, seed=3))
        check(cache, 4)
        check(cache, 2, queries=3)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_masks(bits: int, dim: int) -> None:
    check_masks(make(kivi(bits, sinks=5), heads=2, dim=dim, batch=4))


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_partial_pages_anywhere(bits: int, dim: int) -> None:
    cache = make(kivi(bits), heads=2, dim=dim, batch=3)
    for _ in cut_and_go_on(cache):
        check(cache, 4)
        check_plain(cache, 4)
        check(cache, 4, queries=4)
        check(cache, 4, queries=2, window=100)
        check(cache, 1, queries=3, starts=[70, 3, 0], window=200)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_unused_bytes_mean_nothing(bits: int, dim: int) -> None:
    cache = make(kivi(bits), heads=2, dim=dim, batch=2)
    cache.append(*tokens(cache, 400))
    cache.crop([100, 331])
    clean = check(cache, 4)
    codes, half, size = 8 * bits * dim, cache.core.value_offset, dim // 8
    last = [cache.core.table(b)[-1] for b in range(2)]
    assert [count for _, count in last] == [36, 11]
    for row, count in last:
        for n in range(count, 64):
            place = half + codes + size * (8 * (n % 8) + 2 * (n // 16) + n // 8 % 2)
            cache.pool[0][row][:, place : place + size] = 0xFF
            if bits == 4:
                for value in (False, True):
                    for byte, nibble in code_bytes(n, value, dim):
                        cache.pool[0][row][:, byte + half * value] |= 0xF0 if nibble else 0x0F
    assert check(cache, 4) == clean
    # A group of keys that has no token: scales that are NaNs count as large ones.
    row, _ = last[1]
    cache.pool[0][row][:, codes + 4 * dim : codes + 8 * dim] = 0xFF
    check(cache, 4)
    check_plain(cache, 4)
    check(cache, 2, queries=3, window=90)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("v_scale", [1e-6, 1e-3, 1.0, 1e3, 1e4])
def test_scales(bits: int, v_scale: float) -> None:
    for dim in (64, 128):
        for k_scale in (1e-6, 1e-2, 1.0, 1e3):
            cache = make(kivi(bits), heads=2, dim=dim, batch=2)
            words = {"k_scale": k_scale, "v_scale": v_scale, "offset": 1.0}
            cache.append(*tokens(cache, 500, **words))
            check(cache, 4, scale=1 / (k_scale * math.sqrt(dim)))
            check_plain(cache, 4, 1 / (k_scale * math.sqrt(dim)))


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_zero_points_that_outweigh_scales(bits: int, dim: int) -> None:
    """Offsets of values that differ from block to block and grow, or shrink, on the way."""
    for exponents in ((-4, 3), (3, -4)):
        cache = make(kivi(bits), heads=2, dim=dim, batch=2)
        k, v = tokens(cache, 700)
        size = torch.logspace(*exponents, 700, device="cuda")[:, None]
        offset = torch.tensor([0.0, 50.0, -50.0, 1.0], device="cuda")[: dim // 32]
        cache.append(k, ((v.float() + offset.repeat_interleave(32)) * size).to(v.dtype))
        check(cache, 4)
        check(cache, 4, q=torch.zeros((2, 8, 1, dim), device="cuda").bfloat16())  # uniform


@pytest.mark.parametrize("book", ["nf4", "lloyd4", "nf2", (-1.0, -0.25, 0.5)])
def test_other_codebooks(book: Any) -> None:
    cache = make(kivi(4 if "4" in book else 2, book=book), heads=2, dim=128, batch=2)
    cache.append(*tokens(cache, 1000))
    check(cache, 4)
    check_plain(cache, 4)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_repeatable(bits: int, dim: int) -> None:
    check_repeatable(make(f"kivi{bits}", heads=8, dim=dim, batch=5))


@pytest.mark.parametrize("bits", [4, 2])
def test_a_graph_attends_while_lengths_change(bits: int) -> None:
    check_graph(kivi(bits), 1)
