"""Tensor codecs on a CUDA device, side by side with a copy and with bitsandbytes, in one run.

Times are medians of single calls between two events; the L2 cache is flushed before each by reading
a buffer larger than it. ``bytes`` are those that the work must read and write; ``read only`` is a
sum. ``--json`` prints one object per row with the keys
``work, shape, scheme, us, bytes, tb_per_s, percent_of_copy, peer, peer_us, ratio``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

import nqkv_rs

FLUSH = 256 << 20


class Clock:
    """Medians of calls in turns, each after a flush of the L2 cache."""

    def __init__(self, repeat: int) -> None:
        self.repeat = repeat
        self.room = torch.ones(FLUSH // 4, device="cuda")

    def medians(self, calls: list[Callable[[], Any]]) -> list[float]:
        """Microseconds of each call on the device.

        The flush keeps the device busy while the call is enqueued, so that the time between the
        events around it is the device's alone.

        Args:
            calls: what to time.
        """
        times: list[list[float]] = [[] for _ in calls]
        for i in range(self.repeat + 3):
            for call, seen in zip(calls, times, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.room.sum()
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                if i >= 3:
                    seen.append(1e3 * start.elapsed_time(end))
        return [statistics.median(seen) for seen in times]


def row(
    work: str, shape: str, scheme: str, us: float, size: int, copy: float, peer: str, peer_us: float
) -> dict[str, Any]:
    """One line of the table; ``copy`` is the copy's terabytes per second."""
    speed = size / us / 1e6
    return {
        "work": work,
        "shape": shape,
        "scheme": scheme,
        "us": round(us, 2),
        "bytes": size,
        "tb_per_s": round(speed, 3),
        "percent_of_copy": round(100 * speed / copy, 1),
        "peer": peer,
        "peer_us": round(peer_us, 2),
        "ratio": round(peer_us / us, 2),
    }


def flat(clock: Clock, elements: int) -> Iterator[dict[str, Any]]:
    """NF4 in blocks of 64, from and to bf16."""
    x = torch.randn(elements, device="cuda").bfloat16()
    q = nqkv_rs.quantize(x, flat=True, order="high")
    out = torch.empty_like(x)
    source = x.clone()
    from nqkv_rs import _core

    words = ("nf4", 64, "absmax", "fp32", True, "high")
    calls: list[Callable[[], Any]] = [
        lambda: _core.cuda_quantize(x, q.codes, q.fields, *words),
        lambda: nqkv_rs.dequantize(q, out=out),
        lambda: out.copy_(source),
        lambda: source.view(torch.float32).sum(),
    ]
    peer = "none"
    try:
        from bitsandbytes import functional as bnb

        packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
        calls += [
            lambda: bnb.quantize_4bit(x, blocksize=64, quant_type="nf4"),
            lambda: bnb.dequantize_4bit(packed, state, out=out),
        ]
        peer = "bitsandbytes"
    except ImportError:
        pass
    quantize, dequantize, copy, read, *theirs = clock.medians(calls)
    theirs = theirs or [copy, copy]
    copied = 4 * elements / copy / 1e6
    size = 2 * elements + q.codes.numel() + q.fields.numel()
    shape = f"flat:{elements}"
    name = peer if peer != "none" else "copy of bf16"
    yield row("copy", shape, "bf16", copy, 4 * elements, copied, "copy of bf16", copy)
    yield row("read only", shape, "bf16", read, 2 * elements, copied, "copy of bf16", copy)
    yield row("quantize", shape, "nf4 block 64", quantize, size, copied, name, theirs[0])
    yield row("dequantize", shape, "nf4 block 64", dequantize, size, copied, name, theirs[1])


def copy_speed(clock: Clock, elements: int) -> float:
    """Terabytes per second, read plus written, of a copy of so many bf16 numbers."""
    x, y = (torch.randn(elements, device="cuda").bfloat16() for _ in range(2))
    return 4 * elements / clock.medians([lambda: y.copy_(x)])[0] / 1e6


