"""Transforms on a CUDA device: the CPU's bits."""

from __future__ import annotations

from collections.abc import Iterator
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


class Fused:
    """A cache that transforms on the way in, and one that is given what :func:`transform` made."""

    def __init__(self, scheme: str, dims: tuple[int, int], exact: str, batch: int = 3) -> None:
        from nqkv_rs.cuda_cache import CudaLayerCache

        words: dict[str, Any] = dict(
            kv_heads=3, key_dim=dims[0], value_dim=dims[1], batch=batch, exact_dtype=exact
        )
        self.fused, self.plain = CudaLayerCache(scheme, **words), CudaLayerCache(scheme, **words)
        self.dims, self.batch, self.step = dims, batch, 0
        # Lengths of their own, so that seals come one by one.
        for cache in (self.fused, self.plain):
            torch.manual_seed(7)
            k, v = (torch.randn((batch, 3, 90, d), device="cuda") for d in dims)
            cache.append(k, v)
            cache.crop([90 - 31 * b for b in range(batch)])

    def tokens(self, n: int, dtype: str) -> tuple[Any, Any]:
        k, v = (torch.randn((self.batch, 3, n, d), device="cuda") for d in self.dims)
        k[..., 3] += 7.0
        k, v = k.to(getattr(torch, dtype)), v.to(getattr(torch, dtype))
        self.step += 1
        if self.step % 3 == 1:  # [batch, tokens, heads, dim]
            k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        return k, v

    def ways(self, n: int) -> Iterator[tuple[Transform, Transform]]:
        """Each transform of the keys, with another one of the values."""
        keys, values = (parts(self.batch, 3, n, d) for d in self.dims)
        yield from zip(map(moved, keys), map(moved, values[2:] + values[:2]), strict=True)

    def append(self, n: int, dtype: str) -> None:
        for keys, values in self.ways(n):
            k, v = self.tokens(n, dtype)
            self.fused.append(k, v, keys=keys, values=values)
            self.plain.append(transform(k, keys), transform(v, values))

    def check(self) -> None:
        ours, theirs = self.fused, self.plain
        lengths = [ours.tokens(b) for b in range(self.batch)]
        assert lengths == [theirs.tokens(b) for b in range(self.batch)]
        for b in range(self.batch):
            assert ours.core.table(b) == theirs.core.table(b)
        for x, y in zip(ours.pool, theirs.pool, strict=True):
            assert torch.equal(x, y)
        for x, y in zip(ours.read(0, max(lengths)), theirs.read(0, max(lengths)), strict=True):
            assert torch.equal(x.view(torch.int32), y.view(torch.int32))


@pytest.fixture
def one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No append of a cache may transform by a launch of its own."""
    from nqkv_rs import cuda_cache

    def refuse(*_: Any) -> Any:
        raise AssertionError("transformed by a launch of its own")

    monkeypatch.setattr(cuda_cache, "transform", refuse)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv", "kivi4", "kivi2", "nqkv4-signed"])
def test_one_launch_has_the_bits_of_two(scheme: str, dim: int, dtype: str, one_launch: Any) -> None:
    pair = Fused(scheme, (dim, dim), dtype)
    for n in [1, 2, 3, 4, 5, 1, 5, 5, 4, 1]:
        pair.append(n, dtype)
    pair.check()


@pytest.mark.parametrize("exact", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dims", [(64, 80), (128, 64), (20, 16)])
@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
def test_other_dtypes_and_sizes(
    scheme: str, dims: tuple[int, int], dtype: str, exact: str, one_launch: Any
) -> None:
    pair = Fused(scheme, dims, exact)
    for n in [1, 5, 16, 1, 3]:
        pair.append(n, dtype)
    pair.check()


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv", "kivi2"])
def test_parts_and_tokens_that_are_not_aligned(scheme: str, one_launch: Any) -> None:
    pair = Fused(scheme, (96, 96), "bfloat16")
    for pairs in (12, 5, 48):
        for offset in (0, 1):
            angle = torch.rand(pair.batch * 2 * pairs + 1, device="cuda") * 6.28
            rope = tuple(
                x[offset:][: pair.batch * 2 * pairs].view(pair.batch, 2, pairs)
                for x in (angle.cos(), angle.sin())
            )
            centre = torch.randn(3 * 96 + 1, device="cuda")[offset:][: 3 * 96].view(3, 96)
            how = Transform(rope=rope, centre=centre, hadamard=True)
            k, v = (
                torch.nn.functional.pad(x, (0, 3 * offset))[..., :96]
                for x in pair.tokens(2, "bfloat16")
            )
            pair.fused.append(k, v, keys=how, values=how)
            pair.plain.append(transform(k, how), transform(v, how))
    for keys, values in ((how, None), (None, how)):
        pair.fused.append(k, v, keys=keys, values=values)
        pair.plain.append(
            k if keys is None else transform(k, keys), v if values is None else transform(v, values)
        )
    pair.check()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv", "kivi4", "kivi2"])
def test_a_graph_transforms(scheme: str, tokens: int, one_launch: Any) -> None:
    """Angles are read where they lie, at each replay."""
    pair = Fused(scheme, (128, 64), "bfloat16")
    keys, values = list(pair.ways(tokens))[-1]
    k, v = pair.tokens(tokens, "bfloat16")
    nqkv_rs.warmup()
    replays = 200 // tokens
    pair.fused.reserve(tokens * replays)
    pair.plain.reserve(tokens * replays)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.fused.append(k, v, keys=keys, values=values)
    for replay in range(replays):
        assert keys.rope is not None
        for x in (k, v, *keys.rope):
            x.copy_(torch.randn_like(x))
        graph.replay()
        if replay > 0:
            pair.fused.advance(tokens)
        pair.plain.append(transform(k, keys), transform(v, values))
    pair.check()


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv", "kivi4", "kivi2", "nqkv4-signed"])
def test_one_kernel_runs(scheme: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    pair = Fused(scheme, (128, 128), "bfloat16")
    keys, values = list(pair.ways(1))[-1]
    k, v = pair.tokens(1, "bfloat16")
    pair.fused.reserve(64)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(40):
            pair.fused.append(k, v, keys=keys, values=values)
        torch.cuda.synchronize()
    kernels = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not kernels:
        pytest.skip("the profiler sees no kernels here")
    assert len(kernels) == 40 and all("append" in name for name in kernels), set(kernels)


def test_prompts_and_wrong_parts() -> None:
    pair = Fused("nqkv4", (64, 64), "bfloat16")
    pair.append(17, "bfloat16")
    pair.append(150, "bfloat16")
    pair.check()
    k, v = pair.tokens(2, "bfloat16")
    for how in (
        Transform(centre=torch.ones((2, 64)).cuda()),
        Transform(rope=(torch.ones((1, 3, 8)).cuda(),) * 2),
        Transform(rope=(torch.ones((2, 2, 8)).cuda(),) * 2),
        Transform(rope=(torch.ones((1, 2, 33)).cuda(),) * 2),
    ):
        with pytest.raises(ValueError, match=r"expected"):
            pair.fused.append(k, v, keys=how)
    with pytest.raises(TypeError, match="values: expected a Transform, got str"):
        pair.fused.append(k, v, values="hadamard")  # type: ignore[arg-type]
    pair.check()
