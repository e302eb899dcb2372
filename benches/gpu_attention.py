"""Decode attention on pages beside PyTorch's bf16 attention, in one run on one CUDA device.

One step of one layer: every sequence has one query. A time is the median of replays of a CUDA graph
that holds one call, the calls of a row in turns; the L2 cache is flushed before each by reading a
buffer larger than it (a flush by writing would leave dirty lines to the call that is timed). The
peer is the fastest of cuDNN and flash SDPA, and of FlashInfer in bf16 if it is installed;
FlashInfer in fp8 has rows of its own. ``tb_per_s`` counts all bytes that the cache holds, once;
``percent_of_stream`` is against a reduction that only reads.

Three kinds of rows (``--rows``). ``shapes``: each scheme twice, ``SCHEME pages``, a context that
lies in pages only, and ``SCHEME``, as it is used, with sinks and tail. ``mixed``: lengths of a
batch by Zipf's law; the peer is the same kernel on equal lengths of as many pages. ``step``: an
append and the attention after it inside one graph; the peer writes into a preallocated bf16 cache
and attends that. A scheme or shape that no kernel takes is left out, with the reason.

``--json`` prints one object per row with the keys
``shape, scheme, bits, us, tb_per_s, percent_of_stream, peer, peer_us, ratio, rel_error``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_codecs import Clock
from gpu_peers import captured, peers, say, sdpa
from gpu_table import Output

from nqkv_rs import Scheme, _core, cuda_is_available
from nqkv_rs.cuda_cache import CudaLayerCache


class Shape(NamedTuple):
    """One step of one layer."""

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    dim: int
    context: int


SHAPES = [
    Shape("llama3-8b b64 s8192", 64, 32, 8, 128, 8192),
    Shape("opt-6.7b b8 s16384", 8, 32, 32, 128, 16384),
    Shape("llama3-8b b8 s32768", 8, 32, 8, 128, 32768),
    Shape("qwen2.5-7b b16 s32768", 16, 28, 4, 128, 32768),
    Shape("opt-6.7b b64 s2048", 64, 32, 32, 128, 2048),
    Shape("llama3-8b b128 s2048", 128, 32, 8, 128, 2048),
    Shape("llama3-8b b1 s131072", 1, 32, 8, 128, 131072),
    Shape("70b/tp8 b32 s16384", 32, 8, 1, 128, 16384),
    Shape("llama3-8b b1 s32768", 1, 32, 8, 128, 32768),
    Shape("llama3-8b b1 s8192", 1, 32, 8, 128, 8192),
]
MIXED = Shape("zipf b64 mean 4k max 64k", 64, 32, 8, 128, 65536)
MEAN = 4096
STEP = Shape("append+attend b32 s4096", 32, 32, 8, 128, 4096)


class Bench(NamedTuple):
    """What all rows share: the clock, and terabytes per second of a stream that is only read."""

    clock: Clock
    stream: float

    @classmethod
    def make(cls, repeat: int) -> Bench:
        """Measure the stream.

        Args:
            repeat: calls of which a time is the median.
        """
        clock = Clock(repeat)
        x = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
        graph = captured(x.sum)
        return cls(clock, 4 * x.numel() / clock.medians([graph.replay])[0] / 1e6)

    def times(self, graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
        """Microseconds of each."""
        calls: list[Callable[[], Any]] = [graph.replay for graph in graphs.values()]
        return dict(zip(graphs, self.clock.medians(calls), strict=True))

    def row(
        self,
        shape: str,
        scheme: str,
        elements: int,
        size: int,
        us: float,
        peer: tuple[str, float],
        error: float | None,
    ) -> dict[str, Any]:
        """One line of the table.

        Args:
            shape: its name.
            scheme: what is read.
            elements: keys' and values' numbers held.
            size: bytes that hold them.
            us: the time.
            peer: the peer's name and time.
            error: relative error, if there is a reference.
        """
        speed = size / us / 1e6
        return {
            "shape": shape,
            "scheme": scheme,
            "bits": round(8 * size / elements, 3),
            "us": round(us, 2),
            "tb_per_s": round(speed, 3),
            "percent_of_stream": round(100 * speed / self.stream, 1),
            "peer": peer[0],
            "peer_us": round(peer[1], 2),
            "ratio": round(peer[1] / us, 3),
            "rel_error": None if error is None else float(f"{error:.2g}"),
        }


def filled(scheme: Scheme, shape: Shape) -> CudaLayerCache:
    """A cache that holds random tokens."""
    cache = CudaLayerCache(
        scheme, kv_heads=shape.kv_heads, key_dim=shape.dim, batch=shape.batch, device="cuda"
    )
    step = max(
        64, min(shape.context, (1 << 29) // (shape.batch * shape.kv_heads * shape.dim) // 64 * 64)
    )
    cache.reserve(shape.context)
    for first in range(0, shape.context, step):
        more(cache, min(step, shape.context - first))
    cache.strict = True
    return cache


def more(cache: CudaLayerCache, tokens: int) -> None:
    """Append random tokens; keys have an offset of each channel."""
    shape = (cache.core.batch, cache.core.kv_heads, tokens, cache.key_dim)
    channels = torch.Generator(device="cuda").manual_seed(99)
    offset = torch.randn((1, shape[1], 1, shape[3]), device="cuda", generator=channels)
    k = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    cache.append(k + (3 * offset).bfloat16(), torch.randn_like(k))


def error_of(cache: CudaLayerCache, q: torch.Tensor, out: torch.Tensor) -> float:
    """Relative error of the first sequence against float64 on the dequantized cache."""
    one = cache.fork([0])
    heads, dim = q.shape[1], q.shape[3]
    k, v = one.read(0, one.tokens(), torch.float32)
    grouped = q[:1].double().reshape(1, k.shape[1], -1, dim)
    scores = torch.cat(
        [grouped @ x.double().transpose(-1, -2) for x in k.split(16384, dim=2)], dim=-1
    ) / math.sqrt(dim)
    weights = scores.softmax(-1)
    parts = zip(weights.split(16384, dim=-1), v.split(16384, dim=2), strict=True)
    expected = sum(w @ x.double() for w, x in parts).reshape(1, heads, dim)
    return float((out[:1, 0].double() - expected).norm() / expected.norm())


def bytes_of(cache: CudaLayerCache) -> int:
    """Bytes that a call must read: pages in use and exact tokens held."""
    core, sequences = cache.core, range(cache.core.batch)
    pages = sum(len(core.table(b)) for b in sequences)
    exact = sum(core.tokens(b) - core.packed(b) for b in sequences)
    token = 4 * cache.key_dim * core.kv_heads
    return pages * core.kv_heads * core.page_bytes + exact * token


def elements_of(cache: CudaLayerCache) -> int:
    """Numbers that a cache stands for."""
    return 2 * cache.key_dim * cache.core.kv_heads * sum(cache.core.lengths())


def variants(name: str, scheme: Scheme, shape: Shape) -> Iterator[tuple[str, Scheme]]:
    """The scheme in pages only and as it is used, where a kernel takes it."""
    only = Scheme.of(scheme, residual_length=0, sink_tokens=0)
    same = (scheme.residual_length, scheme.sink_tokens) == (0, 0)
    for label, one in ((f"{name} pages", only), (name, scheme)):
        if label == name and same:
            continue
        try:
            probe = CudaLayerCache(one, kv_heads=shape.kv_heads, key_dim=shape.dim, device="cuda")
        except (ValueError, NotImplementedError) as error:
            say(f"left out: {label}: {error}")
            continue
        size, expected = _core.cuda_attend_workspace(probe.core, shape.q_heads // shape.kv_heads)
        if size is None:
            say(
                f"left out: {label}, head size {shape.dim}: no kernel takes it: expected {expected}"
            )
            continue
        yield label, one


def queries(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, and where a result goes."""
    q = torch.randn((shape.batch, shape.q_heads, 1, shape.dim), device="cuda").bfloat16()
    return q, torch.empty((shape.batch, 1, shape.q_heads, shape.dim), device="cuda").bfloat16()


