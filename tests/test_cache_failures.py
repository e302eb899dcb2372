"""Calls of the core's cache that fail: each by name, and the cache goes on as before."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plain
import pytest
from real import Real, inputs, preset, read_only


class Elsewhere:
    """What a CUDA tensor says of itself."""

    shape = (1, 2, 101, 32)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("must not be asked for memory")


def test_other_devices_are_refused_by_name() -> None:
    real = Real(preset("nqkv4"), 2, 32, 32)
    with pytest.raises(TypeError, match=r"host memory.*device type 2"):
        real.core.append(Elsewhere(), inputs(101, 2, 32, 1))


@pytest.mark.parametrize("name", ["nqkv4", "nqkv"])
@pytest.mark.parametrize("held", [0, 50, 130])
def test_a_failed_call_leaves_the_cache_as_it_was(name: str, held: int) -> None:
    real = Real(preset(name), 2, 32, 16, "float16", batch=2)
    real.append(inputs(held, 2, 32, 19, 2), inputs(held, 2, 16, 20, 2))
    pool = np.zeros((8, 2, real.core.page_bytes), np.uint8)
    real.core.add_rows(pool)
    real.rows.extend(pool)
    k, v = inputs(100, 2, 32, 21, 2), inputs(100, 2, 16, 22, 2)

    def spoilt(x: plain.Array, at: tuple[int, ...], value: float) -> plain.Array:
        x = x.copy()
        x[at] = value
        return x

    calls: list[tuple[type[Exception], str, Any, Any]] = [
        (ValueError, "NaN", spoilt(k, (1, 1, 99, 31), np.nan), v),
        (ValueError, "inf", k, spoilt(v, (1, 0, 50, 3), -np.inf)),
        (ValueError, r"as float16", spoilt(k, (0, 0, 0, 0), 7e4), v),
        (ValueError, r"v: expected shape", k, v[..., :15]),
        (ValueError, r"k: expected shape", k[:1], v),
        (ValueError, r"v: expected shape", k, v[:, :, :99]),
        (ValueError, r"4 dimensions", k[0], v),
        (TypeError, "int32", k.astype(np.int32), v),
        (TypeError, "uint8", k, v.astype(np.uint8)),
        (TypeError, "complex", k.astype(np.complex64), v),
        (TypeError, "__dlpack__", [[1.0]], v),
        (RuntimeError, "free rows", np.tile(k, (1, 1, 20, 1)), np.tile(v, (1, 1, 20, 1))),
    ]
    before = real.state()
    memory = pool.tobytes()
    for error, text, bad_k, bad_v in calls:
        with pytest.raises(error, match=text):
            real.core.append(bad_k, bad_v)
        assert real.state() == before and pool.tobytes() == memory, text
    with pytest.raises(ValueError, match="at most"):
        real.core.remove_newest(held + 1)
    with pytest.raises(ValueError, match="sequence index"):
        real.core.select([0, 2])
    with pytest.raises((ValueError, OverflowError)):
        real.core.select([-1])
    with pytest.raises(ValueError, match="sequence"):
        real.core.table(2)
    for bad in (
        np.zeros((1, 2, real.core.page_bytes + 1), np.uint8),
        np.zeros((1, 2, real.core.page_bytes * 2), np.uint8)[..., ::2],
        np.zeros((1, 2, real.core.page_bytes), np.float32),
        read_only(np.zeros((1, 2, real.core.page_bytes), np.uint8)),
    ):
        with pytest.raises((ValueError, TypeError, BufferError)):
            real.core.add_rows(bad)
    assert real.state() == before
    # And it still works, as if nothing had happened.
    twin = Real(preset(name), 2, 32, 16, "float16", batch=2)
    twin.append(inputs(held, 2, 32, 19, 2), inputs(held, 2, 16, 20, 2))
    twin.append(k, v)
    real.append(k, v)
    for b in range(2):
        for x, y in zip(real.read(b), twin.read(b), strict=True):
            np.testing.assert_array_equal(x, y)


def test_attention_refuses_by_name() -> None:
    real = Real(preset("nqkv4"), 2, 32, 16)
    real.append(inputs(10, 2, 32, 1), inputs(10, 2, 16, 2))
    q, out = np.ones((1, 4, 1, 32), np.float32), np.empty((1, 1, 4, 16), np.float32)
    for text, bad_q, bad_out, how in (
        ("q: expected shape", q[..., :31], out, {}),
        ("q_heads", np.ones((1, 3, 1, 32), np.float32), np.empty((1, 1, 3, 16), np.float32), {}),
        ("at most 10", np.ones((1, 4, 11, 32), "f4"), np.empty((1, 11, 4, 16), "f4"), {}),
        ("out", q, out[..., :8], {}),
        ("out", q, np.empty((1, 1, 4, 32), np.float32)[..., ::2], {}),
        ("out", q, read_only(out), {}),
        ("starts", q, out, {"starts": [0, 0]}),
        ("window", q, out, {"window": 0}),
        ("soft_cap", q, out, {"soft_cap": -1.0}),
        ("both or neither", q, out, {"fresh_k": np.ones((1, 2, 1, 32), np.float32)}),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            real.core.attend(bad_q, bad_out, 1.0, **how)
    with pytest.raises(ValueError, match="scale"):
        real.core.attend(q, out, math.nan)
