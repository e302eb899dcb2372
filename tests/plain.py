"""The second implementation: pages, cache and attention in plain NumPy, as the doc comments say.

Slow and short on purpose. Nothing here calls nqkv_rs; the tests hold the real one against it. Codes
and fields are fp32 arithmetic, exactly as specified; attention is dense and fp64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from plain_numbers import (
    Array,
    book_of,
    fma,
    keys_like,
    nearest,
    numbers,
    round_exact,
    round_to,
    tree_sum,
    width_of,
)

__all__ = ["PAGE", "Array", "Cache", "Page", "attention", "keys_like", "numbers"]

PAGE = 64

# --- blocks ---------------------------------------------------------------------------------------


def block_fields(x: Array, kind: str, dtype: str) -> tuple[Array, Array]:
    """Scale and zero of every row of the fp32 array ``x``, rounded as they are stored."""

    def stored(value: Array) -> Array:
        value = np.asarray(value, np.float32)
        return value if dtype == "fp32" else round_to(value, dtype).astype(np.float32)

    none = np.zeros(x.shape[:-1], np.float32)
    n = x.shape[-1]
    if n == 0:
        return none, none
    top = np.abs(x).max(-1)
    if kind == "absmax":
        return stored(top), none
    if kind == "signed_absmax":
        first = np.abs(x).argmax(-1)
        # Adding 0 makes a block of -0 a block of 0.
        return stored(np.take_along_axis(x, first[..., None], -1)[..., 0] + np.float32(0)), none
    half = np.float32(0.5)
    if kind == "minmax":
        lo, hi = x.min(-1), x.max(-1)
        zero = stored(lo * half + hi * half)
        return stored(np.maximum(hi - zero, zero - lo)), zero
    if kind == "mean_absmax":
        zero = stored(tree_sum(x) / np.float32(n))
        return stored(np.abs(x - zero[..., None]).max(-1)), zero
    if kind == "rms":
        safe = np.maximum(top, np.float32(1e-38))
        ratio = x * (np.float32(1) / safe)[..., None]
        return stored(safe * np.sqrt(tree_sum(ratio * ratio) / np.float32(n))), none
    raise ValueError(kind)


def codes_of(book: Array, x: Array, scale: Array, zero: Array) -> Array:
    """Codes by the rounded fields: one reciprocal, one subtraction, one product."""
    magnitude = np.maximum(np.abs(scale), np.float32(1e-38))
    inverse = np.where(scale == 0, np.float32(0), np.copysign(np.float32(1) / magnitude, scale))
    with np.errstate(over="ignore"):
        return nearest(book, (x - zero) * inverse)


# --- the page -------------------------------------------------------------------------------------

PLANES = {0: (), 1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
_SIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "e4m3": 1}
_TWO = ("minmax", "mean_absmax")


@lru_cache
def _e4m3_values() -> Array:
    byte = np.arange(127)
    e, m = byte >> 3, byte & 7
    return np.where(e == 0, m * 2.0**-9, (8 + m) * np.exp2(e - 10.0))


def field_bytes(x: float, dtype: str) -> bytes:
    """A rounded field, little endian."""
    if dtype == "fp32":
        return np.array(x, "<f4").tobytes()
    if dtype == "fp16":
        return np.array(x, "<f2").tobytes()
    if dtype == "bf16":
        return np.array(x, "<f4").tobytes()[2:]
    byte = int(np.searchsorted(_e4m3_values(), abs(float(x))))
    return bytes([byte | (0x80 if np.signbit(x) else 0)])


def field_values(raw: Array, dtype: str) -> Array:
    """fp32 fields that the last axis of these bytes stores."""
    raw = np.ascontiguousarray(raw)
    if dtype == "bf16":
        raw = np.concatenate([np.zeros_like(raw), raw], axis=-1)
    if dtype != "e4m3":
        return raw.view("<f2" if dtype == "fp16" else "<f4")[..., 0].astype(np.float32)
    values = _e4m3_values()
    return np.concatenate([values, [np.nan], -values, [np.nan]])[raw[..., 0]].astype(np.float32)


class Side:
    """One half of a page: ``side`` is "key" or "value", ``spec`` its part of the scheme's JSON."""

    def __init__(self, side: str, spec: dict[str, Any], heads: int, dim: int) -> None:
        self.side, self.spec, self.heads, self.dim = side, spec, heads, dim
        self.stored = -(-dim // 16) * 16
        self.widths = spec.get("widths") or [width_of(spec["codebook"])] * (self.stored // 16)
        assert len(self.widths) == self.stored // 16
        own = width_of(spec["codebook"])
        self.books = [
            book_of(spec["codebook"], None if w == own else w) if w else None for w in self.widths
        ]
        self.order = spec.get("channel_order") or [list(range(self.stored))] * heads
        self.per_channel = spec["axis"] == "token"
        self.block, self.over_heads = spec["block"], spec.get("span", "head") == "heads"
        self.F = 2 if spec["scale"] in _TWO else 1
        self.dtype, self.z = spec["scale_dtype"], _SIZE[spec["scale_dtype"]]
        self.offsets = np.concatenate([[0], np.cumsum(self.widths)]) * 128
        self.code_bytes = int(self.offsets[-1])
        # nb: the same for all heads, as many blocks as the head that meets most of them.
        self.nb = 1 + max(self.block_of(h, c) for h in range(heads) for c in range(self.stored))
        blocks = self.stored * (PAGE // self.block) if self.per_channel else PAGE * self.nb
        self.bytes = -(-(self.code_bytes + self.z * self.F * blocks) // 128) * 128

    def block_of(self, h: int, c: int) -> int:
        """Block inside head ``h`` of stored place ``c``; padding joins the last channel."""
        if self.per_channel or not self.over_heads:
            return c // self.block
        return (h * self.dim + min(c, self.dim - 1)) // self.block - h * self.dim // self.block

    def slots(self) -> Array:
        """[64, 16]: slot of (token, channel) inside a slab."""
        n, c = np.arange(64)[:, None], np.arange(16)[None, :]
        if self.side == "key":
            lane = 4 * (n % 8) + (c % 8) // 2
            place = 2 * (4 * (n // 16) + 2 * ((c // 8) % 2) + (n // 8) % 2) + c % 2
        else:
            lane = 4 * (c % 8) + (n % 8) // 2
            place = 2 * (4 * (n // 16) + 2 * ((n // 8) % 2) + (c // 8) % 2) + n % 2
        return 32 * lane + place

    def field_at(self, n: int, c: int, b: int, f: int) -> int:
        """Byte of field ``f`` of stored channel ``c`` or, per token, of block ``b``."""
        if self.per_channel:
            place = self.F * (16 * (c // 16) + 4 * ((c % 8) // 2)) + 4 * f + 2 * ((c // 8) % 2)
            place += c % 2 + self.F * self.stored * (n // self.block)
        else:
            place = (
                self.F * self.nb * (8 * (n % 8) + 2 * (n // 16) + (n // 8) % 2) + self.nb * f + b
            )
        return self.code_bytes + self.z * place

    @lru_cache  # noqa: B019
    def fields_at(self, h: int, f: int) -> Array:
        """[64, stored]: byte of field ``f`` for every token and stored place of head ``h``."""
        places = [(c, self.block_of(h, c)) for c in range(self.stored)]
        return np.array([[self.field_at(n, c, b, f) for c, b in places] for n in range(PAGE)])

    def stored_channels(self, x: Array, h: int) -> Array:
        """[tokens, stored] of head ``h`` in stored order, NaN where there is only padding."""
        padded = np.full((len(x), self.stored), np.nan, np.float32)
        padded[:, : self.dim] = x[:, h]
        return padded[:, self.order[h]]

    def quantize(self, x: Array, h: int) -> tuple[Array, Array, Array]:
        """Codes [tokens, stored] and fields of head ``h`` of ``x`` [tokens, heads, dim].

        The fields are [groups, stored] per channel or [tokens, nb] per token.
        """
        kind, own = self.spec["scale"], self.stored_channels(x, h)
        padding = np.isnan(own)
        if self.per_channel:
            columns = np.where(padding, np.float32(0), own).T.reshape(self.stored, -1, self.block)
            scale, zero = (f.T for f in block_fields(columns, kind, self.dtype))
            s, z = (np.repeat(f, self.block, axis=0) for f in (scale, zero))
        else:
            flat = np.ascontiguousarray(x).reshape(len(x), -1)
            scale, zero = np.zeros((2, len(x), self.nb), np.float32)
            for b in range(self.nb):
                if self.over_heads:
                    first = (h * self.dim // self.block + b) * self.block
                    members = flat[:, first : first + self.block]
                else:
                    members = own[:, b * self.block : (b + 1) * self.block]
                    members = members[:, ~padding[0, b * self.block : (b + 1) * self.block]]
                scale[:, b], zero[:, b] = block_fields(members, kind, self.dtype)
            blocks = [self.block_of(h, c) for c in range(self.stored)]
            s, z = scale[:, blocks], zero[:, blocks]
        codes = np.zeros((len(x), self.stored), np.uint8)
        filled = np.where(padding, z, own)
        for slab, book in enumerate(self.books):
            if book is not None:
                part = np.s_[:, 16 * slab : 16 * slab + 16]
                codes[part] = codes_of(book, filled[part], s[part], z[part])
        return codes, scale, zero

    def write(self, half: Array, x: Array, h: int, first: int = 0) -> None:
        """Writes tokens ``first..`` of head ``h`` into the bytes of this half."""
        codes, scale, zero = self.quantize(x, h)
        slots, count = self.slots()[first : first + len(x)], len(x)
        for slab, width in enumerate(self.widths):
            at, low = int(self.offsets[slab]), 0
            for p in PLANES[width]:
                plane = np.unpackbits(half[at : at + 128 * p], bitorder="little").reshape(1024, p)
                part = codes[:, 16 * slab : 16 * slab + 16] >> low
                for bit in range(p):
                    plane[slots, bit] = (part >> bit) & 1
                half[at : at + 128 * p] = np.packbits(plane.ravel(), bitorder="little")
                at, low = at + 128 * p, low + p
        rows = range(0, PAGE, self.block) if self.per_channel else range(first, first + count)
        for i, n in enumerate(rows):
            for j in range(scale.shape[1]):
                for f, value in enumerate((scale[i, j], zero[i, j])[: self.F]):
                    at = self.field_at(n, j, j, f)
                    half[at : at + self.z] = np.frombuffer(field_bytes(value, self.dtype), np.uint8)

    def codes(self, half: Array) -> Array:
        """[64, stored] codes of a half; 0 in a slab of width 0."""
        slots, out = self.slots(), np.zeros((PAGE, self.stored), np.uint8)
        for slab, width in enumerate(self.widths):
            at, low = int(self.offsets[slab]), 0
            for p in PLANES[width]:
                plane = np.unpackbits(half[at : at + 128 * p], bitorder="little").reshape(1024, p)
                number = np.packbits(plane, axis=1, bitorder="little")[:, 0]
                out[:, 16 * slab : 16 * slab + 16] |= number[slots] << low
                at, low = at + 128 * p, low + p
        return out

    def read(self, half: Array, h: int, count: int = PAGE) -> Array:
        """[count, dim] of head ``h`` in the model's channel order: one fma per element."""
        codes = self.codes(half)
        level = np.zeros((PAGE, self.stored))
        for slab, book in enumerate(self.books):
            if book is not None:
                part = np.s_[:, 16 * slab : 16 * slab + 16]
                level[part] = book[np.minimum(codes[part], len(book) - 1)]
        fields = np.zeros((2, count, self.stored), np.float32)
        for f in range(self.F):
            at = self.fields_at(h, f)[:count, :, None] + np.arange(self.z)
            fields[f] = field_values(half[at], self.dtype)
        out = np.zeros((count, self.stored), np.float32)
        out[:, self.order[h]] = fma(level[:count], fields[0], fields[1])
        return out[:, : self.dim]


class Page:
    """Codec of pool rows for a scheme (its JSON form as a dict) on a model's shape."""

    def __init__(self, scheme: dict[str, Any], heads: int, key_dim: int, value_dim: int) -> None:
        self.heads = heads
        self.key = Side("key", scheme["key"], heads, key_dim)
        self.value = Side("value", scheme["value"], heads, value_dim)
        self.bytes = self.key.bytes + self.value.bytes

    def empty(self) -> Array:
        return np.zeros((self.heads, self.bytes), np.uint8)

    def write(self, row: Array, k: Array, v: Array, first: int = 0) -> None:
        """Tokens ``first..`` of a row [heads, bytes]; ``k`` is fp32 [tokens, heads, key_dim]."""
        for h in range(self.heads):
            self.key.write(row[h, : self.key.bytes], k, h, first)
            self.value.write(row[h, self.key.bytes :], v, h, first)

    def read(self, row: Array, count: int = PAGE) -> tuple[Array, Array]:
        """fp32 [count, heads, dim] of keys and values."""
        k = [self.key.read(row[h, : self.key.bytes], h, count) for h in range(self.heads)]
        v = [self.value.read(row[h, self.key.bytes :], h, count) for h in range(self.heads)]
        return np.stack(k, axis=1), np.stack(v, axis=1)


# --- the cache ------------------------------------------------------------------------------------


class _Sequence:
    def __init__(self) -> None:
        self.sinks: list[tuple[Array, Array]] = []
        # [row bytes, valid count]: a row may stand in several sequences, a list belongs to one.
        self.pages: list[list[Any]] = []
        self.tail: list[tuple[Array, Array]] = []

    def fork(self) -> _Sequence:
        other = _Sequence()
        other.sinks, other.tail = list(self.sinks), list(self.tail)
        other.pages = [list(p) for p in self.pages]
        return other


class Cache:
    """One layer: sinks | pages | tail, one token after the other."""

    def __init__(
        self,
        scheme: dict[str, Any],
        heads: int,
        key_dim: int,
        value_dim: int,
        exact_dtype: str = "float32",
        batch: int = 1,
    ) -> None:
        self.page = Page(scheme, heads, key_dim, value_dim)
        self.exact = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(
            scheme.get("exact_dtype") or "", exact_dtype
        )
        self.window, self.sinks = scheme["residual_length"], scheme["sink_tokens"]
        self.single = self.window == 0 and not self.page.key.per_channel
        self.sequences = [_Sequence() for _ in range(batch)]
        self._decoded: dict[int, tuple[Any, ...]] = {}

    def append(self, k: Array, v: Array) -> None:
        """``k`` is [batch, heads, tokens, key_dim] of any float type."""
        k, v = (round_exact(x, self.exact) for x in (k, v))
        for b, s in enumerate(self.sequences):
            for t in range(k.shape[2]):
                self._append(s, k[b, :, t], v[b, :, t])

    def _append(self, s: _Sequence, k: Array, v: Array) -> None:
        if len(s.sinks) < self.sinks:
            s.sinks.append((k, v))
        elif self.single:
            rows = [id(p[0]) for other in self.sequences for p in other.pages]
            last = s.pages[-1] if s.pages else None
            if last is None or last[1] == PAGE or rows.count(id(last[0])) > 1:
                last = [self.page.empty(), 0]
                s.pages.append(last)
            k, v = k.astype(np.float32)[None], v.astype(np.float32)[None]
            self.page.write(last[0], k, v, first=last[1])
            self._decoded.pop(id(last[0]), None)
            last[1] += 1
        else:
            s.tail.append((k, v))
            if len(s.tail) == self.window + PAGE:
                k, v = (np.stack(x).astype(np.float32) for x in zip(*s.tail[:PAGE], strict=True))
                row = self.page.empty()
                self.page.write(row, k, v)
                s.pages.append([row, PAGE])
                del s.tail[:PAGE]

    def tokens(self, b: int = 0) -> int:
        s = self.sequences[b]
        return len(s.sinks) + sum(p[1] for p in s.pages) + len(s.tail)

    def packed(self, b: int = 0) -> int:
        return sum(p[1] for p in self.sequences[b].pages)

    def remove_newest(self, n: int) -> None:
        for s in self.sequences:
            for _ in range(n):
                if s.tail:
                    s.tail.pop()
                elif s.pages:
                    s.pages[-1][1] -= 1
                    if s.pages[-1][1] == 0:
                        s.pages.pop()
                else:
                    s.sinks.pop()

    def select(self, indices: list[int]) -> None:
        self.sequences = [self.sequences[i].fork() for i in indices]

    def reset(self) -> None:
        self.sequences = [_Sequence() for _ in self.sequences]

    def read(self, b: int = 0) -> tuple[Array, Array]:
        """All of sequence ``b`` as fp64 [heads, tokens, dim]."""
        s = self.sequences[b]
        parts: list[tuple[Array, Array]] = [(k[:, None], v[:, None]) for k, v in s.sinks]
        for row, count in s.pages:
            # Decoding is slow here, and a page never changes once it is full.
            known = self._decoded.get(id(row))
            if known is None or known[0] is not row or known[1] < count:
                known = (row, count, *self.page.read(row, count))
                self._decoded[id(row)] = known
            k, v = (x[:count].astype(np.float64).transpose(1, 0, 2) for x in known[2:])
            parts.append((k, v))
        parts += [(k[:, None], v[:, None]) for k, v in s.tail]
        if not parts:
            heads = self.page.heads
            return np.zeros((heads, 0, self.page.key.dim)), np.zeros(
                (heads, 0, self.page.value.dim)
            )
        return tuple(np.concatenate(x, axis=1) for x in zip(*parts, strict=True))


# --- attention ------------------------------------------------------------------------------------


def attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    start: int = 0,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Array, Array]:
    """Dense causal attention of one sequence in fp64.

    ``q`` is [q_heads, queries, key_dim], ``k`` [kv_heads, tokens, key_dim]. Query i stands at
    position tokens - queries + i. Returns [queries, q_heads, value_dim] and log-sum-exp
    [queries, q_heads]; a query that attends nothing gives zeros and minus infinity.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = len(q) // len(k)
    k, v = (np.repeat(x, group, axis=0) for x in (k, v))
    scores = scale * (q @ k.transpose(0, 2, 1)).transpose(1, 0, 2)
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    tokens, queries = k.shape[1], q.shape[1]
    position, own = np.arange(tokens)[None, :], np.arange(tokens - queries, tokens)[:, None]
    seen = (position <= own) & (position >= start)
    if window is not None:
        seen &= position > own - window
    scores = np.where(seen[:, None, :], scores, -np.inf)
    top = np.where(seen.any(1)[:, None], scores.max(-1, initial=-np.inf), 0.0)
    weights = np.exp(scores - top[..., None])
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    safe = np.where(total == 0, 1.0, total)
    out = (weights / safe[..., None]).transpose(1, 0, 2) @ v
    return out.transpose(1, 0, 2), lse
