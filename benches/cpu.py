"""Peers side by side on this CPU, in one run: codecs, decode attention, append, generation.

Each row is the median of interleaved repetitions, ours and the peer's in turns, so that noise of
the machine meets both. ``--json`` prints one object per row with the keys
``work, scheme, us, peer, peer_us, ratio``; ratio is the peer's time over ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

import nqkv_rs

WORK = ("codecs", "attention", "append", "generate")


def medians(calls: list[Callable[[], Any]], repeat: int, warm: float = 0.03) -> list[float]:
    """Median microseconds of each call; the calls take turns.

    A turn begins with at least one call, and ``warm`` seconds of them, that do not count: threads
    of the peer before still spin for a while, and run against whoever comes next.
    """
    times: list[list[float]] = [[] for _ in calls]
    for i in range(repeat + 1):
        for call, seen in zip(calls, times, strict=True):
            begun = time.perf_counter()
            call()
            while time.perf_counter() - begun < warm:
                call()
            for _ in range(3):
                start = time.perf_counter()
                call()
                if i >= 1:  # the first round warms up
                    seen.append(1e6 * (time.perf_counter() - start))
    return [statistics.median(seen) for seen in times]


def row(work: str, scheme: str, us: float, peer: str, peer_us: float) -> dict[str, Any]:
    """One line of the table."""
    return {
        "work": work,
        "scheme": scheme,
        "us": round(us, 1),
        "peer": peer,
        "peer_us": round(peer_us, 1),
        "ratio": round(peer_us / us, 2),
    }


def codecs(repeat: int) -> Iterator[dict[str, Any]]:
    """NF4 in blocks of 64 from and to bf16, 16 Mi elements, against bitsandbytes and a copy."""
    from bitsandbytes import functional as bnb

    x = torch.randn(1 << 24).bfloat16()
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    q = nqkv_rs.quantize(x, flat=True, order="high")
    out = torch.empty_like(x)
    # A copy that writes as many bytes as dequantizing does, and reads as many.
    source = torch.empty_like(x)
    calls = [
        lambda: nqkv_rs.quantize(x, flat=True, order="high"),
        lambda: bnb.quantize_4bit(x, blocksize=64, quant_type="nf4"),
        lambda: nqkv_rs.dequantize(q, out=out),
        lambda: bnb.dequantize_4bit(packed, state),
        lambda: out.copy_(source),
    ]
    ours, theirs, back, their_back, copy = medians(calls, repeat)
    yield row("quantize", "nf4 block 64, bf16", ours, "bitsandbytes", theirs)
    yield row("dequantize", "nf4 block 64, bf16", back, "bitsandbytes", their_back)
    yield row("dequantize", "nf4 block 64, bf16", back, "copy of the same output", copy)


def attention(scheme: str, tokens: int, repeat: int) -> Iterator[dict[str, Any]]:
    """Decode attention, batch 1, 32 query heads, 8 KV heads, head size 128."""
    q_heads, heads, dim = 32, 8, 128
    k, v = torch.randn(2, 1, heads, tokens, dim)
    q = torch.randn(1, q_heads, 1, dim)
    cache = nqkv_rs.LayerCache(scheme, kv_heads=heads, key_dim=dim, exact_dtype="bfloat16")
    cache.append(k, v)
    out = torch.empty(1, 1, q_heads, dim)
    grouped = q.view(heads, q_heads // heads, dim)

    def dense() -> torch.Tensor:
        scores = torch.matmul(grouped, k[0].transpose(1, 2)) * dim**-0.5
        return torch.matmul(scores.softmax(-1), v[0])

    def sdpa(dtype: torch.dtype) -> Callable[[], Any]:
        a, b, c = q.to(dtype), k.to(dtype), v.to(dtype)
        return lambda: functional.scaled_dot_product_attention(a, b, c, enable_gqa=True)

    calls = [
        lambda: cache.attend(q, out=out),
        dense,
        sdpa(torch.float32),
        sdpa(torch.bfloat16),
    ]
    ours, *peers = medians(calls, repeat)
    names = ["torch fp32 grouped matmuls", "torch SDPA fp32", "torch SDPA bf16"]
    for name, us in zip(names, peers, strict=True):
        yield row("attention", f"{scheme} 32/8/128 {tokens}", ours, name, us)


def append(scheme: str, repeat: int) -> Iterator[dict[str, Any]]:
    """One token into a cache of 1k and of 16k tokens: the peer is the short one."""
    caches = []
    for tokens in (1024, 16384):
        cache = nqkv_rs.LayerCache(scheme, kv_heads=8, key_dim=128)
        x = torch.randn(1, 8, tokens, 128)
        cache.append(x, x)
        caches.append(cache)
    one = torch.randn(1, 8, 1, 128)
    short, long = medians([lambda c=c: c.append(one, one) for c in caches], 64 * repeat, 0)
    yield row("append", f"{scheme} at 16384 tokens", long, f"{scheme} at 1024 tokens", short)


def generate(scheme: str, tokens: int, steps: int) -> Iterator[dict[str, Any]]:
    """Decode steps of SmolLM2 in fp32 after a long prompt, packed and dense in turns."""
    from transformers import DynamicCache

    from nqkv_rs.evaluation import long_text
    from nqkv_rs.models import load

    loaded = load("smollm2")
    ids = loaded.tokenizer(long_text(), return_tensors="pt").input_ids[:, :tokens]
    caches = [nqkv_rs.NqkvCache(loaded.model.config, scheme), DynamicCache()]
    newest = []
    for cache in caches:
        logits = loaded.model(ids, past_key_values=cache, logits_to_keep=1).logits
        newest.append(logits[:, -1:].argmax(-1))

    def step(i: int) -> Callable[[], Any]:
        def call() -> None:
            out = loaded.model(newest[i], past_key_values=caches[i], logits_to_keep=1)
            newest[i] = out.logits[:, -1:].argmax(-1)

        return call

    ours, dense = medians([step(0), step(1)], steps // 4, 0)
    yield row("generate", f"{scheme} SmolLM2 {tokens}", ours, "DynamicCache fp32", dense)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--work", action="append", choices=WORK, help="default: all of them")
    parser.add_argument("--scheme", action="append", help="for attention; default nqkv4 and nqkv")
    parser.add_argument("--tokens", type=int, default=16384, help="context of attention")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--steps", type=int, default=48, help="of generation; 0 for none")
    options = parser.parse_args()
    schemes = options.scheme or ["nqkv4", "nqkv"]
    work = options.work or WORK
    torch.set_grad_enabled(False)
    rows = [*codecs(options.repeat)] if "codecs" in work else []
    for scheme in schemes:
        if "attention" in work:
            rows += attention(scheme, options.tokens, options.repeat)
        if "append" in work:
            rows += append(scheme, options.repeat)
    if "generate" in work and options.steps:
        rows += generate(schemes[0], 4096, options.steps)
    for r in rows:
        if options.json:
            print(json.dumps(r))
        else:
            times = f"{r['us']:>11.1f} us {r['peer_us']:>11.1f} us {r['ratio']:>7.2f}x"
            print(f"{r['work']:<11}{r['scheme']:<24}{times}  {r['peer']}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
