"""Attention by one launch on pages with two scales of a token; see ``test_cuda_attend.py``."""

from __future__ import annotations

import math
from dataclasses import replace
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
from test_attend_split_emulated import SHAPES, blocks  # noqa: E402

SPANS = [s for s in SHAPES if s[2].key.span == "heads"]
# One for each head size.
FEW = [(6, 80, blocks(256)), (5, 96, blocks(256)), (3, 64, blocks(96)), (3, 128, blocks(192))]


@pytest.mark.parametrize(("heads", "dim", "scheme"), SHAPES)
def test_shapes(heads: int, dim: int, scheme: Any) -> None:
    for exact in ("bfloat16", "float16"):
        cache = make(scheme, heads=heads, dim=dim, batch=2, exact=exact)
        for i, n in enumerate((1, 63, 2, 300)):
            cache.append(*tokens(cache, n, seed=i))
            for group in (1, 4, 9):
                check(cache, group)
                check_plain(cache, group)


@pytest.mark.parametrize("heads", [8, 32])
@pytest.mark.parametrize("dim", [80, 96])
def test_the_preset(dim: int, heads: int) -> None:
    cache = make("nqkv", heads=heads, dim=dim, batch=3)
    for i, n in enumerate((1000, 1, 1)):
        cache.append(*tokens(cache, n, seed=i))
        check(cache, 1)
        check_plain(cache, 1)
    check(cache, 4, queries=3)


@pytest.mark.parametrize(("heads", "dim", "scheme"), FEW)
def test_masks(heads: int, dim: int, scheme: Any) -> None:
    check_masks(make(replace(scheme, sink_tokens=5), heads=heads, dim=dim, batch=4))


@pytest.mark.parametrize(("heads", "dim", "scheme"), FEW)
def test_partial_pages_anywhere(heads: int, dim: int, scheme: Any) -> None:
    cache = make(scheme, heads=heads, dim=dim, batch=3)
    for _ in cut_and_go_on(cache):
        check(cache, 4)
        check_plain(cache, 4)
        check(cache, 4, queries=4)
        check(cache, 1, queries=3, starts=[70, 3, 0], window=200)


@pytest.mark.parametrize(("heads", "dim", "scheme"), FEW)
def test_unused_bytes_mean_nothing(heads: int, dim: int, scheme: Any) -> None:
    cache = make(scheme, heads=heads, dim=dim, batch=2)
    cache.append(*tokens(cache, 400))
    cache.crop([100, 331])
    clean = check(cache, 4)
    half = cache.core.value_offset
    for b in range(2):
        row, count = cache.core.table(b)[-1]
        for n in range(count, 64):
            place = 32 * dim + 4 * (8 * (n % 8) + 2 * (n // 16) + n // 8 % 2)
            for value in (False, True):
                at = place + half * value
                cache.pool[0][row][:, at : at + 4] = 0xFF
                for byte, nibble in code_bytes(n, value, dim):
                    cache.pool[0][row][:, byte + half * value] |= 0xF0 if nibble else 0x0F
    assert check(cache, 4) == clean
    check_plain(cache, 4)
    check(cache, 2, queries=3, window=90)


@pytest.mark.parametrize("v_scale", [1e-6, 1e-3, 1.0, 1e3, 1e4])
@pytest.mark.parametrize(("heads", "dim", "scheme"), FEW)
def test_scales(heads: int, dim: int, scheme: Any, v_scale: float) -> None:
    for k_scale in (1e-6, 1e-2, 1.0, 1e3):
        cache = make(scheme, heads=heads, dim=dim, batch=2)
        words = {"k_scale": k_scale, "v_scale": v_scale, "offset": 1.0}
        cache.append(*tokens(cache, 300, **words))
        check(cache, 4, scale=1 / (k_scale * math.sqrt(dim)))
        check_plain(cache, 4, 1 / (k_scale * math.sqrt(dim)))


def test_blocks_of_zeros() -> None:
    """Scales of 0 before and behind the end of a block, beside others from 1e-4 to 1e2."""
    cache = make(blocks(64, "head"), heads=1, dim=128, batch=1)
    k, v = tokens(cache, 300)
    size = torch.logspace(-4, 2, 300, device="cuda")[:, None].repeat(1, 128)
    size[::3, 64:] = 0
    size[1::3, :64] = 0
    size[2::3, 64:] *= 1e-3
    cache.append(*((x.float() * size).to(x.dtype) for x in (k, v)))
    check(cache, 4, scale=0.01)
    check_plain(cache, 4, 0.01)


@pytest.mark.parametrize(("heads", "dim", "scheme"), SPANS)
def test_repeatable(heads: int, dim: int, scheme: Any) -> None:
    check_repeatable(make(scheme, heads=heads, dim=dim, batch=5))


def test_a_graph_attends_while_lengths_change() -> None:
    check_graph(blocks(192), 1)
