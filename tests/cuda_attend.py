"""Caches on a device, and the checks of attention by one launch that several test files share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import nqkv_rs

# What a test file takes over by this name marks all its tests.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not nqkv_rs.cuda_is_available(), reason="needs a CUDA device"),
]
if nqkv_rs.cuda_is_available():
    from nqkv_rs import _attend
    from nqkv_rs.cuda_cache import CudaLayerCache

    class Cache(CudaLayerCache):
        """A cache that shows its memory besides pages."""

        def _room(self, *words: Any) -> Any:
            self.room = super()._room(*words)
            return self.room


BOUND = 1e-3


def make(scheme: Any, heads: int, dim: int, batch: int, exact: str = "bfloat16") -> Any:
    return Cache(scheme, kv_heads=heads, key_dim=dim, batch=batch, exact_dtype=exact)


def tokens(
    cache: Any,
    n: int,
    seed: int = 0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    offset: float = 3.0,
    dtype: Any = None,
) -> tuple[Any, Any]:
    """Keys with an offset of each channel, and values."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shape = (cache.core.batch, cache.core.kv_heads, n, cache.key_dim)
    k, v = (torch.randn(shape, device="cuda", generator=generator) for _ in range(2))
    channel = torch.Generator(device="cuda").manual_seed(99)
    k += offset * torch.randn((1, shape[1], 1, shape[3]), device="cuda", generator=channel)
    dtype = dtype or getattr(torch, cache.core.exact_dtype)
    return (k * k_scale).to(dtype), (v * v_scale).to(dtype)