def shapes(bench: Bench, shape: Shape, schemes: dict[str, Scheme]) -> Iterator[dict[str, Any]]:
    """All rows of a shape."""
    size = (shape.batch, shape.kv_heads, shape.context, shape.dim)
    k = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    v = torch.randn_like(k)
    q, _ = queries(shape)
    graphs = peers(q, k, v)
    names = list(graphs)
    held: dict[str, tuple[CudaLayerCache, torch.Tensor]] = {}
    for name, scheme in schemes.items():
        for label, variant in variants(name, scheme, shape):
            cache, out = filled(variant, shape), queries(shape)[1]
            graphs[label] = captured(lambda c=cache, o=out: c.attend_into(q, o, None))
            held[label] = cache, out
    times = bench.times(graphs)
    peer = min((n for n in names if not n.endswith("fp8")), key=lambda n: times[n])
    best = peer, times[peer]
    for label, (cache, out) in held.items():
        sizes = elements_of(cache), bytes_of(cache)
        yield bench.row(shape.name, label, *sizes, times[label], best, error_of(cache, q, out))
    if "flashinfer fp8" in times:
        sizes = 2 * k.numel(), 2 * k.numel()
        yield bench.row(shape.name, "flashinfer fp8", *sizes, times["flashinfer fp8"], best, None)


