"""Numbers for the second implementation: small formats, codebooks, inputs. See plain.py."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray

# --- numbers --------------------------------------------------------------------------------------

# Significant bits, smallest normal exponent, largest finite number.
FORMATS = {
    "fp16": (11, -14, 65504.0),
    "bf16": (8, -126, float.fromhex("0x1.fep127")),
    "e4m3": (4, -6, 448.0),
}
EXACT = {"float64": None, "float32": None, "float16": "fp16", "bfloat16": "bf16"}


def round_to(x: Array, name: str) -> Array:
    """fp64 to a small format, to nearest even, once; magnitudes above the largest saturate."""
    bits, lowest, largest = FORMATS[name]
    x = np.asarray(x, np.float64)
    exponent = np.maximum(np.frexp(x)[1] - 1, lowest)
    quantum = np.exp2(exponent - bits + 1.0)
    # x / quantum has at most 53 bits, and rint rounds ties to even.
    return np.clip(np.rint(x / quantum) * quantum, -largest, largest)


def round_exact(x: Array, dtype: str) -> Array:
    """What an exact part of this dtype would give back, as fp64."""
    if dtype == "float64":
        return np.asarray(x, np.float64)
    if dtype == "float32":
        return np.asarray(x, np.float64).astype(np.float32).astype(np.float64)
    return round_to(x, EXACT[dtype])


def fma(level: Array, scale: Array, zero: Array) -> Array:
    """fp32 fused multiply-add. The product is exact in fp64; the sum is rounded to odd there."""
    product = np.float64(level) * np.float64(scale)
    zero = np.float64(zero)
    total = product + zero
    part = total - product
    lost = (product - (total - part)) + (zero - part)
    even = (np.atleast_1d(total).view(np.int64) & 1 == 0).reshape(np.shape(total))
    odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return np.where((lost != 0) & even, odd, total).astype(np.float32)


def tree_sum(x: Array) -> Array:
    """fp32 sum over the last axis: pad with zeros to a power of two, fold upper half onto lower."""
    n = 1 << (x.shape[-1] - 1).bit_length()
    x = np.concatenate([x, np.zeros((*x.shape[:-1], n - x.shape[-1]), np.float32)], axis=-1)
    while n > 1:
        n //= 2
        x = x[..., :n] + x[..., n:]
    return x[..., 0]


# --- codebooks ------------------------------------------------------------------------------------


def _least_squares(n: int, edges: Array, mass: Array, moment: Array, signed: bool) -> Array:
    """Lloyd's iteration on a density given by mass and first moment of many small cells."""
    mass, moment = (np.concatenate([[0.0], np.cumsum(a)]) for a in (mass, moment))
    levels = np.interp((np.arange(n) + 0.5) / n * mass[-1], mass, edges)
    for _ in range(20_000):
        cuts = np.concatenate([edges[:1], (levels[1:] + levels[:-1]) / 2, edges[-1:]])
        m = np.diff(np.interp(cuts, edges, mass))
        new = np.diff(np.interp(cuts, edges, moment)) / m
        new = new if signed else (new - new[::-1]) / 2
        done = np.abs(new - levels).max() < 1e-13
        levels = new
        if done:
            break
    return levels


def _lloyd_max(n: int) -> Array:
    edges = np.linspace(-12, 12, (1 << 19) + 1)
    density = np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
    cdf = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in edges])
    return _least_squares(n, edges, np.diff(cdf), -np.diff(density), False)


def _extreme_normalised(n: int, block: int, signed: bool) -> Array:
    """Levels for normal blocks over their extreme M; an error counts M^2 times."""
    edges = np.linspace(-1, 1, (1 << 17) + 1)
    z = (edges[1:] + edges[:-1]) / 2
    density, atom = np.zeros_like(z), 0.0
    for m in np.arange(1, 200) / 20.0:
        phi = math.exp(-0.5 * m * m)
        inside = math.erf(m / math.sqrt(2))
        # Density of M; then block - 1 numbers cut off at M and one on +-M.
        atom += phi * inside ** (block - 1) * m**2
        others = (block - 1) * phi * inside ** (block - 2) / math.sqrt(2 * math.pi)
        density += others * np.exp(-0.5 * (z * m) ** 2) * m * m**2
    mass = density * (edges[1] - edges[0])
    moment = mass * z
    # The atom becomes a sliver of a cell at the end: edges just outside carry it.
    lower, upper = (0.0, atom) if signed else (atom / 2, atom / 2)
    edges = np.concatenate([[-1 - 1e-12], edges, [1 + 1e-12]])
    mass = np.concatenate([[lower], mass, [upper]])
    moment = np.concatenate([[-lower], moment, [upper]])
    return _least_squares(n, edges, mass, moment, signed)


