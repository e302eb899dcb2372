"""The kernels of ``cuda/attend_grouped.cuh`` on a CPU; see ``test_attend_emulated.py``."""

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
    return compiled(tmp_path_factory.mktemp("emulator") / "grouped.so", "-DGROUPS")


def kivi(bits: int, residual: int = 16, sinks: int = 0, book: Any = None) -> Scheme:
    """A preset with fewer exact tokens, so that short texts have pages, or another codebook."""
    scheme = replace(Scheme.of(f"kivi{bits}"), residual_length=residual, sink_tokens=sinks)
    if book is None:
        return scheme
    return replace(
        scheme,
        key=replace(scheme.key, codebook=book, scale="mean_absmax"),
        value=replace(scheme.value, codebook=book),
    )


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [4, 2])
def test_shapes(emulator: Any, bits: int, dim: int) -> None:
    for exact, lengths in (("bfloat16", (1, 5, 101, 100)), ("float16", (230,))):
        checked = Checked(emulator, kivi(bits), 2, dim, 2, exact=exact)
        for n in lengths:
            checked.append(n)
            checked.check(4)
        for group in (1, 7, 9):
            checked.check(group)


@pytest.mark.parametrize(("dim", "exact"), [(64, "bfloat16"), (128, "bfloat16"), (128, "float16")])
def test_plain_calls(emulator: Any, dim: int, exact: str) -> None:
    checked = Checked(emulator, kivi(4, sinks=5), 2, dim, 3, exact=exact)
    for n in (3, 30, 200):
        checked.append(n)
        for group in (1, 4, 8, 9):
            checked.check_plain(group)
    checked.cache.crop([201, 77, 4])
    for _ in range(3):
        checked.check_plain(4)


@pytest.mark.parametrize("bits", [4, 2])
def test_masks(emulator: Any, bits: int) -> None:
    Checked(emulator, kivi(bits, sinks=5), 2, 64, 4).check_masks()


@pytest.mark.parametrize("bits", [4, 2])
def test_partial_pages_of_every_length(emulator: Any, bits: int) -> None:
    checked = Checked(emulator, kivi(bits), 1, 128, 2)
    checked.append(230)
    for n in (64, 63, 57, 49, 33, 32, 31, 17, 9, 8, 2, 1):
        checked.cache.crop([n + 64, n])
        checked.check(4)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("k_scale", [1e-6, 1.0, 1e3])
def test_scales(emulator: Any, bits: int, dim: int, k_scale: float) -> None:
    for v_scale in (1e-6, 1.0, 1e4):
        checked = Checked(emulator, kivi(bits), 1, dim, 1)
        checked.append(170, k_scale, v_scale)
        for _ in range(2):
            checked.check(4, scale=1 / (k_scale * math.sqrt(dim)))


@pytest.mark.parametrize("bits", [4, 2])
def test_zero_points_that_outweigh_scales(emulator: Any, bits: int) -> None:
    """Values with offsets of 50 sigma that differ from block to block and change on the way."""
    checked = Checked(emulator, kivi(bits), 2, 128, 2)
    for size in (1e-3, 1.0, 50.0, 1e-2):
        offsets = np.repeat([0.0, 50.0, -50.0, 1.0], 32) * size
        checked.append(130, v_offset=offsets)
        for _ in range(2):
            checked.check(4)


def test_groups_of_different_size(emulator: Any) -> None:
    """Only the second group of a page has scales that queries come down for."""
    checked = Checked(emulator, kivi(4), 1, 128, 1)
    checked.append(32, 0.1)
    checked.append(32, 100.0)
    checked.append(40)
    for _ in range(3):
        checked.check(4, scale=0.002)


@pytest.mark.parametrize("book", ["nf4", "lloyd4", "nf2", (-1.0, -0.25, 0.5)])
def test_other_codebooks(emulator: Any, book: Any) -> None:
    checked = Checked(emulator, kivi(4 if "4" in book else 2, book=book), 2, 64, 2)
    checked.append(230)
    for _ in range(3):
        checked.check(4)
