"""The kernels of ``cuda/attend_*.cu`` on a CPU, lane by lane, against the CPU core in float64.

It needs a C++ compiler and CUDA's headers, which ``cuda/build.py`` installs. Warps take turns in
random order, asynchronous copies come as early or as late as they may, shared memory and workspace
begin as NaNs. It shows what a kernel does, not what a device does with it: for that there is
``test_cuda_attend.py``.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nqkv_rs
from nqkv_rs import LayerCache, Scheme, _core

ROOT = Path(__file__).resolve().parent.parent
HEADERS = (
    Path(os.environ.get("NQKV_CUDA_TOOLS", ROOT / ".cuda")) / "nvcc" / "nvidia" / "cu13" / "include"
)
COMPILER = shutil.which("g++")

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(
    COMPILER is None or not HEADERS.exists() or not (ROOT / "cuda").exists(),
    reason="needs g++, CUDA's headers and the sources",
)

POINTERS = "counts table sinks_k sinks_v tail_k tail_v q out lse starts partial arrived".split()
NUMBERS = (
    "batch heads group queries passes page_bytes value_offset sink_slots tail_slots exact q_dtype "
    "out_dtype window masked irregular single parts_shared"
).split()


class Arguments(ctypes.Structure):
    """``AttendArguments`` of ``cuda/attend.cuh``."""

    _fields_ = (
        [(name, ctypes.c_uint64) for name in POINTERS]
        + [("capacity", ctypes.c_int64), ("q_stride", ctypes.c_int64 * 3)]
        + [(name, ctypes.c_int32) for name in NUMBERS]
        + [("scale", ctypes.c_float), ("soft_cap", ctypes.c_float)]
        + [("level", (ctypes.c_uint16 * 16) * 2), ("codec", ctypes.c_uint64)]
        + [("key_codes", ctypes.c_int32), ("ordered", ctypes.c_int32)]
        + [("key_slabs", ctypes.c_uint8 * 8)]
    )


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library."""
    return compiled(tmp_path_factory.mktemp("emulator") / "attend.so")


def compiled(out: Path, *more: str) -> Any:
    """The library, compiled into a file."""
    folders = [f"-I{f}" for f in (ROOT / "tests" / "emulator", ROOT / "cuda", HEADERS)]
    source = ROOT / "tests" / "emulator" / "attend.cpp"
    flags = ["-std=c++17", "-O1", "-w", "-fpermissive", "-fPIC", "-shared", *more]
    subprocess.run([str(COMPILER), *flags, *folders, str(source), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def sixteen(x: Any, dtype: str) -> Any:
    """The bits of numbers in a 16-bit dtype."""
    rounded = torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype))
    return rounded.view(torch.int16).numpy()


def bits_of(codebook: Any) -> int:
    """Bits of a code."""
    if not isinstance(codebook, str):
        return (len(codebook) - 1).bit_length()
    return int(re.sub("^l2", "", codebook).lstrip("abcdefghijklmnopqrstuvwxyz")[0])