def zipf(batch: int, mean: int, most: int) -> list[int]:
    """Pages of each sequence: the longest over a power of the rank, so that the mean is right."""
    low, high = 0.0, 4.0
    for _ in range(60):
        power = (low + high) / 2
        total = sum(most / rank**power for rank in range(1, batch + 1))
        low, high = (power, high) if total > mean * batch else (low, power)
    pages = [max(1, round(most / rank**low / 64)) for rank in range(1, batch + 1)]
    pages[1] += batch * mean // 64 - sum(pages)
    random.Random(0).shuffle(pages)
    return pages


def mixed(bench: Bench, shape: Shape, schemes: dict[str, Scheme]) -> Iterator[dict[str, Any]]:
    """A batch of mixed lengths against one of equal lengths with as many pages."""
    pages = zipf(shape.batch, MEAN, shape.context)
    q, out = queries(shape)
    for name, scheme in schemes.items():
        for label, variant in variants(name, scheme, shape):
            # Whole pages, then a tail: as texts leave them that have grown by themselves.
            sinks, tail = variant.sink_tokens, variant.residual_length
            caches = []
            for lengths in (pages, [MEAN // 64] * shape.batch):
                longest = shape._replace(context=sinks + 64 * max(lengths) + tail)
                cache = filled(variant, longest)
                cache.crop([sinks + 64 * n for n in lengths])
                if tail:
                    more(cache, tail)
                caches.append(cache)
            ours, equal = caches
            graphs = {
                key: captured(lambda c=cache, o=out: c.attend_into(q, o, None))
                for key, cache in (("mixed", ours), ("equal lengths", equal))
            }
            times = bench.times(graphs)
            ours.attend_into(q, out, None)
            sizes = elements_of(ours), bytes_of(ours)
            peer = "equal lengths", times["equal lengths"]
            error = error_of(ours, q, out)
            yield bench.row(shape.name, label, *sizes, times["mixed"], peer, error)
            del caches, ours, equal, graphs, cache


def step(bench: Bench, shape: Shape, schemes: dict[str, Scheme]) -> Iterator[dict[str, Any]]:
    """An append and the attention after it, in one graph."""
    size = (shape.batch, shape.kv_heads, shape.context + 64, shape.dim)
    keys = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    values = torch.randn_like(keys)
    k, v = (x[:, :, :1].contiguous() for x in (keys, values))
    q, _ = queries(shape)
    at = torch.tensor([shape.context], device="cuda")
    graphs: dict[str, torch.cuda.CUDAGraph] = {}

    def written() -> None:
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)

    end = shape.context + 1
    for name in ("cudnn", "flash"):

        def both(name: str = name) -> None:
            written()
            sdpa(name, q, keys[:, :, :end], values[:, :, :end])

        graphs[name] = captured(both)
    held = {}
    for name, scheme in schemes.items():
        for label, variant in variants(name, scheme, shape):
            if label != name and (scheme.residual_length, scheme.sink_tokens) != (0, 0):
                continue
            cache, out = filled(variant, shape), queries(shape)[1]
            replays = bench.clock.repeat + 3
            cache.reserve(replays + 8)

            def ours(c: CudaLayerCache = cache, o: torch.Tensor = out) -> None:
                c.core.append(k, v)
                c.attend_into(q, o, None)

            graphs[label] = captured(ours)
            held[label] = cache, out, replays
    times = bench.times(graphs)
    peer = min(("cudnn", "flash"), key=lambda n: times[n])
    for label, (cache, out, replays) in held.items():
        cache.advance(replays - 1)
        sizes = elements_of(cache), bytes_of(cache)
        error = error_of(cache, q, out)
        yield bench.row(
            shape.name, label, *sizes, times[label], (f"index_copy+{peer}", times[peer]), error
        )


def parse_shape(text: str) -> Shape:
    """``NAME:batch,q_heads,kv_heads,head_dim,context``."""
    name, numbers = text.rsplit(":", 1)
    return Shape(name, *(int(n) for n in numbers.split(",")))


def parse_scheme(text: str) -> tuple[str, Scheme]:
    """A preset's name; a scheme's JSON; or ``{"preset": NAME}`` with words of `Scheme.of`."""
    if not text.lstrip().startswith("{"):
        return text, Scheme.of(text)
    words = json.loads(text)
    if "preset" not in words:
        scheme = Scheme.of(words)
        return scheme.name, scheme
    preset = words.pop("preset")
    label = " ".join([preset, *(f"{key}={value}" for key, value in words.items())])
    return label, Scheme.of(preset, **words)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument(
        "--scheme",
        action="append",
        type=parse_scheme,
        help='a preset, JSON, or for example \'{"preset": "nqkv4", "nbits": 3}\' '
        "(default: nqkv4 and nqkv)",
    )
    parser.add_argument(
        "--shape",
        action="append",
        type=parse_shape,
        metavar="NAME:batch,q_heads,kv_heads,head_dim,context",
        help="instead of the issue's shapes; no other rows unless --rows asks for them",
    )
    kinds = ("shapes", "mixed", "step")
    parser.add_argument("--rows", action="append", choices=kinds, help="default: all")
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    if not cuda_is_available():
        print("skipped: no CUDA device")
        return
    torch.set_grad_enabled(False)
    schemes = dict(options.scheme or map(parse_scheme, ("nqkv4", "nqkv")))
    asked = options.rows or (["shapes"] if options.shape else kinds)
    bench = Bench.make(options.repeat)
    work: list[tuple[str, Any]] = []
    if "shapes" in asked:
        for shape in options.shape or SHAPES:
            work.append((shape.name, partial(shapes, bench, shape, schemes)))
    if "mixed" in asked:
        work.append((MIXED.name, partial(mixed, bench, MIXED, schemes)))
    if "step" in asked:
        work.append((STEP.name, partial(step, bench, STEP, schemes)))
    title = f"{torch.cuda.get_device_name()}, read-only stream {bench.stream:.2f} TB/s"
    with Output(title, options.json, len(work)) as output:
        for name, rows in work:
            output.begin(name)
            for row in rows():
                output.row(row)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
