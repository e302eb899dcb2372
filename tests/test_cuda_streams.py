"""The cache on a CUDA device among streams, threads, graphs and devices."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import nqkv_rs

torch = pytest.importorskip("torch")

from test_cuda_cache import Pair  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not nqkv_rs.cuda_is_available(), reason="needs a CUDA device"),
]
SCHEMES = ["nqkv4", "nqkv", "kivi2"]


def together(*work: Callable[[], None]) -> None:
    """Run each in a thread of its own; the first error is this one's."""
    errors: list[BaseException] = []

    def run(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Graph:
    """An append of some tokens in a CUDA graph, and the same tokens on the host."""

    def __init__(self, pair: Pair, tokens: int, replays: int) -> None:
        self.pair, self.tokens, self.captured = pair, tokens, True
        self.k, self.v = (x.cuda() for x in pair.tokens(tokens))
        nqkv_rs.warmup()
        pair.device.reserve(tokens * replays)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            pair.device.append(self.k, self.v)

    def replay(self) -> None:
        k, v = self.pair.tokens(self.tokens)
        self.pair.host.append(k, v)
        self.k.copy_(k)
        self.v.copy_(v)
        self.graph.replay()
        # The capture has counted the first one.
        if not self.captured:
            self.pair.device.advance(self.tokens)
        self.captured = False


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_graph_seals_and_fills_pages(scheme: str, tokens: int) -> None:
    pair = Pair(scheme, dims=(128, 64), batch=3)
    pair.append(50)
    for cache in (pair.host, pair.device):
        cache.crop([50, 31, 3])
    graph = Graph(pair, tokens, 300 // tokens)
    for _ in range(300 // tokens):
        graph.replay()
    pair.check()
    # Eager appends and graphs take turns.
    pair.append(70)
    pair.check()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_replays_beyond_what_was_reserved_change_nothing(scheme: str) -> None:
    pair = Pair(scheme, batch=2)
    pair.append(50)
    for cache in (pair.host, pair.device):
        cache.crop([50, 20])
    graph = Graph(pair, 1, 100)
    for _ in range(100):
        graph.replay()
    pair.check()
    with pytest.raises(ValueError, match=r"tokens to advance by: expected at most \d+"):
        pair.device.advance(1000)
    # The pages that were reserved are filled to their end, and no token lands anywhere else.
    lengths = [pair.device.tokens(b) for b in range(2)]
    before = pair.device.read(0, max(lengths))
    for _ in range(500):
        graph.graph.replay()
    after = pair.device.read(0, max(lengths))
    for x, y in zip(before, after, strict=True):
        for b, length in enumerate(lengths):
            assert torch.equal(x[b, :, :length], y[b, :, :length])
    # The host says what the sequences are: it knows nothing of those replays.
    for cache in (pair.host, pair.device):
        cache.crop([length - 1 for length in lengths])
    pair.append(200)
    pair.check()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_that_a_crop_gave_back_are_not_written_to(scheme: str) -> None:
    pair = Pair(scheme, batch=2)
    pair.append(50)
    graph = Graph(pair, 1, 400)
    for _ in range(100):
        graph.replay()
    pair.check()
    for cache in (pair.host, pair.device):
        cache.reset()
    # The device hears of it; rows that the graph filled or had in reserve are anyone's.
    pair.device.reserve(0)
    before = [x.clone() for x in pair.device.pool]
    for _ in range(400):
        graph.graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(before, pair.device.pool, strict=True))
    for cache in (pair.host, pair.device):
        cache.reset()
    pair.append(200)
    pair.check()


def test_what_a_graph_cannot_hold_is_refused() -> None:
    pair = Pair("nqkv4")
    pair.append(100)
    nqkv_rs.warmup()
    while pair.device.core.rows_missing(1) == 0:
        pair.append(1)
    for tokens, message in [(1, "reserve"), (17, "up to 16 tokens")]:
        k, v = (x.cuda() for x in pair.tokens(tokens))
        graph = torch.cuda.CUDAGraph()
        with (
            pytest.raises(ValueError, match=rf"stream: expected one that no CUDA graph.*{message}"),
            torch.cuda.graph(graph),
        ):
            pair.device.append(k, v)
        torch.cuda.synchronize()
        pair.check()
        pair.device.reserve(100)


def test_a_side_stream_with_events() -> None:
    first, second = Pair("nqkv4"), Pair("nqkv")
    side = torch.cuda.Stream()
    for n in [100, 1, 1, 64, 1]:
        # Tokens that the current stream makes, appended on another one.
        k, v = first.tokens(n)
        first.host.append(k, v)
        k, v = k.cuda() * 2, v.cuda() * 2
        made = torch.cuda.Event()
        made.record()
        with torch.cuda.stream(side):
            side.wait_event(made)
            first.device.append(k / 2, v / 2)
            done = torch.cuda.Event()
            done.record()
        second.append(n)
        torch.cuda.current_stream().wait_event(done)
        first.check()
        second.check()


def test_threads_append_to_caches_of_their_own() -> None:
    pairs = [Pair(scheme) for scheme in SCHEMES]

    def work(pair: Pair) -> Callable[[], None]:
        def run() -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for n in [100] + [1] * 150:
                    pair.append(n)
                torch.cuda.current_stream().synchronize()

        return run

    together(*(work(pair) for pair in pairs))
    for pair in pairs:
        pair.check()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_threads_append_to_one_cache(scheme: str) -> None:
    """Calls are whole: every token is there once, in some order."""
    pair = Pair(scheme, heads=1, batch=2)
    steps = 200

    def work(value: float) -> Callable[[], None]:
        k = torch.full((2, 1, 1, 64), value, device="cuda", dtype=torch.bfloat16)

        def run() -> None:
            for _ in range(steps):
                pair.device.append(k, k)
                assert pair.device.tokens() > 0

        return run

    together(work(1.0), work(-2.0))
    assert pair.device.tokens(0) == pair.device.tokens(1) == 2 * steps
    _, v = pair.device.read(0, 2 * steps)
    # A value's block is one number, so that it comes back as it was.
    found = v[..., 0].flatten()
    assert int((found == 1.0).sum()) == int((found == -2.0).sum()) == 2 * steps


def test_the_device_is_the_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    far = nqkv_rs.cuda_cache.CudaLayerCache(
        "nqkv4", kv_heads=2, key_dim=64, batch=2, device="cuda:1"
    )
    pair = Pair("nqkv4")
    near = pair.device
    for n in [100, 1, 70]:
        k, v = pair.tokens(n)
        pair.host.append(k, v)
        near.append(k.cuda(), v.cuda())
        far.append(k.to("cuda:1"), v.to("cuda:1"))
    pair.check()
    pair.device = far
    pair.check()
    k, v = (x.cuda(0) for x in pair.tokens(1))
    for bad in [(k, v), (k.to("cuda:1"), v)]:
        with pytest.raises(TypeError, match=r"[kv]: expected a tensor on CUDA device 1, got one"):
            far.append(*bad)
    pair.check()


def test_keys_and_values_of_another_device_than_the_cache() -> None:
    pair = Pair("nqkv4")
    pair.append(3)
    k, v = (x.cuda() for x in pair.tokens(1))
    for bad, message in [
        ((k.cpu(), v), "k: expected a tensor on a CUDA device"),
        ((k, v.cpu()), "v: expected a tensor on a CUDA device"),
        ((k, None), "v: expected an array on a CUDA device"),
    ]:
        with pytest.raises(TypeError, match=message):
            pair.device.append(*bad)
    pair.check()
