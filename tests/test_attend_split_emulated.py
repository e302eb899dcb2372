"""The kernels of ``cuda/attend_split.cuh`` on a CPU; see ``test_attend_emulated.py``."""

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
    return compiled(tmp_path_factory.mktemp("emulator") / "split.so", "-DTWO")


def blocks(size: int, span: str = "heads", value: int | None = None) -> Scheme:
    """``nqkv`` with blocks of another size, of values perhaps of a third one."""
    scheme = Scheme.of("nqkv")
    return replace(
        scheme,
        key=replace(scheme.key, block=size, span=span),
        value=replace(scheme.value, block=value or size, span=span),
    )


# Heads, head size, scheme: a block ends inside some heads or all.
SHAPES = [
    (6, 80, blocks(256)),
    (5, 96, blocks(256)),
    (3, 64, blocks(96)),
    (3, 128, blocks(192)),
    (3, 128, blocks(208, value=304)),
    (2, 64, blocks(48, "head")),
    (2, 80, blocks(64, "head")),
    (2, 96, blocks(64, "head", value=80)),
    (2, 128, blocks(64, "head")),
    (2, 128, blocks(112, "head", value=64)),
]


@pytest.mark.parametrize(("heads", "dim", "scheme"), SHAPES)
def test_shapes(emulator: Any, heads: int, dim: int, scheme: Scheme) -> None:
    for exact, lengths in (("bfloat16", (1, 5, 101)), ("float16", (130,))):
        checked = Checked(emulator, scheme, heads, dim, 2, exact=exact)
        for n in lengths:
            checked.append(n)
            checked.check(4)
        for group in (1, 9):
            checked.check(group)


@pytest.mark.parametrize(("heads", "dim", "exact"), [(6, 80, "bfloat16"), (5, 128, "float16")])
def test_plain_calls(emulator: Any, heads: int, dim: int, exact: str) -> None:
    checked = Checked(emulator, blocks(256 if dim == 80 else 192), heads, dim, 3, exact=exact)
    for n in (3, 30, 170):
        checked.append(n)
        for group in (1, 4, 9):
            checked.check_plain(group)
    checked.cache.crop([201, 77, 4])
    for _ in range(3):
        checked.check_plain(4)


@pytest.mark.parametrize(
    ("heads", "dim", "scheme"), [(3, 96, blocks(256)), (1, 64, blocks(32, "head"))]
)
def test_masks(emulator: Any, heads: int, dim: int, scheme: Scheme) -> None:
    Checked(emulator, replace(scheme, sink_tokens=5), heads, dim, 4).check_masks()


@pytest.mark.parametrize("k_scale", [1e-6, 1.0, 1e3])
def test_scales(emulator: Any, k_scale: float) -> None:
    for v_scale in (1e-6, 1.0, 1e4):
        checked = Checked(emulator, blocks(64, "head"), 1, 128, 1)
        checked.append(170, k_scale, v_scale)
        checked.check(4, scale=1 / (k_scale * math.sqrt(128)))


def test_blocks_of_different_size(emulator: Any) -> None:
    """A head's values are not weighed by the scale of a block that begins behind it."""
    checked = Checked(emulator, blocks(256), 6, 96, 2)
    # Block 0 ends inside head 2, block 1 inside head 5.
    sizes = np.array([1e-5, 1e-5, 1e-5, 1e4, 1e4, 1e4])[:, None, None]
    checked.append(150, v_scale=sizes)
    for _ in range(3):
        checked.check(4, alone=(0, 1, 3, 4, 5))


def test_blocks_of_zeros(emulator: Any) -> None:
    """Scales of 0 before and behind the end of a block, beside others from 1e-4 to 1e2."""
    checked = Checked(emulator, blocks(64, "head"), 1, 128, 1)
    size = np.logspace(-4, 2, 150)[None, None, :, None] * np.ones((1, 1, 1, 128))
    size[:, :, ::3, 64:] = 0.0
    size[:, :, 1::3, :64] = 0.0
    size[:, :, 2::3, 64:] *= 1e-3
    checked.append(150, size, size)
    for _ in range(3):
        checked.check(4, scale=0.01)
