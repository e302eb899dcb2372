"""Tensor codecs on a CUDA device, side by side with a copy and with bitsandbytes, in one run.

Times are medians of single calls between two events; the L2 cache is flushed before each by reading
a buffer larger than it. ``bytes`` are those that the work must read and write. ``--json`` prints
one object per row with the keys
``work, shape, scheme, us, bytes, tb_per_s, percent_of_copy, peer, peer_us, ratio``.
"""

from __future__ import annotations

import argparse
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
    source = torch.empty_like(x)
    from nqkv_rs import _core

    words = ("nf4", 64, "absmax", "fp32", True, "high")
    calls: list[Callable[[], Any]] = [
        lambda: _core.cuda_quantize(x, q.codes, q.fields, *words),
        lambda: nqkv_rs.dequantize(q, out=out),
        lambda: out.copy_(source),
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
    quantize, dequantize, copy, *theirs = clock.medians(calls)
    theirs = theirs or [copy, copy]
    copied = 4 * elements / copy / 1e6
    size = 2 * elements + q.codes.numel() + q.fields.numel()
    shape = f"flat:{elements}"
    name = peer if peer != "none" else "copy of bf16"
    yield row("copy", shape, "bf16", copy, 4 * elements, copied, "copy of bf16", copy)
    yield row("quantize", shape, "nf4 block 64", quantize, size, copied, name, theirs[0])
    yield row("dequantize", shape, "nf4 block 64", dequantize, size, copied, name, theirs[1])


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--elements", type=int, default=1 << 28, help="of the flat tensors")
    parser.add_argument("--repeat", type=int, default=21)
    options = parser.parse_args()
    if not nqkv_rs.cuda_is_available():
        print("skipped: no CUDA device")
        return
    nqkv_rs.warmup()
    torch.set_grad_enabled(False)
    for r in flat(Clock(options.repeat), options.elements):
        if options.json:
            print(json.dumps(r), flush=True)
        else:
            speed = f"{r['tb_per_s']:>7.3f} TB/s {r['percent_of_copy']:>6.1f} % of copy"
            print(
                f"{r['work']:<11}{r['shape']:<18}{r['us']:>10.1f} us {speed} "
                f"{r['ratio']:>7.2f}x {r['peer']}"
            )


if __name__ == "__main__":
    main()
