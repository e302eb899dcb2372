"""The extension's cache as the tests drive it, and the ways in which it is compared."""

from __future__ import annotations

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import plain

from nqkv_rs import LayerCache
from nqkv_rs import _core as core

__all__ = [
    "DTYPES",
    "Real",
    "check_attention",
    "everything",
    "inputs",
    "misaligned",
    "preset",
    "read_only",
    "same",
    "strided",
]

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def preset(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads(core.preset(name)), **changes}


def inputs(tokens: int, heads: int, dim: int, seed: int, batch: int = 1) -> plain.Array:
    """fp32 [batch, heads, tokens, dim]."""
    x = [plain.keys_like(tokens, heads, dim, seed + 77 * b) for b in range(batch)]
    return np.stack(x).transpose(0, 2, 1, 3)


class Real:
    """The extension's cache with a pool that grows by what a call needs, as callers do it."""

    def __init__(
        self,
        scheme: dict[str, Any],
        heads: int,
        kd: int,
        vd: int,
        exact: str = "float32",
        batch: int = 1,
    ) -> None:
        self.core = core.LayerCache(json.dumps(scheme), heads, kd, vd, exact, batch)
        self.heads, self.kd, self.vd = heads, kd, vd
        self.rows: list[plain.Array] = []

    def append(self, k: Any, v: Any) -> None:
        missing = self.core.rows_missing(k.shape[2])
        if missing > 0:
            pool = np.zeros((missing, self.heads, self.core.page_bytes), np.uint8)
            self.core.add_rows(pool)
            self.rows.extend(pool)
        self.core.append(k, v)

    def read(self, b: int = 0) -> tuple[plain.Array, plain.Array]:
        tokens = self.core.tokens(b)
        out = [np.empty((self.heads, tokens, d), np.float32) for d in (self.kd, self.vd)]
        self.core.read(b, 0, *out)
        return out[0], out[1]

    def state(self) -> list[Any]:
        """Everything that can be seen of it, as comparable values."""
        out: list[Any] = [self.core.free_rows]
        for b in range(self.core.batch):
            table = self.core.table(b)
            out += [table, [self.rows[r].tobytes() for r, _ in table]]
            out += [x.tobytes() for x in self.read(b)]
        return out

    def attend(self, q: plain.Array, **more: Any) -> tuple[plain.Array, plain.Array]:
        b, heads, n, d = q.shape
        out = np.empty((b, n, heads, self.vd), np.float64 if q.dtype == np.float64 else np.float32)
        lse = np.empty((b, n, heads), np.float32)
        self.core.attend(q, out, 1 / math.sqrt(d), lse=lse, **more)
        return out, lse


def same(real: Real, want: plain.Cache, bytes_too: bool = True) -> None:
    """Tables, page bytes, and every number read back."""
    for b, s in enumerate(want.sequences):
        table = real.core.table(b)
        assert [count for _, count in table] == [count for _, count in s.pages]
        assert real.core.tokens(b) == want.tokens(b)
        if bytes_too:
            for (row, _), (expected, _) in zip(table, s.pages, strict=True):
                np.testing.assert_array_equal(real.rows[row], expected)
        for got, expected in zip(real.read(b), want.read(b), strict=True):
            np.testing.assert_array_equal(got, expected.astype(np.float32))


def check_attention(
    real: Real, want: plain.Cache, q: plain.Array, **how: Any
) -> tuple[plain.Array, plain.Array]:
    """Both paths against dense fp64 attention on what the plain cache holds."""
    starts = how.get("starts") or [0] * len(q)
    rest = {key: how[key] for key in ("window", "soft_cap") if key in how}
    outs, sums, top = [], [], 1.0
    for b in range(len(q)):
        k, v = want.read(b)
        if "fresh_k" in how:
            n = q.shape[2]
            k, v = k.copy(), v.copy()
            k[:, -n:], v[:, -n:] = how["fresh_k"][b], how["fresh_v"][b]
        top = max(top, np.abs(v).max())
        scale = 1 / math.sqrt(q.shape[3])
        out, lse = plain.attention(q[b], k, v, scale, start=starts[b], **rest)
        outs.append(out)
        sums.append(lse)
    expected, expected_lse = np.stack(outs), np.stack(sums)
    out, lse = real.attend(q.astype(np.float64), **how)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12 * top)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-7, atol=2e-7)
    out, lse = real.attend(q.astype(np.float32), **how)
    # Up to 16 query columns of a KV head may be multiplied in 16-bit integers: 1e-4 over all heads.
    few = q.shape[1] // real.heads * q.shape[2] <= 16
    if few:
        error, size = np.linalg.norm(out - expected), np.linalg.norm(expected)
        assert error <= 1e-4 * size, f"relative error {error / size:.2e}"
    seen = np.abs(expected_lse[np.isfinite(expected_lse)]).max(initial=1.0)
    bound = 1e-4 * seen if few else 1e-5
    np.testing.assert_allclose(out, expected, rtol=0, atol=(1e-3 if few else 1e-5) * top)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=bound)
    return expected, expected_lse


def strided(x: plain.Array) -> plain.Array:
    """The same numbers with every axis strided, one backwards."""
    wide = np.zeros((*x.shape[:3], 2 * x.shape[3]), x.dtype)[:, :, ::-1].transpose(0, 3, 2, 1)
    view = wide.transpose(0, 3, 2, 1)[..., ::2]
    view[...] = x
    assert not view.flags.c_contiguous
    return view


def misaligned(x: plain.Array) -> plain.Array:
    raw = np.zeros(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


def read_only(x: plain.Array) -> plain.Array:
    x = x.copy()
    x.flags.writeable = False
    return x


def everything(cache: LayerCache) -> list[Any]:
    """All that can be seen of a cache, as comparable values."""
    core, seen = cache.core, []
    for b in range(core.batch):
        shape = (core.kv_heads, core.tokens(b))
        k, v = (np.empty((*shape, d), np.float32) for d in (cache.key_dim, cache.value_dim))
        core.read(b, 0, k, v)
        seen += [core.table(b), k.tobytes(), v.tobytes()]
    pages = [np.asarray(rows).tobytes() for rows in cache.pool]
    return [*seen, cache.memory(), core.batch, core.rows, core.free_rows, pages]
