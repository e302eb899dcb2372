"""The cache on a CUDA device: the CPU's pages byte for byte, whatever is done to it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nqkv_rs
from nqkv_rs import LayerCache, Scheme

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not nqkv_rs.cuda_is_available(), reason="needs a CUDA device"),
]
if nqkv_rs.cuda_is_available():
    from nqkv_rs.cuda_cache import CudaLayerCache


def zeros(rows: int, heads: int, size: int) -> Any:
    return np.zeros((rows, heads, size), dtype=np.uint8)


class Pair:
    """One cache on each side."""

    def __init__(
        self,
        scheme: Any,
        heads: int = 2,
        dims: tuple[int, int] = (64, 64),
        batch: int = 2,
        exact: str = "bfloat16",
    ) -> None:
        words: dict[str, Any] = dict(
            kv_heads=heads, key_dim=dims[0], value_dim=dims[1], batch=batch, exact_dtype=exact
        )
        self.host = LayerCache(scheme, allocate=zeros, **words)
        self.device = CudaLayerCache(scheme, **words)
        self.heads, self.dims, self.seed = heads, dims, 0

    def tokens(self, n: int, dtype: str = "bfloat16", batch: int | None = None) -> tuple[Any, Any]:
        """New keys and values, with an outlier channel."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        batch = self.host.core.batch if batch is None else batch
        k, v = (torch.randn((batch, self.heads, n, d), generator=generator) for d in self.dims)
        k[..., 3] += 7.0
        return k.to(getattr(torch, dtype)), v.to(getattr(torch, dtype))

    def append(self, n: int, dtype: str = "bfloat16") -> None:
        k, v = self.tokens(n, dtype)
        self.host.append(k, v)
        self.device.append(k.cuda(), v.cuda())

    def check(self) -> None:
        """Tables, pages and every number are equal."""
        pools = [
            torch.cat([torch.as_tensor(p).cpu() for p in c.pool]) if c.pool else None
            for c in (self.host, self.device)
        ]
        longest = 0
        for b in range(self.host.core.batch):
            mine, theirs = self.host.core.table(b), self.device.core.table(b)
            assert [c for _, c in mine] == [c for _, c in theirs]
            for (row, count), (other, _) in zip(mine, theirs, strict=True):
                if count == 64:
                    assert torch.equal(pools[0][row], pools[1][other])
            assert self.host.tokens(b) == self.device.tokens(b)
            longest = max(longest, self.host.tokens(b))
        k, v = self.device.read(0, longest)
        for b in range(self.host.core.batch):
            n = self.host.tokens(b)
            a, c = (
                np.empty((self.heads, n, self.dims[0]), "f4"),
                np.empty((self.heads, n, self.dims[1]), "f4"),
            )
            self.host.core.read(b, 0, a, c)
            np.testing.assert_array_equal(k[b, :, :n].cpu().numpy().view("i4"), a.view("i4"))
            np.testing.assert_array_equal(v[b, :, :n].cpu().numpy().view("i4"), c.view("i4"))
            assert not k[b, :, n:].any() and not v[b, :, n:].any()

    def check_attention(self, queries: int = 1, group: int = 3, **words: Any) -> None:
        """Attention in float64 on both sides."""
        batch = self.host.core.batch
        q = torch.randn((batch, self.heads * group, queries, self.dims[0]), dtype=torch.float64)
        shape = (batch, queries, self.heads * group)
        lse = torch.empty(shape), torch.empty(shape, device="cuda")
        expected = torch.as_tensor(self.host.attend(q, lse=lse[0], **words))
        if "fresh" in words:
            words["fresh"] = tuple(x.cuda() for x in words["fresh"])
        got = self.device.attend(q.cuda(), lse=lse[1], **words)
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(lse[1].cpu(), lse[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 128), (128, 128), (256, 256), (20, 16)])
@pytest.mark.parametrize("scheme", nqkv_rs.presets())
def test_appends(scheme: str, dims: tuple[int, int]) -> None:
    pair = Pair(scheme, dims=dims)
    for n in [0, 1, 2, 63, 1, 64, 65, 1, 1, 200, 130, 1]:
        pair.append(n)
        pair.check()
    pair.check_attention()