def reference(
    cache: Any,
    q: Any,
    scale: float | None = None,
    starts: Sequence[int] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Any, Any]:
    """float64 attention on the dequantized cache, and its log-sum-exp."""
    batch, heads, queries, dim = q.shape
    lengths = torch.tensor([cache.tokens(b) for b in range(batch)], device="cuda")
    longest = int(lengths.max())
    k, v = cache.read(0, longest, torch.float64)
    kv_heads = k.shape[1]
    grouped = q.double().reshape(batch, kv_heads, heads // kv_heads, queries, dim)
    scores = grouped @ k[:, :, None].transpose(-1, -2) * (scale or 1 / math.sqrt(dim))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    at = torch.arange(longest, device="cuda")
    position = (lengths[:, None] - queries + torch.arange(queries, device="cuda"))[..., None]
    seen = at <= position
    if window is not None:
        seen = seen & (at > position - window)
    if starts is not None:
        seen = seen & (at >= torch.tensor(starts, device="cuda")[:, None, None])
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    out = (weights @ v[:, :, None]).reshape(batch, heads, queries, dim).transpose(1, 2)
    return out, lse.reshape(batch, heads, queries).transpose(1, 2)


def run(cache: Any, q: Any, dtype: Any = torch.float32, **words: Any) -> tuple[Any, Any]:
    """The kernel's result and log-sum-exp; never the tiles'."""
    batch, heads, queries, dim = q.shape
    out = torch.full((batch, queries, heads, dim), torch.nan, dtype=dtype, device="cuda")
    lse = torch.full((batch, queries, heads), torch.nan, device="cuda")
    assert _attend.refusal(cache, q, out, None) is None
    cache.attend_into(q, out, words.pop("scale", None), lse=lse, **words)
    return out, lse


def check(
    cache: Any, group: int, queries: int = 1, bound: float = BOUND, q: Any = None, **words: Any
) -> float:
    """The kernel against the reference; returns the relative error."""
    heads = cache.core.kv_heads * group
    if q is None:
        generator = torch.Generator(device="cuda").manual_seed(7)
        shape = (cache.core.batch, heads, queries, cache.key_dim)
        q = torch.randn(shape, device="cuda", generator=generator).to(torch.bfloat16)
    expected, expected_lse = reference(cache, q, **words)
    out, lse = run(cache, q, **words)
    assert bool(torch.isfinite(out).all())
    norm = expected.norm()
    error = float((out.double() - expected).norm() / norm) if norm > 0 else float(out.norm())
    assert error <= bound, error
    none = torch.isinf(expected_lse)
    assert torch.equal(torch.isinf(lse), none)
    finite = expected_lse[~none]
    if finite.numel():
        wrong = (lse[~none].double() - finite).abs() / (1 + finite.abs())
        assert float(wrong.max()) <= 1e-3
    assert not out[none].any()
    return error


def check_plain(cache: Any, group: int, scale: float | None = None) -> None:
    """One query in the exact tokens' dtype, with no log-sum-exp: another kernel at 4 bits."""
    dtype = getattr(torch, cache.core.exact_dtype)
    batch, heads, dim = cache.core.batch, cache.core.kv_heads * group, cache.key_dim
    generator = torch.Generator(device="cuda").manual_seed(8)
    q = torch.randn((batch, heads, 1, dim), device="cuda", generator=generator).to(dtype)
    out = torch.full((batch, 1, heads, dim), torch.nan, dtype=dtype, device="cuda")
    assert _attend.refusal(cache, q, out, None) is None
    cache.attend_into(q, out, scale)
    expected, _ = reference(cache, q, scale)
    rounding = 2**-9 if dtype == torch.bfloat16 else 2**-12
    assert float((out.double() - expected).norm() / expected.norm()) <= BOUND + rounding


def check_masks(cache: Any) -> None:
    """Windows, starts and a cap, on a batch of four."""
    cache.append(*tokens(cache, 500))
    for window in (1, 15, 63, 64, 65, 130, 490):
        for queries in (1, 2, 5):
            check(cache, 4, queries, window=window)
    check(cache, 4, starts=[0, 3, 130, 499])
    check(cache, 2, queries=6, starts=[0, 3, 130, 499], window=300)
    check(cache, 4, starts=[0, 500, 501, 10**6])  # nothing to attend
    check(cache, 4, soft_cap=5.0)


def cut_and_go_on(cache: Any) -> Iterator[None]:
    """Pages before the last hold fewer than 64 tokens, in a batch of three; after each step."""
    for i, (n, lengths) in enumerate(
        [(400, [300, 77, 5]), (200, [433, 201, 170]), (150, [500, 340, 171]), (90, None)]
    ):
        cache.append(*tokens(cache, n, seed=i))
        if lengths is not None:
            cache.crop(lengths)
        yield


def check_repeatable(cache: Any) -> None:
    """Any and plain calls give the same bits twenty times, on a batch of five."""
    cache.append(*tokens(cache, 2000))
    cache.crop([2000, 1, 700, 1999, 130])
    shape = (5, 4 * cache.core.kv_heads, 1, cache.key_dim)
    q = torch.randn(shape, device="cuda").bfloat16()
    first, lse = run(cache, q)
    plain = torch.empty((5, 1, *shape[1::2]), dtype=torch.bfloat16, device="cuda")
    cache.attend_into(q, plain, None)
    for _ in range(20):
        again = run(cache, q)
        assert torch.equal(first, again[0]) and torch.equal(lse, again[1])
        out = torch.full_like(plain, torch.nan)
        cache.attend_into(q, out, None)
        assert torch.equal(out, plain)


def check_graph(scheme: Any, queries: int) -> None:
    """A graph appends and attends while the lengths on the device change."""
    cache = make(scheme, heads=2, dim=128, batch=2)
    twin = make(scheme, heads=2, dim=128, batch=2)
    for c in (cache, twin):
        c.append(*tokens(c, 120))
    cache.crop([120, 50])
    twin.crop([120, 50])
    k, v = (x.clone() for x in tokens(cache, queries))
    q = torch.randn((2, 8, queries, 128), device="cuda").bfloat16()
    out = torch.empty((2, queries, 8, 128), device="cuda")
    check(cache, 4, q=q)
    cache.reserve(400)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.core.append(k, v)
        cache.attend_into(q, out, None)
    for i in range(150):
        a, b = tokens(twin, queries, seed=i)
        twin.append(a, b)
        k.copy_(a), v.copy_(b), q.copy_(torch.randn_like(q))
        graph.replay()
        expected, _ = reference(twin, q)
        assert float((out.double() - expected).norm() / expected.norm()) <= BOUND


def code_bytes(n: int, value: bool, dim: int) -> list[tuple[int, int]]:
    """Byte and nibble of every code of token ``n``, from the start of its half."""
    found = []
    for c in range(dim):
        if value:
            low = 64 * (c % 8) + 16 * (n % 8 // 2) + 4 * (n // 16) + 2 * (n // 8 % 2) + c // 8 % 2
        else:
            low = 64 * (n % 8) + 16 * (c % 8 // 2) + 4 * (n // 16) + 2 * (c // 8 % 2) + n // 8 % 2
        found.append((512 * (c // 16) + low, n % 2 if value else c % 2))
    return found
