"""Decode attention on pages beside PyTorch's bf16 attention, in one run on one CUDA device.

One step of one layer: every sequence has one query. A time is the median of replays of a CUDA graph
that holds one call, the calls of a row in turns; the L2 cache is flushed before each by reading a
buffer larger than it (a flush by writing would leave dirty lines to the call that is timed). The
peer is the fastest of cuDNN and flash SDPA. ``tb_per_s`` counts all bytes that the cache holds,
once; ``percent_of_stream`` is against a reduction that only reads.


Each scheme gives two rows: ``SCHEME pages``, a context that lies in pages only, and ``SCHEME``, as
it is used, with sinks and tail. ``--json`` prints one object per row with the keys
``shape, scheme, bits, us, tb_per_s, percent_of_stream, peer, peer_us, ratio, rel_error``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpu_codecs import Clock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nqkv_rs import Scheme, cuda_is_available
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


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph that holds one call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def stream_speed(clock: Clock) -> float:
    """Terabytes per second of a reduction that only reads."""
    x = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    graph = captured(x.sum)
    return 4 * x.numel() / clock.medians([graph.replay])[0] / 1e6


def peers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """bf16 attention, by name."""
    grouped = q.shape[1] != k.shape[1]

    def sdpa(backend: SDPBackend) -> Callable[[], Any]:
        def call() -> torch.Tensor:
            with sdpa_kernel([backend]):
                return scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

        return call

    calls = {
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash": sdpa(SDPBackend.FLASH_ATTENTION),
    }
    working = {}
    for name, call in calls.items():
        try:
            call()
        except RuntimeError:
            continue
        working[name] = call
    return working


def filled(scheme: Scheme, shape: Shape) -> CudaLayerCache:
    """A cache that holds random tokens."""
    cache = CudaLayerCache(
        scheme, kv_heads=shape.kv_heads, key_dim=shape.dim, batch=shape.batch, device="cuda"
    )
    step = max(
        64, min(shape.context, (1 << 29) // (shape.batch * shape.kv_heads * shape.dim) // 64 * 64)
    )
    cache.reserve(shape.context)
    offset = 3 * torch.randn((1, shape.kv_heads, 1, shape.dim), device="cuda")
    for first in range(0, shape.context, step):
        n = min(step, shape.context - first)
        k = torch.randn(
            (shape.batch, shape.kv_heads, n, shape.dim), device="cuda", dtype=torch.bfloat16
        )
        v = torch.randn_like(k)
        cache.append(k + offset.bfloat16(), v)
    return cache


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


def pages_only(scheme: Scheme) -> Scheme:
    """The scheme without sinks and window."""
    return Scheme.of(scheme, residual_length=0, sink_tokens=0)


def rows(clock: Clock, stream: float, shape: Shape, schemes: list[str]) -> list[dict[str, Any]]:
    """All rows of a shape."""
    size = (shape.batch, shape.kv_heads, shape.context, shape.dim)
    k = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    v = torch.randn_like(k)
    q = torch.randn((shape.batch, shape.q_heads, 1, shape.dim), device="cuda").bfloat16()
    calls = peers(q, k, v)
    graphs = {name: captured(call) for name, call in calls.items()}
    held: dict[str, tuple[CudaLayerCache, torch.Tensor]] = {}
    for name in schemes:
        for label, scheme in (
            (f"{name} pages", pages_only(Scheme.of(name))),
            (name, Scheme.of(name)),
        ):
            if label == name and scheme == pages_only(scheme):
                continue
            cache = filled(scheme, shape)
            cache.strict = True
            out = torch.empty((shape.batch, 1, shape.q_heads, shape.dim), device="cuda").bfloat16()

            def call(cache: CudaLayerCache = cache, out: torch.Tensor = out) -> None:
                cache.attend_into(q, out, None)

            graphs[label] = captured(call)
            held[label] = cache, out
    times = dict(
        zip(graphs, clock.medians([graph.replay for graph in graphs.values()]), strict=True)
    )
    peer = min(calls, key=lambda name: times[name])
    found = []
    for label, (cache, out) in held.items():
        bytes_held = _bytes(cache, shape)
        us = times[label]
        speed = bytes_held / us / 1e6
        found.append(
            {
                "shape": shape.name,
                "scheme": label,
                "bits": round(8 * bytes_held / (2 * math.prod(size)), 3),
                "us": round(us, 2),
                "tb_per_s": round(speed, 3),
                "percent_of_stream": round(100 * speed / stream, 1),
                "peer": peer,
                "peer_us": round(times[peer], 2),
                "ratio": round(times[peer] / us, 3),
                "rel_error": float(f"{error_of(cache, q, out):.2g}"),
            }
        )
    return found


def _bytes(cache: CudaLayerCache, shape: Shape) -> int:
    """Bytes that a call must read: pages in use and exact tokens held."""
    pages = sum(len(cache.core.table(b)) for b in range(shape.batch))
    exact = sum(cache.tokens(b) - cache.core.packed(b) for b in range(shape.batch))
    token = 4 * shape.dim * shape.kv_heads
    return pages * shape.kv_heads * cache.core.page_bytes + exact * token


def parse_shape(text: str) -> Shape:
    """``NAME:batch,q_heads,kv_heads,head_dim,context``."""
    name, numbers = text.rsplit(":", 1)
    return Shape(name, *(int(n) for n in numbers.split(",")))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--scheme", action="append", help="default: nqkv4, nqkv")
    parser.add_argument("--shape", action="append", type=parse_shape)
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    if not cuda_is_available():
        print("skipped: no CUDA device")
        return
    clock = Clock(options.repeat)
    stream = stream_speed(clock)
    if not options.json:
        print(f"{torch.cuda.get_device_name()}, read-only stream {stream:.2f} TB/s")
    for shape in options.shape or SHAPES:
        for row in rows(clock, stream, shape, options.scheme or ["nqkv4", "nqkv"]):
            if options.json:
                print(json.dumps(row), flush=True)
            else:
                print(
                    f"{row['shape']:22} {row['scheme']:12} {row['us']:8.1f} us"
                    f" {row['tb_per_s']:5.2f} TB/s {row['percent_of_stream']:5.1f} %"
                    f" {row['peer']} {row['peer_us']:7.1f} us  x {row['ratio']:.2f}"
                    f"  error {row['rel_error']}",
                    flush=True,
                )
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
