"""Transforms on a CUDA device: the CPU's bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nqkv_rs
from nqkv_rs import LayerCache, Transform, transform

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not nqkv_rs.cuda_is_available(), reason="needs a CUDA device"),
]


def parts(batch: int, heads: int, tokens: int, dim: int) -> list[Transform]:
    angle = torch.rand((batch, tokens, dim // 2)) * 6.28
    rope = angle.cos(), angle.sin()
    centre = torch.randn((heads, dim))
    return [
        Transform(),
        Transform(rope=rope),
        Transform(rope=tuple(x[:1, :, : dim // 4] for x in rope), interleaved=True),
        Transform(centre=centre),
        Transform(hadamard=True),
        Transform(rope=rope, centre=centre, hadamard=True),
    ]


def moved(how: Transform) -> Transform:
    return Transform(
        rope=None if how.rope is None else tuple(x.cuda() for x in how.rope),
        interleaved=how.interleaved,
        centre=None if how.centre is None else how.centre.cuda(),
        hadamard=how.hadamard,
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", [2, 20, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("batch,heads,tokens", [(1, 1, 1), (2, 3, 70), (3, 2, 0)])
def test_the_same_bits(batch: int, heads: int, tokens: int, dim: int, dtype: str) -> None:
    x = torch.randn((batch, tokens, heads, dim)).to(getattr(torch, dtype)).transpose(1, 2)
    for how in parts(batch, heads, tokens, dim):
        expected, got = transform(x, how), transform(x.cuda(), moved(how))
        assert got.is_cuda and got.dtype == expected.dtype
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv", "kivi4"])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_appends(scheme: str, dim: int, dtype: str) -> None:
    from nqkv_rs.cuda_cache import CudaLayerCache

    words: dict[str, Any] = dict(kv_heads=2, key_dim=dim, batch=2, exact_dtype="bfloat16")
    host, device = LayerCache(scheme, **words), CudaLayerCache(scheme, **words)
    for tokens in (70, 1, 1, 16, 63, 1, 130, 1):
        k, v = (torch.randn((2, 2, tokens, dim)).to(getattr(torch, dtype)) for _ in "kv")
        keys, values = parts(2, 2, tokens, dim)[-1], Transform(hadamard=True)
        host.append(k, v, keys=keys, values=values)
        device.append(k.cuda(), v.cuda(), keys=moved(keys), values=values)
    total = host.tokens()
    got = device.read(0, total)
    for b in range(2):
        a, c = (np.empty((2, total, dim), np.float32) for _ in "kv")
        host.core.read(b, 0, a, c)
        np.testing.assert_array_equal(got[0][b].cpu().numpy(), a)
        np.testing.assert_array_equal(got[1][b].cpu().numpy(), c)


def test_a_part_on_the_host_is_refused() -> None:
    x = torch.ones((1, 2, 3, 32)).cuda()
    for how in (Transform(centre=np.ones((2, 32))), Transform(rope=(torch.ones(1, 3, 8),) * 2)):
        with pytest.raises(TypeError, match="expected a"):
            transform(x, how)
