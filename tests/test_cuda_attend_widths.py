"""Attention by one launch on pages of other widths than 4 bits; see ``test_cuda_attend.py``."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import cuda_attend  # noqa: E402
from cuda_attend import pytestmark  # noqa: E402, F401
from test_attend_widths_emulated import MIXED, even, mixed  # noqa: E402

BOOKS = [
    "nf2",
    "uniform2",
    "l2absmax2-64",
    (-1.0, -0.25, 0.5),
    "nf3",
    "lloyd3",
    (-1.0, -0.5, 0.0, 0.25, 1.0),
    "nf8",
    "int8",
]


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("preset", ["nqkv4", "nqkv"])
def test_one_width(preset: str, dim: int, book: Any) -> None:
    for exact in ("bfloat16", "float16"):
        cache = cuda_attend.make(even(preset, book), heads=2, dim=dim, batch=3, exact=exact)
        for i, n in enumerate((1, 64, 300, 1000)):
            cache.append(*cuda_attend.tokens(cache, n, seed=i))
            for group in (1, 4, 9):
                cuda_attend.check(cache, group)
        cuda_attend.check(cache, 4, queries=5, window=700)
        cuda_attend.check(cache, 4, starts=[0, 70, 1364])
        cache.crop([1300, 77, 5])
        cache.append(*cuda_attend.tokens(cache, 170, seed=9))
        cuda_attend.check(cache, 4)
        cuda_attend.check(cache, 2, queries=3)


@pytest.mark.parametrize(("widths", "value"), MIXED)
@pytest.mark.parametrize("wide", [1, 2])
def test_mixed_keys(widths: list[int], value: str, wide: int) -> None:
    widths = [w for w in widths for _ in range(wide)]
    for heads in (0, 3):
        scheme = mixed(widths, value, heads)
        if value.startswith("l2signed"):
            scheme = mixed(widths, "l2absmax4-64", heads)
        cache = cuda_attend.make(scheme, heads=3, dim=64 * wide, batch=2)
        for i, n in enumerate((5, 300, 1000)):
            cache.append(*cuda_attend.tokens(cache, n, seed=i))
            for group in (1, 4, 9):
                cuda_attend.check(cache, group)
        cuda_attend.check(cache, 4, queries=5, window=700)
        cache.crop([1300, 77])
        cache.append(*cuda_attend.tokens(cache, 170, seed=9))
        cuda_attend.check(cache, 4)


@pytest.mark.parametrize(
    "scheme",
    [
        even("nqkv4", "nf2"),
        even("nqkv4", "nf3"),
        even("nqkv4", "nf8"),
        mixed([6, 6, 4, 4, 2, 2, 0, 0], "nf4", 2),
    ],
)
@pytest.mark.parametrize("v_scale", [1e-6, 1.0, 1e4])
def test_scales(scheme: Any, v_scale: float) -> None:
    for k_scale in (1e-6, 1.0, 1e3):
        cache = cuda_attend.make(scheme, heads=2, dim=128, batch=2)
        words = {"k_scale": k_scale, "v_scale": v_scale, "offset": 1.0}
        cache.append(*cuda_attend.tokens(cache, 500, **words))
        cuda_attend.check(cache, 4, scale=1 / (k_scale * math.sqrt(128)))


@pytest.mark.parametrize("book", ["nf2", "nf3", "nf8"])
def test_repeatable(book: str) -> None:
    cache = cuda_attend.make(even("nqkv4", book), heads=8, dim=128, batch=5)
    cache.append(*cuda_attend.tokens(cache, 2000))
    cache.crop([2000, 1, 700, 1999, 130])
    q = torch.randn((5, 32, 1, 128), device="cuda").bfloat16()
    first = cuda_attend.run(cache, q)
    for _ in range(50):
        again = cuda_attend.run(cache, q)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