NF4 = (
    "-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1"
)


@lru_cache
def levels_of(name: str) -> tuple[float, ...]:
    """fp16 levels of a named codebook."""
    if name == "nf4":
        levels = np.array(NF4.split(), np.float64)
    elif name == "e2m1":
        positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
        levels = np.concatenate([-positive[:0:-1], positive])
    elif name.startswith(("l2absmax", "l2signed")):
        bits, block = name[8:].split("-")
        levels = _extreme_normalised(1 << int(bits), int(block), name.startswith("l2signed"))
    elif name.startswith("lloyd"):
        levels = _lloyd_max(1 << int(name[5:]))
    elif name.startswith("uniform"):
        levels = np.linspace(-1, 1, 1 << int(name[7:]))
    elif name.startswith("int"):
        top = (1 << (int(name[3:]) - 1)) - 1
        levels = np.arange(-top, top + 1) / top
    elif name.startswith("nf"):
        n = 1 << int(name[2:])
        outermost = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2
        side = [
            [NormalDist().inv_cdf(p) for p in np.linspace(outermost, 0.5, count + 1)[:-1]]
            for count in (n // 2 - 1, n // 2)
        ]
        levels = np.array([-x for x in side[0]] + [0.0] + side[1][::-1]) / side[1][0]
    else:
        raise ValueError(name)
    # Once to fp32, and then to fp16, as pages do.
    return tuple(round_to(levels.astype(np.float32), "fp16").tolist())


def book_of(spec: Any, width: int | None = None) -> Array:
    """fp16 levels of one slab's codebook: by name at any width, or the caller's levels."""
    if not isinstance(spec, str):
        return round_to(np.asarray(spec, np.float32), "fp16")
    if width is None or spec == "e2m1":
        return np.array(levels_of(spec))
    word = spec.rstrip("0123456789") if "-" not in spec else spec[:8]
    block = spec[spec.index("-") :] if "-" in spec else ""
    return np.array(levels_of(f"{word}{width}{block}"))


def width_of(spec: Any) -> int:
    """Bits of a code of this codebook."""
    return (len(book_of(spec)) - 1).bit_length()


def nearest(book: Array, x: Array) -> Array:
    """Code of the nearest level, the lower one on a tie; fp16 levels have exact midpoints."""
    middles = (book[1:] + book[:-1]) / 2
    return (np.asarray(x, np.float64)[..., None] > middles).sum(-1).astype(np.uint8)


# --- inputs that every language can make ----------------------------------------------------------


def mix(seed: int, index: Array) -> Array:
    """splitmix64 of ``seed * 2^32 + index``."""
    with np.errstate(over="ignore"):
        x = (np.uint64(seed << 32) + index.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def numbers(shape: tuple[int, ...], seed: int) -> Array:
    """fp32, nearly normal: four 16-bit pieces of a hash of the row-major index, summed. Exact."""
    x = mix(seed, np.arange(math.prod(shape), dtype=np.uint64))
    total = sum(((x >> np.uint64(s)) & np.uint64(0xFFFF)).astype(np.int64) for s in (0, 16, 32, 48))
    return ((total - 131070) / 32768.0).astype(np.float32).reshape(shape)


def keys_like(tokens: int, heads: int, dim: int, seed: int) -> Array:
    """fp32 [tokens, heads, dim]: a gain and an offset per channel, blocks of zeros and of 1.25."""
    channel = mix(seed + 1, np.arange(heads * dim, dtype=np.uint64))
    gain = np.exp2((channel % np.uint64(4)).astype(np.float64) - 2)
    offset = ((channel >> np.uint64(8)) % np.uint64(17)).astype(np.float64) / 4 - 2
    x = numbers((tokens, heads * dim), seed) * gain + offset
    if tokens > 5:
        x[5] = 0
    x[:, 3] = 0
    x[:, 4] = 1.25
    return x.astype(np.float32).reshape(tokens, heads, dim)
