"""`decode_attention`: the function over any library's arrays, and the operator for compilers."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import nqkv_rs
from nqkv_rs import LayerCache, decode_attention

torch = pytest.importorskip("torch")

from torch import library  # noqa: E402

from nqkv_rs import _tiles, ops  # noqa: E402

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not nqkv_rs.cuda_is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def make(device: str, scheme: str = "nqkv4", tokens: int = 300, batch: int = 2, **dims: int) -> Any:
    """A cache on a device with random tokens; the same ones on each."""
    words: dict[str, Any] = {"kv_heads": 2, "key_dim": 64, "batch": batch, **dims}
    words["exact_dtype"] = "bfloat16"
    if device == "cpu":
        cache: Any = LayerCache(scheme, **words)
    else:
        from nqkv_rs.cuda_cache import CudaLayerCache

        cache = CudaLayerCache(scheme, **words)
    k, v = new(cache, tokens, device)
    cache.append(k, v)
    return cache


def new(cache: Any, tokens: int, device: str, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    shape = (cache.core.batch, cache.core.kv_heads, tokens)
    k, v = (
        torch.randn((*shape, dim), generator=generator).to(device, torch.bfloat16)
        for dim in (cache.key_dim, cache.value_dim)
    )
    return k, v


def queries(cache: Any, device: str, n: int = 1, group: int = 4, dtype: Any = None) -> Any:
    shape = (cache.core.batch, group * cache.core.kv_heads, n, cache.key_dim)
    q = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    return q.to(device, dtype or torch.bfloat16)


def close(got: Any, expected: Any, bound: float = 5e-3) -> None:
    got, expected = (torch.as_tensor(x).double().cpu() for x in (got, expected))
    assert float((got - expected).norm() / expected.norm()) <= bound


WORDS: list[dict[str, Any]] = [
    {},
    {"scale": 0.3},
    {"starts": [0, 120]},
    {"window": 70},
    {"soft_cap": 3.0},
    {"starts": [5, 290], "window": 200, "soft_cap": 9.0},
]


@pytest.mark.parametrize("words", WORDS, ids=str)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_the_caches_own_attention(device: str, n: int, words: dict[str, Any]) -> None:
    cache, host = make(device), make("cpu")
    q = queries(cache, device, n)
    lse = torch.empty((2, n, 8))
    expected = host.attend(q.cpu().double(), lse=lse, **words)
    out = decode_attention(q, cache, **words)
    assert out.dtype == q.dtype and out.device == q.device and out.shape == (2, n, 8, 64)
    close(out, expected)
    out, got = decode_attention(q, cache, lse=True, **words)
    close(out, expected)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), lse, rtol=1e-2, atol=1e-2)
    if "starts" in words:
        words = {**words, "starts": torch.tensor(words["starts"], device=device)}
        assert torch.equal(decode_attention(q, cache, **words), out)


@pytest.mark.parametrize("device", DEVICES)
def test_it_writes_where_it_is_told(device: str) -> None:
    cache = make(device)
    q = queries(cache, device)
    out = torch.full((2, 1, 8, 64), torch.nan, device=device)
    lse = torch.full((2, 1, 8), torch.nan, device=device)
    both = decode_attention(q, cache, out=out, lse=lse)
    assert both[0] is out and both[1] is lse
    assert torch.equal(out.to(q.dtype), decode_attention(q, cache, lse=False))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_numpy_gives_numpy(dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    cache = make("cpu")
    q = queries(cache, "cpu").float().numpy().astype(dtype)
    out, lse = decode_attention(q, cache, lse=True)
    assert isinstance(out, np.ndarray) and out.dtype == q.dtype and lse.dtype == np.float32
    close(out.astype("float64"), cache.attend(q.astype("float64")))


@pytest.mark.gpu
@pytest.mark.skipif(not nqkv_rs.cuda_is_available(), reason="needs a CUDA device")
def test_cupy_gives_cupy() -> None:
    cupy = pytest.importorskip("cupy")
    cache = make("cuda")
    q = queries(cache, "cuda", dtype=torch.float16)
    expected, expected_lse = decode_attention(q, cache, lse=True)
    torch.cuda.synchronize()
    out, lse = decode_attention(cupy.from_dlpack(q), cache, lse=True, starts=cupy.zeros(2, "int32"))
    assert isinstance(out, cupy.ndarray) and out.dtype == "float16"
    close(torch.from_dlpack(out), expected, 1e-3)
    torch.testing.assert_close(torch.from_dlpack(lse), expected_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_one_message_says_what_was_expected(device: str) -> None:
    cache = make(device)
    q = queries(cache, device)
    empty = {"device": device}
    for bad, words, kind, message in [
        (q[0], {}, ValueError, r"q: expected shape \[batch, q_heads, n, key_dim\], got \[8, 1, 64"),
        (q.long(), {}, TypeError, r"q: expected dtype .*got int64"),
        ("q", {}, TypeError, r"q: expected an array"),
        (q[:1], {}, ValueError, r"q: expected shape|batch"),
        (q[..., :32], {}, ValueError, r"q: expected shape|key_dim"),
        (q[:, :3], {}, ValueError, r"q_heads: expected a multiple of 2"),
        (queries(cache, device, 301), {}, ValueError, r"queries: expected at most 300"),
        (q, {"window": 0}, ValueError, r"window: expected"),
        (q, {"scale": "1"}, TypeError, r"scale: expected a number"),
        (q, {"starts": [1]}, ValueError, r"starts: expected"),
        (q, {"starts": [-1, 0]}, ValueError, r"starts: expected"),
        (q, {"out": torch.empty(2, 1, 8, 63, **empty)}, ValueError, r"out: expected"),
        (q, {"out": torch.empty(2, 1, 8, 64, **empty).long()}, TypeError, r"out: expected dtype"),
        (q, {"lse": torch.empty(2, 8, **empty)}, ValueError, r"lse: expected"),
        (q, {"lse": torch.empty(2, 1, 8, **empty).half()}, TypeError, r"lse: expected dtype"),
        (q.float().requires_grad_(), {}, (TypeError, ValueError), r"(?i)grad"),
    ]:
        with pytest.raises(kind, match=message):
            decode_attention(bad, cache, **words)
    with pytest.raises(TypeError, match=r"cache: expected nqkv_rs\.LayerCache"):
        decode_attention(q, cache.core)


@pytest.mark.gpu
@pytest.mark.skipif(not nqkv_rs.cuda_is_available(), reason="needs a CUDA device")
def test_the_device_is_the_caches() -> None:
    host, device = make("cpu"), make("cuda")
    q = queries(host, "cpu")
    with pytest.raises(TypeError, match="q: expected an array in host memory"):
        decode_attention(q.cuda(), host)
    with pytest.raises(TypeError, match="q: expected an array on cuda:0, got one elsewhere"):
        decode_attention(q, device)
    with pytest.raises(TypeError, match="out: expected an array on cuda:0"):
        decode_attention(q.cuda(), device, out=torch.empty(2, 1, 8, 64))


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, numpy as np, nqkv_rs; c = nqkv_rs.LayerCache('nqkv4', kv_heads=1, key_dim=64);"
        "c.append(*np.ones((2, 1, 1, 9, 64), 'float32'));"
        "nqkv_rs.decode_attention(np.ones((1, 2, 1, 64), 'float32'), c);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("dims", [{}, {"value_dim": 32}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_operators_are_registered_rightly(device: str, dims: dict[str, int]) -> None:
    cache = make(device, **dims)
    name, q = ops.handle(cache), queries(cache, device, dtype=torch.float32)
    words = {"value_dim": cache.value_dim, "window": 90, "scale": 0.2}
    starts = torch.tensor([0, 250], device=device)
    for operator in (torch.ops.nqkv.decode_attention, torch.ops.nqkv.decode_attention_lse):
        library.opcheck(operator.default, (q, name), {**words, "starts": starts})
    library.opcheck(torch.ops.nqkv.append.default, (*new(cache, 3, device), name))
    assert ops.handle(cache) == name and cache.tokens() > 300


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_whole_and_once_for_all_layers(device: str) -> None:
    torch._dynamo.reset()
    layers, twins = ([make(device, tokens=100 + i) for i in range(3)] for _ in range(2))
    names = [ops.handle(cache) for cache in layers]

    def step(q: Any, k: Any, v: Any, name: Any) -> Any:
        before = ops.decode_attention(q, name)
        ops.append(k * 2, v, name)
        after, lse = ops.decode_attention(q, name, lse=True)
        return before + 1, after + 1, lse

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(70):
            for name, twin in zip(names, twins, strict=True):
                q, (k, v) = queries(twin, device), new(twin, 1, device, i)
                expected = [decode_attention(q, twin) + 1]
                twin.append(k * 2, v)
                out, lse = decode_attention(q, twin, lse=True)
                got = compiled(q, k, v, name)
                for mine, theirs in zip(got, [*expected, out + 1, lse], strict=True):
                    assert torch.equal(mine, theirs)
    assert [c.tokens() for c in layers] == [c.tokens() for c in twins]


def test_a_handle_keeps_nothing_and_says_so() -> None:
    cache = make("cpu")
    name, q = ops.handle(cache), queries(cache, "cpu")
    with pytest.raises(ValueError, match="value_dim: expected 64"):
        ops.decode_attention(q, name, value_dim=32)
    with pytest.raises(TypeError, match="expected a handle"):
        ops.decode_attention(q, torch.zeros(2))
    del cache
    gc.collect()
    with pytest.raises(ValueError, match="living cache"):
        ops.decode_attention(q, name)
    with pytest.raises(TypeError, match="cache: expected"):
        ops.handle(q)


class Held:
    """What attention over tiles asks of a cache, over plain tensors."""

    def __init__(self, k: Any, v: Any) -> None:
        self.k, self.v, self.core = k, v, self
        self.kv_heads, self.key_dim, self.value_dim = k.shape[1], k.shape[3], v.shape[3]

    def lengths(self) -> list[int]:
        return [self.k.shape[2]] * self.k.shape[0]

    def read(self, start: int, *words: Any) -> Any:
        if isinstance(words[0], int):
            rows = slice(start, start + words[0])
            return tuple(x[:, :, rows].to(words[1]) for x in (self.k, self.v))
        for source, target in zip((self.k, self.v), words, strict=True):
            target.copy_(source[:, :, start : start + target.shape[2]])
        return None


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("history", [0, 1, 1023, 1024, 2500])
@pytest.mark.parametrize("device", DEVICES)
def test_chunks_on_a_history_go_by_tiles(
    device: str, history: int, fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tiles, "WORKSPACE", 1)
    batch, heads, group, n, dim = 2, 2, 3, 40, 64
    made = torch.randn(
        (2, batch, heads, history + n, dim), generator=torch.Generator().manual_seed(1)
    )
    k, v = made.to(device)
    held: Any = Held(k, v)
    q = torch.randn((batch, n, heads * group, dim), device=device).bfloat16().transpose(1, 2)
    given = tuple(x[:, :, history:].bfloat16() for x in (k, v)) if fresh else None
    out = [
        torch.empty((batch, n, heads * group, dim), device=device, dtype=d)
        for d in (q.dtype, torch.float32)
    ]
    lse = [torch.empty((batch, n, heads * group), device=device) for _ in out]
    for result, its in zip(out, lse, strict=True):
        # The dtype of the result decides which way is taken.
        assert _tiles._flash_takes(held, q, result, held.lengths()) == (result.dtype == q.dtype)
        _tiles.attend(held, q, result, 0.2, None, given, None, None, its)
    close(out[0], out[1])
    torch.testing.assert_close(lse[0], lse[1], rtol=0, atol=2e-2)
