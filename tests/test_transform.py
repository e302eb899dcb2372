"""Rotary embedding, centring and rotation on the way in: as in float64, undone by attention."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nqkv_rs import LayerCache, Transform, _core, transform

RNG = np.random.default_rng(4)


def matrix(n: int) -> np.ndarray:
    """The Hadamard matrix of a power of two."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def plain(x: np.ndarray, how: Transform) -> np.ndarray:
    """The same in float64, by matrices."""
    x = x.astype(np.float64)
    dim = x.shape[-1]
    if how.rope is not None:
        cos, sin = (np.asarray(y, np.float64)[:, None] for y in how.rope)
        pairs = cos.shape[-1]
        i, j = np.arange(pairs), np.arange(pairs) + pairs
        if how.interleaved:
            i, j = np.arange(0, 2 * pairs, 2), np.arange(1, 2 * pairs, 2)
        out = x.copy()
        out[..., i] = x[..., i] * cos - x[..., j] * sin
        out[..., j] = x[..., j] * cos + x[..., i] * sin
        x = out
    if how.centre is not None:
        x = x - np.asarray(how.centre, np.float64)[None, :, None]
    if how.hadamard:
        block = dim & -dim
        x = (x.reshape(-1, block) @ matrix(block) / np.sqrt(block)).reshape(x.shape)
    return x


def angles(batch: int, tokens: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    angle = RNG.uniform(0, 6.28, (batch, tokens, pairs)).astype(np.float32)
    return np.cos(angle), np.sin(angle)


def parts(batch: int, heads: int, tokens: int, dim: int) -> list[Transform]:
    centre = RNG.standard_normal((heads, dim))
    rope = angles(1, tokens, dim // 2)
    return [
        Transform(),
        Transform(rope=rope),
        Transform(rope=angles(batch, tokens, dim // 4), interleaved=True),
        Transform(centre=centre),
        Transform(hadamard=True),
        Transform(rope=rope, centre=centre, hadamard=True),
    ]


@pytest.mark.parametrize("dim", [2, 20, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("batch,heads,tokens", [(1, 1, 1), (2, 3, 70), (3, 2, 0)])
def test_as_in_float64(batch: int, heads: int, tokens: int, dim: int) -> None:
    x = RNG.standard_normal((batch, heads, tokens, dim)).astype(np.float32)
    for how in parts(batch, heads, tokens, dim):
        got = transform(x, how)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, plain(x, how), rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_any_dtype_and_strides(dtype: Any) -> None:
    x = RNG.standard_normal((2, 30, 3, 64)).astype(dtype).transpose(0, 2, 1, 3)
    how = parts(2, 3, 30, 64)[-1]
    wide = transform(np.ascontiguousarray(x.astype(np.float32)), how)
    got = transform(x, how)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(np.float32), wide.astype(dtype).astype(np.float32))
    out = np.empty((2, 3, 30, 64), np.float32)
    assert transform(x, how, out=out) is out
    np.testing.assert_array_equal(out, wide)


def test_queries_that_are_changed_alike_see_the_same_scores() -> None:
    """Centred and rotated keys, rotated values: the output rotated back is the exact one's."""
    heads, tokens, dim = 2, 40, 64
    k, v = RNG.standard_normal((2, 1, heads, tokens, dim)).astype(np.float32)
    q = RNG.standard_normal((1, 4, 1, dim)).astype(np.float32)
    centre = k.mean(axis=(0, 2))
    turned = Transform(hadamard=True)
    # Fewer tokens than the window: all are exact, so that only the transform is measured.
    one = LayerCache("nqkv4", kv_heads=heads, key_dim=dim, exact_dtype="float32")
    two = LayerCache("nqkv4", kv_heads=heads, key_dim=dim, exact_dtype="float32")
    one.append(k, v)
    two.append(k, v, keys=Transform(centre=centre, hadamard=True), values=turned)
    expected = one.attend(q)
    got = two.attend(transform(q, turned)).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(
        transform(np.ascontiguousarray(got), turned).transpose(0, 2, 1, 3), expected, atol=1e-5
    )


def test_one_by_one_or_in_bulk_is_the_same() -> None:
    k, v = RNG.standard_normal((2, 2, 2, 150, 32)).astype(np.float32)
    cos, sin = angles(2, 150, 16)
    bulk = LayerCache("nqkv4", kv_heads=2, key_dim=32, batch=2)
    bulk.append(k, v, keys=Transform(rope=(cos, sin), hadamard=True))
    single = LayerCache("nqkv4", kv_heads=2, key_dim=32, batch=2)
    for t in range(150):
        at = slice(t, t + 1)
        how = Transform(rope=(cos[:, at], sin[:, at]), hadamard=True)
        single.append(k[:, :, at], v[:, :, at], keys=how)
    for b in range(2):
        assert bulk.core.table(b) == single.core.table(b)
        first, second, values = (np.empty((2, 150, 32), np.float32) for _ in range(3))
        bulk.core.read(b, 0, first, values)
        single.core.read(b, 0, second, values)
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (dict(rope=angles(1, 4, 8)), ValueError, "rope: expected shape cos and sin of "),
        (dict(rope=angles(3, 5, 8)), ValueError, "rope: expected shape cos and sin of "),
        (dict(rope=angles(1, 5, 17)), ValueError, "rope: expected shape cos and sin of "),
        (dict(rope=(np.ones((1, 5, 8)), np.ones((1, 5, 7)))), ValueError, "sin: expected"),
        (dict(rope=np.ones((2, 1, 5, 8))), TypeError, "rope: expected a pair"),
        (dict(rope=(np.ones((5, 8)),) * 2), ValueError, "cos: expected shape of 3 dimensions"),
        (dict(rope=(np.ones((1, 5, 8)), np.ones(3))), ValueError, "sin: expected"),
        (dict(centre=np.ones(32)), ValueError, "centre: expected shape of 2 dimensions"),
        (dict(centre=np.ones((4, 16))), ValueError, r"centre: expected shape \[2, 32\]"),
    ],
)
def test_what_does_not_fit_is_named(how: Any, error: type, message: str) -> None:
    cache = LayerCache("nqkv4", kv_heads=2, key_dim=32, batch=2)
    x = np.ones((2, 2, 5, 32), np.float32)
    with pytest.raises(error, match=message):
        cache.append(x, x, keys=Transform(**how))
    assert cache.tokens() == 0
    with pytest.raises(TypeError, match="how: expected a Transform, got dict"):
        transform(x, how)
    with pytest.raises(ValueError, match="even"):
        transform(x[..., :31], Transform(hadamard=True))


@pytest.mark.skipif(not hasattr(_core, "cuda_transform"), reason="built without CUDA")
def test_a_host_array_is_refused_where_a_device_is_meant() -> None:
    x = np.ones((1, 2, 3, 32), np.float32)
    with pytest.raises(TypeError, match="x: expected an array on a CUDA device, got one on DLPack"):
        _core.cuda_transform(x, x, Transform().parts())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parts_are_read_at_each_use(dtype: Any) -> None:
    x, centre = RNG.standard_normal((1, 2, 3, 32)).astype(np.float32), np.zeros((2, 32), dtype)
    how = Transform(centre=centre)
    np.testing.assert_array_equal(transform(x, how), x)
    centre += 1
    np.testing.assert_array_equal(transform(x, how), x - np.float32(1))
    np.testing.assert_array_equal(transform(x, how), x - np.float32(1))