def pages(clock: Clock, shape: str, elements: int) -> Iterator[dict[str, Any]]:
    """A prompt into pages and back, and one token more for every sequence."""
    from nqkv_rs.cuda_cache import CudaLayerCache

    batch, _, heads, dim, context = (int(n) for n in shape.split(":")[1].split(","))
    copied = copy_speed(clock, elements)
    words = dict(kv_heads=heads, key_dim=dim, batch=batch)
    size = batch * heads * context * dim
    for scheme in ("nqkv4", "nqkv"):
        cache = CudaLayerCache(scheme, **words)
        k, v = (torch.randn((batch, heads, context, dim), device="cuda").bfloat16() for _ in "kv")
        cache.reserve(context)

        def prompt(cache: Any = cache, k: Any = k, v: Any = v) -> None:
            cache.append(k, v)

        times = []
        for i in range(clock.repeat + 2):
            cache.crop(0)
            cache.reserve(context)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            clock.room.sum()
            start.record()
            prompt()
            end.record()
            torch.cuda.synchronize()
            if i >= 2:
                times.append(1e3 * start.elapsed_time(end))
        # Tokens that stay exact move four bytes an element, others two and those of a page.
        packed = cache.core.packed(0)
        exact = context - packed
        page = cache.core.page_bytes
        moved = 4 * size + batch * heads * (packed // 64 * page + 4 * dim * exact)
        us = statistics.median(times)
        yield row(
            "quantize", shape, scheme, us, moved, copied, "copy of bf16", 8 * size / copied / 1e6
        )
        del k, v
        out = [
            torch.empty((batch, heads, packed // 64 * 64, dim), device="cuda").bfloat16()
            for _ in "kv"
        ]
        first = cache.scheme.sink_tokens
        (us,) = clock.medians([lambda c=cache, o=out, f=first: c.core.read(f, *o)])
        moved = batch * heads * (packed // 64) * (page + 2 * 64 * 2 * dim)
        yield row(
            "dequantize", shape, scheme, us, moved, copied, "copy of bf16", 8 * size / copied / 1e6
        )
        del out, cache
    yield append(clock, heads, dim, copied)


def append(clock: Clock, heads: int, dim: int, copied: float) -> dict[str, Any]:
    """Microseconds of a layer and step at batch 128, in a CUDA graph of 64 steps for 8 layers."""
    from nqkv_rs.cuda_cache import CudaLayerCache

    batch, layers, steps = 128, 8, 64
    caches = [
        CudaLayerCache("nqkv4", kv_heads=heads, key_dim=dim, batch=batch) for _ in range(layers)
    ]
    k, v = (torch.randn((batch, heads, 128, dim), device="cuda").bfloat16() for _ in "kv")
    for cache in caches:
        cache.append(k, v)
        cache.reserve(steps * (clock.repeat + 4))
    k, v = (x[:, :, :1].contiguous() for x in (k, v))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            for cache in caches:
                cache.core.append(k, v)
    (us,) = clock.medians([graph.replay])
    us /= steps * layers
    scale = 1 + caches[0].core.page_bytes / (64 * 2 * 2 * dim)
    # Written to the tail, read from it, and its share of a page.
    moved = int(batch * heads * 2 * 2 * dim * (2 + scale))
    name = f"append:{batch},{heads},{heads},{dim},128"
    return row("append", name, "nqkv4", us, moved, copied, "copy of bf16", moved / copied / 1e6)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--elements", type=int, default=1 << 28, help="of the flat tensors, or 0")
    parser.add_argument("--repeat", type=int, default=21)
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME:batch,q_heads,kv_heads,head_dim,context",
        help="pages of a layer of this model",
    )
    options = parser.parse_args()
    if not nqkv_rs.cuda_is_available():
        print("skipped: no CUDA device")
        return
    nqkv_rs.warmup()
    torch.set_grad_enabled(False)
    clock = Clock(options.repeat)
    rows = [flat(clock, options.elements)] if options.elements else []
    rows += [pages(clock, shape, options.elements or 1 << 28) for shape in options.shape]
    for r in itertools.chain(*rows):
        if options.json:
            print(json.dumps(r), flush=True)
        else:
            speed = f"{r['tb_per_s']:>7.3f} TB/s {r['percent_of_copy']:>6.1f} % of copy"
            print(
                f"{r['work']:<11}{r['shape']:<30}{r['scheme']:<13}{r['us']:>10.1f} us {speed} "
                f"{r['ratio']:>7.2f}x {r['peer']}"
            )


if __name__ == "__main__":
    main()