@pytest.mark.parametrize("exact", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
def test_dtypes(scheme: str, dtype: str, exact: str) -> None:
    pair = Pair(scheme, exact=exact)
    for n in [150, 1, 1]:
        pair.append(n, dtype)
    pair.check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("scheme", nqkv_rs.presets())
def test_long_prompts(scheme: str, dim: int, dtype: str) -> None:
    """Enough tokens for the fast ways, from every layout; float32 takes the general one."""
    pair = Pair(scheme, heads=3, dims=(dim, dim), batch=3, exact=dtype)
    for i, n in enumerate([17, 700, 64, 63, 1, 129, 95]):
        k, v = pair.tokens(n, dtype)
        pair.host.append(k, v)
        k, v = k.cuda(), v.cuda()
        if i % 3 == 1:  # [batch, tokens, heads, dim]
            k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        elif i % 3 == 2:  # rows that are not aligned to 16 bytes
            k, v = (torch.nn.functional.pad(x, (0, 3))[..., :dim] for x in (k, v))
        pair.device.append(k, v)
        pair.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv", "kivi4"])
def test_any_range_is_read(scheme: str, dtype: Any) -> None:
    pair = Pair(scheme, heads=2, dims=(80, 128), batch=3)
    pair.append(500)
    for lengths in [[500, 500, 500], [500, 300, 2], [499, 130, 0]]:
        for cache in (pair.host, pair.device):
            cache.crop(lengths)
        whole = pair.device.read(0, 500)
        pair.check()
        for start, n in [
            (0, 1),
            (3, 2),
            (4, 64),
            (60, 200),
            (67, 1),
            (431, 69),
            (490, 30),
            (0, 500),
        ]:
            got = pair.device.read(start, n, dtype)
            for mine, all_ in zip(got, whole, strict=True):
                part = all_[:, :, start : start + n].to(dtype)
                assert torch.equal(mine[:, :, : part.shape[2]], part)
                assert not mine[:, :, part.shape[2] :].any()


SIDES = [
    ("key", {"scale": "absmax"}),
    ("key", {"scale": "minmax", "scale_dtype": "fp32"}),
    ("key", {"scale": "signed_absmax", "block": 32}),
    ("key", {"scale": "rms"}),
    ("key", {"codebook": "int4", "block": 16}),
    ("key", {"axis": "channel", "block": 32, "scale": "signed_absmax"}),
    ("key", {"axis": "channel", "block": 64, "span": "heads", "scale": "minmax"}),
    ("value", {"block": 16}),
    ("value", {"block": 512, "scale": "minmax", "scale_dtype": "bf16"}),
    ("value", {"block": 256, "span": "heads", "scale": "signed_absmax"}),
    ("value", {"codebook": "e2m1", "block": 48, "scale": "signed_absmax"}),
    ("key", {"codebook": "nf2"}),
    ("key", {"codebook": "nf3", "block": 32}),
    ("key", {"codebook": "nf5", "block": 16}),
    ("key", {"codebook": "int6", "scale": "minmax"}),
    ("key", {"codebook": "int8", "scale": "absmax", "scale_dtype": "fp32"}),
    ("key", {"widths": [8, 6, 4, 2]}),
    ("key", {"codebook": "lloyd4", "widths": [5, 3, 1, 0]}),
    ("key", {"scale": "signed_absmax", "scale_dtype": "e4m3"}),
    ("key", {"axis": "channel", "block": 48, "scale": "rms", "scale_dtype": "bf16"}),
    ("key", {"axis": "channel", "block": 128, "span": "heads", "scale": "minmax"}),
    ("key", {"channel_order": [list(range(63, -1, -1)), [*range(1, 64), 0]]}),
    ("value", {"codebook": "nf3", "scale": "mean_absmax"}),
    ("value", {"codebook": "int8", "block": 16, "scale_dtype": "e4m3"}),
    ("value", {"block": 32, "scale": "signed_absmax"}),
    ("value", {"block": 256, "span": "heads", "scale": "rms"}),
]


@pytest.mark.parametrize(("side", "words"), SIDES)
def test_every_codec(side: str, words: dict[str, Any]) -> None:
    base = Scheme.of("nqkv4").to_dict() if hasattr(Scheme.of("nqkv4"), "to_dict") else None
    if base is None:
        import json

        base = json.loads(Scheme.of("nqkv4").to_json())
    base[side].update(words)
    for exact in ("bfloat16", "float16", "float32"):
        pair = Pair(base, exact=exact)
        for n in [100, 1, 70, 17]:
            pair.append(n, exact)
        pair.check()


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv", "kivi2"])
def test_operations(scheme: str) -> None:
    pair = Pair(scheme, batch=2)
    pair.append(300)
    for lengths in [[299, 299], [250, 140], [250, 70], [3, 64]]:
        for cache in (pair.host, pair.device):
            cache.crop(lengths)
        pair.check()
        pair.append(5)
        pair.check()
        pair.append(90)
        pair.check()
    for chosen in [[1, 0], [0, 0, 1], [2, 1], [1]]:
        for cache in (pair.host, pair.device):
            cache.select(chosen)
        pair.check()
        pair.append(1)
        pair.append(70)
        pair.check()
    pair.check_attention(queries=3, window=40)
    before = pair.device.read(0, pair.host.tokens())
    forks = Pair(scheme, batch=1)
    forks.seed = 99
    forks.host, forks.device = pair.host.fork(), copy.deepcopy(pair.device)
    forks.check()
    forks.append(100)
    forks.check()
    after = pair.device.read(0, pair.host.tokens())
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    pair.append(130)
    pair.check()
    forks.check()
    for cache in (pair.host, pair.device):
        cache.reset()
    pair.append(80)
    pair.check()


def test_attention_of_every_kind() -> None:
    pair = Pair("nqkv4", dims=(64, 32), batch=3)
    pair.append(5000)
    pair.check_attention(starts=[0, 100, 4990], queries=5)
    pair.check_attention(window=70, queries=2, soft_cap=3.0)
    pair.check_attention(group=1, scale=0.3)
    for cache in (pair.host, pair.device):
        cache.crop([5000, 10, 4097])
    pair.check_attention(queries=2, starts=[0, 9, 0])
    k, v = pair.tokens(7)
    pair.host.append(k, v)
    pair.device.append(k.cuda(), v.cuda())
    pair.check_attention(queries=7, fresh=(k, v))


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
def test_a_graph_appends_with_lengths_on_the_device(scheme: str) -> None:
    pair = Pair(scheme)
    pair.append(50)
    k, v = (x.cuda() for x in pair.tokens(1))
    nqkv_rs.warmup()
    pair.device.reserve(200)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.device.core.append(k, v)
    # Capturing has counted one token, but run none.
    for i in range(150):
        a, b = pair.tokens(1)
        pair.host.append(a, b)
        k.copy_(a)
        v.copy_(b)
        graph.replay()
        if i > 0:
            pair.device.advance(1)
    pair.check()


def test_two_streams_and_threads() -> None:
    import threading

    pairs = [Pair("nqkv4") for _ in range(4)]

    def work(pair: Pair) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for n in [100, 1, 1, 200]:
                pair.append(n)
            torch.cuda.current_stream().synchronize()
            pair.check()

    threads = [threading.Thread(target=work, args=(p,)) for p in pairs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for pair in pairs:
        pair.check()


def test_bad_input_leaves_the_cache_as_it_was() -> None:
    pair = Pair("nqkv4")
    pair.append(100)
    k, v = (x.cuda() for x in pair.tokens(3))
    for bad, kind, message in [
        ((k[:1], v), ValueError, r"k: expected shape \[2, 2, 3, 64\], got \[1, 2, 3, 64\]"),
        ((k, v[..., :5]), ValueError, r"v: expected shape"),
        ((k.cpu(), v), TypeError, r"k: expected a tensor on a CUDA device"),
        ((k.long(), v), TypeError, r"k: expected dtype"),
    ]:
        with pytest.raises(kind, match=message):
            pair.device.append(*bad)
    with pytest.raises(ValueError, match=r"at most 100"):
        pair.device.crop(101)
    with pytest.raises(ValueError, match=r"sequence index"):
        pair.device.select([2])
    pair.check()


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv", "kivi2"])
def test_to_the_host_and_back(scheme: str, tmp_path: Path) -> None:
    pair = Pair(scheme, dims=(64, 128))
    for n in (150, 1, 130):
        pair.append(n)
    for cache in (pair.host, pair.device):
        cache.select([1, 0, 1])
        cache.crop([200, 281, 3])
    pair.append(70)
    pair.device.save(tmp_path / "device")
    pair.host.save(tmp_path / "host")
    saved = [LayerCache.load(tmp_path / name) for name in ("device", "host")]
    # Rows stand in the order of the tables, so equal caches make equal files.
    assert (tmp_path / "device").read_bytes() == (tmp_path / "host").read_bytes()
    assert saved[0].core.table(2) == saved[1].core.table(2)
    pair.device = CudaLayerCache.load(tmp_path / "host")
    pair.check()
    pair.append(100)
    pair.check()
    pair.check_attention()


def test_an_empty_cache_goes_both_ways() -> None:
    host = CudaLayerCache("nqkv4", kv_heads=2, key_dim=64, batch=2).to_host()
    assert [host.tokens(b) for b in range(2)] == [0, 0]
    assert CudaLayerCache.of_host(host).tokens() == 0
    other = LayerCache("nqkv4", kv_heads=2, key_dim=64)
    with pytest.raises(ValueError, match="cache: expected one of the same scheme"):
        CudaLayerCache("nqkv", kv_heads=2, key_dim=64).core.fill(other.core, torch.zeros(1).cuda())
