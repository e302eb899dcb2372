"""The kernels of ``cuda/attend_widths.cuh`` on a CPU; see ``test_attend_emulated.py``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_attend_emulated import Checked, compiled, pytestmark  # noqa: F401

from nqkv_rs import Scheme


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library."""
    return compiled(tmp_path_factory.mktemp("emulator") / "widths.so", "-DWIDTHS")


def even(preset: str, book: Any) -> Scheme:
    """A preset with another codebook."""
    scheme = Scheme.of(preset)
    return replace(
        scheme,
        key=replace(scheme.key, codebook=book),
        value=replace(scheme.value, codebook=book),
    )


def mixed(widths: list[int], value: str, heads: int = 0, book: str = "lloyd4") -> Scheme:
    """``nqkv4`` with slabs of several widths, channels in an order of each head if any."""
    scheme, dim = Scheme.of("nqkv4"), 16 * len(widths)
    order = [np.random.default_rng(h).permutation(dim).tolist() for h in range(heads)] or None
    return replace(
        scheme,
        key=replace(scheme.key, codebook=book, widths=widths, channel_order=order),
        value=replace(scheme.value, codebook=value),
    )


BOOKS = ["nf2", "uniform2", (-1.0, -0.25, 0.5), "nf3", "lloyd3", (-1.0, -0.5, 0.0, 0.25, 1.0)]


@pytest.mark.parametrize("book", [*BOOKS, "nf8", "int8"])
@pytest.mark.parametrize("preset", ["nqkv4", "nqkv"])
def test_one_width(emulator: Any, preset: str, book: Any) -> None:
    checked = Checked(emulator, even(preset, book), 2, 64, 2)
    for n in (1, 5, 101, 100):
        checked.append(n)
        checked.check(4)
    checked.check(9)
    checked.check(2, queries=3, window=90)
    checked.cache.crop([207, 77])
    for _ in range(3):
        checked.check(4)


@pytest.mark.parametrize("book", ["l2absmax2-64", "lloyd3", "nf8"])
def test_head_size_128(emulator: Any, book: str) -> None:
    checked = Checked(emulator, even("nqkv4", book), 2, 128, 2)
    checked.append(230)
    for _ in range(3):
        checked.check(4)
    checked.cache.crop([130, 5])
    checked.append(101)
    for _ in range(2):
        checked.check(3)


@pytest.mark.parametrize("book", ["nf2", "nf3", "nf8"])
@pytest.mark.parametrize("k_scale", [1e-6, 1e3])
def test_scales(emulator: Any, book: str, k_scale: float) -> None:
    for v_scale in (1e-6, 1e4):
        checked = Checked(emulator, even("nqkv4", book), 1, 64, 1)
        checked.append(170, k_scale, v_scale)
        for _ in range(2):
            checked.check(4, scale=1 / (k_scale * math.sqrt(64)))


MIXED = [
    ([6, 5, 3, 1], "nf4"),
    ([6, 4, 3, 2], "nf2"),
    ([4, 4, 2, 0], "lloyd3"),
    ([5, 2, 1, 0], "l2signed4-64"),
    ([1, 1, 0, 0], "nf4"),
    ([4, 4, 4, 4], "nf4"),
    ([4, 4, 4, 4], "nf2"),
    ([8, 6, 5, 3], "nf4"),
    ([8, 4, 2, 1], "nf8"),
    ([6, 6, 5, 5], "nf8"),
]


@pytest.mark.parametrize(("widths", "value"), MIXED)
def test_mixed_keys(emulator: Any, widths: list[int], value: str) -> None:
    # Slabs of 4 bits everywhere, without an order, are another kernel's.
    for heads in (0, 2) if {*widths} != {4} or value == "nf2" else (2,):
        scheme = mixed(widths, value, heads)
        if value.startswith("l2signed"):
            scheme = replace(scheme, value=Scheme.of("nqkv4-signed").value)
        checked = Checked(emulator, scheme, 2, 64, 2)
        for n in (5, 101, 100):
            checked.append(n)
            checked.check(4)
        checked.check(9)
        checked.check(2, queries=3, window=90)
        checked.cache.crop([200, 77])
        checked.check(4)


@pytest.mark.parametrize(
    ("widths", "value"),
    [
        ([6, 5, 4, 3, 2, 2, 1, 1], "nf4"),
        ([4, 4, 4, 4, 2, 2, 2, 2], "nf2"),
        ([8, 6, 5, 4, 3, 2, 1, 0], "nf8"),
    ],
)
def test_mixed_keys_of_head_size_128(emulator: Any, widths: list[int], value: str) -> None:
    checked = Checked(
        emulator, mixed(widths, value, 3, "nf4" if 1 not in widths else "lloyd4"), 3, 128, 2
    )
    checked.append(230)
    for _ in range(2):
        checked.check(4)