def widths_of(side: Any, dim: int) -> list[int]:
    """Bits of each slab."""
    return list(side.widths or [bits_of(side.codebook)] * (dim // 16))


def fields_of(side: Any, dim: int, heads: int) -> tuple[int, int]:
    """Numbers of fields for a block, and blocks of a token in a head or of a channel in a page."""
    fields = 2 if side.scale in ("minmax", "mean_absmax") else 1
    if side.axis == "token":
        return fields, 64 // side.block
    starts = [h * dim if side.span == "heads" else 0 for h in range(heads)]
    return fields, max((s + dim - 1) // side.block - s // side.block + 1 for s in starts)


def levels_of(codebook: Any, width: int) -> Any:
    """Levels in fp16."""
    if isinstance(codebook, str):
        # The bits are the first digit but that of "l2".
        name = re.sub(r"^(l2)?([a-z]+)\d", rf"\g<1>\g<2>{width}", codebook)
        codebook = _core.codebook(name)
    return np.asarray(codebook, np.float32).astype(np.float16)


def codec_of(scheme: Any, dim: int) -> Any:
    """What kernels of other widths read of ``Codec`` of ``cuda/page.cuh``: codebooks and order."""
    words = np.zeros(8 + 2 * (47 + 9 * 513), np.int32)
    for value, side in enumerate((scheme.key, scheme.value)):
        for width in {*widths_of(side, dim)} - {0}:
            levels = levels_of(side.codebook, width).astype(np.float32)
            at = 8 + value * (47 + 9 * 513) + 47 + 513 * width
            words[at] = len(levels)
            words[at + 1 : at + 1 + len(levels)] = levels.view(np.int32)
    order = np.asarray(scheme.key.channel_order or [], np.uint16).tobytes()
    return np.frombuffer(words.tobytes() + order + bytes(4), np.uint8).copy()


class Device:
    """What a cache on a device holds, in host memory: the state of a LayerCache."""

    def __init__(self, cache: LayerCache) -> None:
        core, scheme = cache.core, cache.scheme
        self.cache, self.exact = cache, core.exact_dtype
        self.batch, self.heads, self.dim = core.batch, core.kv_heads, cache.key_dim
        self.single = scheme.residual_length == 0 and scheme.key.axis == "channel"
        self.slots = [scheme.sink_tokens, 0 if self.single else scheme.residual_length + 64]
        self.pools = [np.array(p) for p in cache.pool]  # copies: unused bytes become NaNs
        rows = [(p, i) for p in self.pools for i in range(p.shape[0])]
        tables = [core.table(b) for b in range(self.batch)]
        self.capacity = max(map(len, tables)) + 2
        self.table = np.full((self.batch, self.capacity), 0xDEAD << 40, np.uint64)
        self.counts = np.zeros((self.batch, 4), np.int32)
        # Unused slots are NaNs.
        shapes = [(self.batch, max(n, 1), self.heads, self.dim) for n in self.slots]
        self.parts = [[np.full(shape, 0x7FFF, np.int16) for _ in range(2)] for shape in shapes]
        self.irregular = False
        for b, table in enumerate(tables):
            n, packed = cache.tokens(b), sum(count for _, count in table)
            sinks = min(self.slots[0], n - packed)
            tail = n - packed - sinks
            self.counts[b] = sinks, len(table), tail, self.single
            counts = [count for _, count in table]
            partial = [i for i, count in enumerate(counts) if count < 64]
            self.irregular |= any(i + 1 < len(counts) or not self.single for i in partial)
            for i, (row, count) in enumerate(table):
                pool, at = rows[row]
                self._poison(pool[at], count)
                self.table[b, i] = (pool.ctypes.data + at * pool.strides[0]) | count << 56
            both = [np.empty((self.heads, n, self.dim), np.float32) for _ in range(2)]
            core.read(b, 0, *both)
            for side, x in enumerate(both):
                bits = sixteen(x, self.exact).transpose(1, 0, 2)
                self.parts[0][side][b, :sinks] = bits[:sinks]
                self.parts[1][side][b, :tail] = bits[n - tail :]

    def _poison(self, row: Any, count: int) -> None:
        """Fields of tokens beyond the count, in a row of pages."""
        half, scheme = self.cache.core.value_offset, self.cache.scheme
        key_codes, codes = (128 * sum(widths_of(s, self.dim)) for s in (scheme.key, scheme.value))
        sides = [(scheme.value, half + codes)]
        if scheme.key.axis == "channel":
            sides.append((scheme.key, key_codes))
        else:
            fields, groups = fields_of(scheme.key, self.dim, self.heads)
            size, used = 2 * fields * self.dim, -(-count * groups // 64)
            row[:, key_codes + used * size : key_codes + groups * size] = 0xFF
        for side, at in sides:
            size = 2 * math.prod(fields_of(side, self.dim, self.heads))
            for n in range(count, 64):
                place = at + size * (8 * (n % 8) + 2 * (n // 16) + n // 8 % 2)
                row[:, place : place + size] = 0xFF

    def attend(self, emulator: Any, q: Any, seed: int, **words: Any) -> tuple[Any, Any]:
        """The kernel's result and log-sum-exp."""
        _, q_heads, queries, dim = q.shape
        # Any launch configuration gives the same, up to rounding.
        warps, blocks = [1, 3, 5, 2][seed % 4], [4, 1, 7, 3][seed // 2 % 4]
        warps = min(warps, 3) if dim == 256 else warps
        group = q_heads // self.heads
        passes = -(-queries * group // 8)
        channel = self.cache.scheme.key.axis == "token"
        scheme = self.cache.scheme
        widths = [widths_of(side, dim) for side in (scheme.key, scheme.value)]
        value, most = widths[1][0], max(widths[0])
        key, even = most, {*widths[0], *widths[1]} in ({2}, {3}, {4}, {8})
        if not even or scheme.key.channel_order is not None:
            key = 0 if most <= 6 and 16 * sum(widths[0]) <= 4 * dim and value < 8 else 9
        mixed = {0: 4, 9: 8}.get(key, 0)
        warps = min(warps, 3) if mixed == 8 else warps
        bulk = dim == 256 or mixed > 0 or (seed % 5 % 2 and key != 8)
        of_key, of_value = (
            math.prod(fields_of(side, dim, self.heads)) for side in (scheme.key, scheme.value)
        )
        fields = 2 * (dim if channel else 64) * of_key + 128 * of_value
        room = (self.cache.core.page_bytes if bulk else fields) + (4096 if dim > 128 else 0)
        if bulk and dim == 128 and key in (2, 3):
            room += 16 * dim
        if mixed:
            room += 16 * dim + -(-(8 * mixed * dim + 4 * dim) // 128) * 128
            room -= self.cache.core.value_offset
        end = (warps * (room + 16 + 192 + 128) + 32 + 4 * (self.batch + 1) + 15) // 16 * 16
        plain, exact = words.get("plain"), 3 if self.exact == "bfloat16" else 2
        out = np.full((self.batch, queries, q_heads, dim), np.nan, np.float32)
        if plain:
            out = np.full(out.shape, 0x7FFF, np.int16)
        lse = np.full((self.batch, queries, q_heads), np.nan, np.float32)
        arrived = np.zeros(self.batch * self.heads * passes, np.int32)
        partial = np.full(
            80 * dim + 2 * blocks * 8 * (dim + 2) + 2 * blocks * warps * 8 * (dim + 4), np.nan, "f4"
        )
        bits = sixteen(q, self.exact if plain else "bfloat16")
        starts = np.asarray(words.get("starts") or [0] * self.batch, np.int32)
        arrays = [self.counts, self.table, *self.parts[0], *self.parts[1], bits, out, lse]
        a = Arguments(*(x.ctypes.data for x in [*arrays, starts, partial, arrived]))
        if words.get("starts") is None:
            a.starts = 0
        if plain:
            a.lse = 0
        a.capacity, a.q_stride[:] = (
            self.capacity,
            [2 * n * dim for n in (q_heads * queries, queries, 1)],
        )
        a.batch, a.heads, a.group, a.queries, a.passes = (
            self.batch,
            self.heads,
            group,
            queries,
            passes,
        )
        a.page_bytes, a.value_offset = self.cache.core.page_bytes, self.cache.core.value_offset
        a.sink_slots, a.tail_slots = self.slots
        a.exact, a.q_dtype, a.out_dtype = (exact, exact, exact) if plain else (exact, 3, 1)
        a.window, a.soft_cap = words.get("window") or 0, words.get("soft_cap") or 0.0
        a.masked = bool(words.get("window") or words.get("starts") or queries > 1)
        a.irregular, a.single = self.irregular, self.single
        a.parts_shared = 0 if seed % 3 == 1 else end
        a.scale = words.get("scale") or 1 / math.sqrt(dim)
        for side, spec in enumerate((self.cache.scheme.key, self.cache.scheme.value)):
            levels = levels_of(spec.codebook, bits_of(spec.codebook))
            a.level[side][:] = [
                int(levels.view(np.uint16)[min(i, len(levels) - 1)]) for i in range(16)
            ]
        codec = codec_of(scheme, dim)
        a.codec, a.key_codes = codec.ctypes.data, 128 * sum(widths[0])
        a.ordered = scheme.key.channel_order is not None
        a.key_slabs[:] = [widths[0].count(width) for width in (8, 6, 5, 4, 3, 2, 1, 0)]
        wide = 0 if (key, value) == (4, 4) else 2 * (10 * value + key + 1)
        if scheme.value.scale == "minmax":
            wide = 400 if key == 4 else 402
        elif not channel and of_value == 2:
            wide = 404
            a.key_slabs[:4] = [
                *(side.block // 16 for side in (scheme.key, scheme.value)),
                *(dim // 16 * (side.span == "heads") for side in (scheme.key, scheme.value)),
            ]
        wide += 10 * exact if plain else 0
        base = [1024, 0][seed // 3 % 2]
        run = emulator.emulate(
            ctypes.byref(a), dim, wide + (not channel), bulk, blocks, warps, seed % 2, base, seed
        )
        assert run == 0 and not arrived.any()
        if plain:
            out = torch.from_numpy(out).view(getattr(torch, self.exact)).float().numpy()
        return out, lse


class Checked:
    """A cache, and checks of the kernel on it."""

    def __init__(self, emulator: Any, scheme: str, heads: int, dim: int, batch: int, **words: Any):
        self.emulator, self.random = emulator, np.random.default_rng(dim + batch)
        self.cache = LayerCache(
            scheme,
            kv_heads=heads,
            key_dim=dim,
            batch=batch,
            exact_dtype=words.get("exact", "bfloat16"),
            allocate=lambda *shape: np.zeros(shape, np.uint8),
        )
        self.seed = 0

    def append(self, n: int, k_scale: Any = 1.0, v_scale: Any = 1.0, v_offset: Any = 0.0) -> None:
        core, shape = self.cache.core, (self.cache.core.batch, self.cache.core.kv_heads, n)
        k, v = (self.random.standard_normal((*shape, self.cache.key_dim)) for _ in range(2))
        k += np.random.default_rng(5).standard_normal((1, core.kv_heads, 1, self.cache.key_dim))
        dtype = getattr(torch, core.exact_dtype)
        self.cache.append(
            *(torch.from_numpy(x).to(dtype) for x in (k * k_scale, v * v_scale + v_offset))
        )

    def check_plain(self, group: int) -> None:
        """A call of one query and no more, in the exact tokens' dtype: a kernel of its own."""
        core, self.seed = self.cache.core, self.seed + 1
        q = self.random.standard_normal((core.batch, core.kv_heads * group, 1, self.cache.key_dim))
        q = torch.from_numpy(q).to(getattr(torch, core.exact_dtype)).double().numpy()
        out, _ = Device(self.cache).attend(self.emulator, q, self.seed, plain=True)
        expected = np.asarray(self.cache.attend(q))
        rounding = 2**-9 if core.exact_dtype == "bfloat16" else 2**-12
        assert np.linalg.norm(out - expected) <= (1e-3 + rounding) * np.linalg.norm(expected)

    def check(
        self, group: int, queries: int = 1, alone: tuple[int, ...] = (), **words: Any
    ) -> None:
        core, self.seed = self.cache.core, self.seed + 1
        q = self.random.standard_normal(
            (core.batch, core.kv_heads * group, queries, self.cache.key_dim)
        )
        out, lse = Device(self.cache).attend(self.emulator, q, self.seed, **words)
        rounded = torch.from_numpy(q).bfloat16().double().numpy()
        expected_lse = np.empty(lse.shape, np.float32)
        expected = np.asarray(self.cache.attend(rounded, lse=expected_lse, **words))
        assert np.isfinite(out).all()
        assert np.linalg.norm(out - expected) <= 1e-3 * np.linalg.norm(expected)
        for h in alone:  # KV heads that are right by themselves, however large others are
            mine = slice(h * group, (h + 1) * group)
            norm = np.linalg.norm(expected[:, :, mine])
            assert np.linalg.norm((out - expected)[:, :, mine]) <= 1e-3 * norm
        nothing = np.isinf(expected_lse)
        assert (np.isinf(lse) == nothing).all() and not out[nothing].any()
        some = expected_lse[~nothing]
        wrong = np.abs(lse[~nothing] - some) / (1 + np.abs(some))
        assert wrong.max(initial=0) <= 1e-3

    def check_masks(self) -> None:
        """Windows, starts and a cap; pages that are cut, and go on. For a batch of four."""
        self.append(300)
        for window in (1, 15, 64, 65, 290):
            self.check(4, window=window)
            self.check(2, queries=3, window=window)
        self.check(4, starts=[0, 3, 130, 299])
        self.check(2, queries=5, starts=[0, 3, 130, 299], window=170)
        self.check(4, starts=[0, 300, 301, 10**6])
        self.check(4, soft_cap=5.0)
        for lengths, more in (([300, 77, 5, 299], 100), ([301, 170, 105, 320], 90)):
            self.cache.crop(lengths)
            self.check(4)
            self.append(more)
            self.check(4)
            self.check(2, queries=4)
            self.check(1, queries=3, window=200, starts=[70, 3, 0, 1])


SHAPES = [
    (s, d)
    for d in (64, 80, 96, 128, 256)
    for s in ("nqkv4", "nqkv")
    if s == "nqkv4" or d not in (80, 96)
]


@pytest.mark.parametrize(("scheme", "dim"), SHAPES)
def test_shapes(emulator: Any, scheme: str, dim: int) -> None:
    for exact, lengths in (("bfloat16", (1, 5, 101, 100)), ("float16", (230,))):
        checked = Checked(emulator, scheme, 2, dim, 2, exact=exact)
        for n in lengths:
            checked.append(n)
            checked.check(4)
        for group in (1, 7, 9):
            checked.check(group)


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
def test_masks(emulator: Any, scheme: str) -> None:
    Checked(emulator, scheme, 2, 64, 4).check_masks()


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
@pytest.mark.parametrize("k_scale", [1e-6, 1.0, 1e3])
def test_scales(emulator: Any, scheme: str, k_scale: float) -> None:
    for v_scale in (1e-6, 1.0, 1e4):
        checked = Checked(emulator, scheme, 1, 128, 1)
        checked.append(170, k_scale, v_scale)
        checked.check(4, scale=1 / (k_scale * math.sqrt(128)))


def test_many_sequences_of_mixed_lengths(emulator: Any) -> None:
    checked = Checked(emulator, "nqkv4", 1, 64, 37)
    checked.append(120)
    checked.cache.crop([3 + 37 * b % 117 for b in range(37)])
    for _ in range(3):
        checked.check(4)
    checked.check(2, queries=3)


def test_its_structure_is_that_of_the_sources() -> None:
    assert ctypes.sizeof(Arguments) == 296
    assert "== 296" in (ROOT / "cuda" / "attend.cuh").read_text()
    assert Scheme.of("nqkv4").sink_tokens == 4 and nqkv_rs.PAGE_TOKENS == 64
