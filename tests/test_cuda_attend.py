"""Attention by one launch against float64 attention on what the cache itself reads back."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import pytest

import nqkv_rs
from nqkv_rs import Scheme

torch = pytest.importorskip("torch")
from cuda_attend import (  # noqa: E402
    BOUND,
    check,
    check_graph,
    code_bytes,
    cut_and_go_on,
    make,
    pytestmark,  # noqa: F401
    reference,
    run,
    tokens,
)

if nqkv_rs.cuda_is_available():
    from nqkv_rs import _attend, _core


@pytest.mark.parametrize("length", [1, 4, 5, 40, 63, 64, 65, 99, 100, 101, 164, 1000, 4097])
@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
def test_lengths(scheme: str, length: int) -> None:
    cache = make(scheme, heads=2, dim=128, batch=2)
    cache.append(*tokens(cache, length))
    check(cache, 4)


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 9, 16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_shapes(dim: int, group: int) -> None:
    for scheme in ["nqkv4", "nqkv4-signed"] + (["nqkv"] if dim in (64, 128, 256) else []):
        for exact in ("bfloat16", "float16"):
            cache = make(scheme, heads=3, dim=dim, batch=2, exact=exact)
            cache.append(*tokens(cache, 300))
            check(cache, group)
            for _ in range(2):
                cache.append(*tokens(cache, 1, seed=5))
            check(cache, group)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (3, 8), (17, 4), (40, 2), (129, 1)])
def test_batches_of_mixed_lengths(batch: int, heads: int) -> None:
    for scheme in ("nqkv4", "nqkv"):
        cache = make(scheme, heads=heads, dim=128, batch=batch)
        cache.append(*tokens(cache, 900))
        cache.crop([1 + (b * 337) % 900 for b in range(batch)])
        check(cache, 4)
        cache.append(*tokens(cache, 70, seed=3))
        check(cache, 4)
        check(cache, 2, queries=3)


@pytest.mark.parametrize("tail", range(32, 96, 7))
def test_tails(tail: int) -> None:
    cache = make("nqkv4", heads=2, dim=64, batch=1)
    cache.append(*tokens(cache, 4 + 128 + tail))
    check(cache, 8)


@pytest.mark.parametrize("queries", [1, 2, 5, 8])
@pytest.mark.parametrize("window", [1, 15, 63, 64, 65, 130, 700])
@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
def test_windows(scheme: str, window: int, queries: int) -> None:
    cache = make(scheme, heads=2, dim=128, batch=2)
    cache.append(*tokens(cache, 650))
    check(cache, 4, queries, window=window)
    cache.append(*tokens(cache, 55, seed=1))
    check(cache, 4, queries, window=window, starts=[0, 680])


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
def test_starts_and_soft_cap(scheme: str) -> None:
    cache = make(scheme, heads=2, dim=128, batch=4)
    cache.append(*tokens(cache, 500))
    check(cache, 4, starts=[0, 3, 130, 499])
    check(cache, 2, queries=6, starts=[0, 3, 130, 499])
    check(cache, 4, starts=[0, 500, 501, 10**6])  # nothing to attend
    check(cache, 4, soft_cap=5.0)
    check(cache, 4, soft_cap=50.0, scale=1.0)
    check(cache, 1, queries=7, soft_cap=2.0, window=90, scale=0.3)


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
def test_partial_pages_anywhere(scheme: str) -> None:
    """Cut and go on: pages before the last hold fewer than 64 tokens."""
    cache = make(scheme, heads=2, dim=128, batch=3)
    for _ in cut_and_go_on(cache):
        check(cache, 4)
        check(cache, 4, queries=4)
        check(cache, 4, queries=2, window=100)
        check(cache, 1, queries=3, starts=[70, 3, 0], window=200)


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
def test_unused_bytes_mean_nothing(scheme: str) -> None:
    dim = 128
    cache = make(scheme, heads=2, dim=dim, batch=2)
    cache.append(*tokens(cache, 400))
    cache.crop([100, 331])
    clean = check(cache, 4)
    half = cache.core.value_offset
    blocks = 2 if scheme == "nqkv4" else 1
    for b in range(2):
        row, count = cache.core.table(b)[-1]
        for n in range(count, 64):
            place = 8 * (n % 8) + 2 * (n // 16) + n // 8 % 2
            fields = [half + 64 * dim // 2 + 2 * blocks * place + i for i in range(2 * blocks)]
            if scheme == "nqkv":
                fields += [64 * dim // 2 + 2 * place + i for i in range(2)]
            cache.pool[0][row][:, fields] = 0xFF
            for value in (False, True):
                for byte, nibble in code_bytes(n, value, dim):
                    cache.pool[0][row][:, byte + half * value] |= 0xF0 if nibble else 0x0F
    for which in ("sinks", "tail"):
        for side in range(2):
            room = getattr(cache.room, which)[side].view(2, -1, 2 * 2 * dim)
            for b in range(2):
                held = min(4, cache.tokens(b)) if which == "sinks" and scheme == "nqkv4" else 0
                if which == "tail":
                    held = cache.tokens(b) - cache.core.packed(b) - 4 * (scheme == "nqkv4")
                room[b, held:] = 0xFF
    assert check(cache, 4) == clean
    check(cache, 2, queries=3, window=90)


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
def test_shared_pages(scheme: str) -> None:
    cache = make(scheme, heads=2, dim=128, batch=2)
    cache.append(*tokens(cache, 300))
    cache.select([1, 0, 1, 1])
    check(cache, 4)
    other = cache.fork()
    other.append(*tokens(other, 90, seed=4))
    cache.append(*tokens(cache, 7, seed=5))
    check(cache, 4)
    check(other, 4)


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
@pytest.mark.parametrize("v_scale", [1e-6, 1e-3, 1.0, 1e3, 1e4])
def test_scales(scheme: str, v_scale: float) -> None:
    for k_scale in (1e-6, 1e-2, 1.0, 1e3):
        cache = make(scheme, heads=2, dim=128, batch=2)
        cache.append(*tokens(cache, 500, k_scale=k_scale, v_scale=v_scale, offset=1.0))
        # Scores of a few units, whatever the keys.
        check(cache, 4, scale=1 / (k_scale * math.sqrt(128)))


def test_values_that_grow() -> None:
    """A unit of values that no longer fits gives way to a larger one, in pages and beside them."""
    cache = make("nqkv4", heads=1, dim=128, batch=1)
    k, v = tokens(cache, 700)
    size = torch.logspace(-4, 4, 700, device="cuda")[None, None, :, None]
    cache.append(k, (v.float() * size).to(v.dtype))
    check(cache, 4)
    cache = make("nqkv4", heads=1, dim=128, batch=1)
    cache.append(k, (v.float() * size.flip(2)).to(v.dtype))
    check(cache, 4)


def test_numbers_at_the_edge() -> None:
    cache = make("nqkv4", heads=2, dim=128, batch=1)
    cache.append(*tokens(cache, 3000, offset=100.0))  # means of 100 sigma
    q = torch.randn((1, 8, 1, 128), device="cuda").bfloat16()
    check(cache, 4, q=q)
    check(cache, 4, q=q * 0)  # uniform
    cache = make("nqkv4", heads=2, dim=128, batch=1)
    k, v = tokens(cache, 3000)
    k[:, :, 1500] *= 40  # one dominating token
    cache.append(k, v)
    q = (k[:, :, 1500:1501].repeat_interleave(4, 1).float() * 0.2).bfloat16()
    check(cache, 4, q=q)
    k, _ = cache.read(0, 3000)
    top = (q[:, ::4].float() @ k.transpose(-1, -2)).max()
    # Scores of 1e4: rounding a query times a scale to fp16 shows.
    check(cache, 4, q=q, scale=float(1e4 / top), bound=5e-2)
    check(cache, 4, q=q, scale=float(50 / top))


def test_a_million_tokens() -> None:
    cache = make("nqkv4", heads=1, dim=64, batch=1)
    for i in range(16):
        cache.append(*tokens(cache, 65536, seed=i))
    q = torch.zeros((1, 1, 1, 64), dtype=torch.bfloat16, device="cuda")
    check(cache, 1, q=q)
    q = torch.randn((1, 1, 1, 64), device="cuda").bfloat16()
    check(cache, 1, q=q)


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
def test_repeatable(scheme: str) -> None:
    cache = make(scheme, heads=8, dim=128, batch=5)
    cache.append(*tokens(cache, 2000))
    cache.crop([2000, 1, 700, 1999, 130])
    q = torch.randn((5, 32, 1, 128), device="cuda").bfloat16()
    first = run(cache, q)
    for _ in range(100):
        again = run(cache, q)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
@pytest.mark.parametrize("queries", [1, 2])
def test_a_graph_attends_while_lengths_change(scheme: str, queries: int) -> None:
    check_graph(scheme, queries)


def test_streams_and_threads() -> None:
    caches = [make("nqkv4", heads=4, dim=128, batch=3) for _ in range(3)]
    for i, cache in enumerate(caches):
        cache.append(*tokens(cache, 700 + 300 * i, seed=i))
    q = torch.randn((3, 16, 1, 128), device="cuda").bfloat16()
    expected = [run(cache, q)[0] for cache in caches]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(run(caches[i], q)[0], expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_and_strides(dtype: Any) -> None:
    cache = make("nqkv4", heads=2, dim=128, batch=2)
    cache.append(*tokens(cache, 300))
    q = torch.randn((2, 1, 8, 128), device="cuda").to(dtype).transpose(1, 2)  # as models have it
    expected, _ = reference(cache, q)
    out, _ = run(cache, q, dtype=dtype)
    rounding = 2**-9 if dtype == torch.bfloat16 else 2**-12
    assert float((out.double() - expected).norm() / expected.norm()) <= BOUND + rounding
    odd = torch.nn.functional.pad(q, (0, 1))[..., :128]
    assert torch.equal(run(cache, odd, dtype=dtype)[0], out)
    large = (q.float() * 1e5).bfloat16()  # beyond fp16
    check(cache, 4, q=large, scale=1e-6)


def test_fresh_tokens_are_the_tail() -> None:
    cache = make("nqkv4", heads=2, dim=128, batch=2)
    cache.append(*tokens(cache, 200))
    k, v = tokens(cache, 3, seed=9)
    cache.append(k, v)
    q = torch.randn((2, 8, 3, 128), device="cuda").bfloat16()
    out = torch.empty((2, 3, 8, 128), device="cuda")
    assert _attend.refusal(cache, q, out, (k, v)) is None
    cache.attend_into(q, out, None, fresh=(k, v))
    expected, _ = reference(cache, q)
    assert float((out.double() - expected).norm() / expected.norm()) <= BOUND
    assert _attend.refusal(cache, q, out, (k.float(), v.float())) is not None


def test_what_the_kernel_does_not_take() -> None:
    base = json.loads(Scheme.of("nqkv4").to_json())
    base["value"]["scale"] = "minmax"
    for scheme, dim, expected in [
        ("kivi2", 96, "head size"),
        ("nqkv", 112, "head size"),
        (base, 128, "no zero point"),
        ("nqkv4", 112, "head size"),
    ]:
        cache = make(scheme, heads=2, dim=dim, batch=1)
        cache.append(*tokens(cache, 300))
        q = torch.randn((1, 4, 1, dim), device="cuda").bfloat16()
        out = torch.empty((1, 1, 4, dim), device="cuda")
        reason = _attend.refusal(cache, q, out, None)
        assert reason is not None and expected in reason
        with pytest.raises(NotImplementedError, match="expected"):
            _core.cuda_attend(cache.core, q, out, 1.0, torch.zeros(8, device="cuda").byte())
        _attend._WARNED.clear()
        with pytest.warns(UserWarning, match="dequantizes tiles"):
            cache.attend_into(q, out, None)
        want, _ = reference(cache, q)
        assert float((out.double() - want).norm() / want.norm()) <= 1e-5
        cache.strict = True
        with pytest.raises(RuntimeError, match="strict=True"):
            cache.attend_into(q, out, None)
        cache.attend_into(q.float(), out, None)  # float32 asks for its own arithmetic
    cache = make("nqkv4", heads=2, dim=128, batch=2)
    cache.append(*tokens(cache, 300))
    q = torch.randn((2, 8, 1, 128), device="cuda").bfloat16()
    out = torch.empty((2, 1, 8, 128), device="cuda")
    room = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    for bad, kind, message in [
        ((q[:1], out[:1], 1.0, room), ValueError, r"q: expected shape"),
        ((q, out[:, :, :4].contiguous(), 1.0, room), ValueError, r"out: expected shape"),
        ((q, out, 1.0, room[:1000]), ValueError, r"workspace: expected"),
        ((q.float(), out, 1.0, room), TypeError, r"q: expected dtype"),
        ((q.cpu(), out, 1.0, room), TypeError, r"q: expected a tensor on a CUDA device"),
    ]:
        with pytest.raises(kind, match=message):
            _core.cuda_attend(cache.core, *bad)
    check(cache, 4)
