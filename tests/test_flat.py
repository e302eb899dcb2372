"""quantize and dequantize of plain tensors: against bitsandbytes, and against a plain reference."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from typing import Any

import ml_dtypes
import numpy as np
import plain_numbers
import pytest
import torch

import nqkv_rs

BITSANDBYTES_BLOCKS = (32, 64, 128, 256, 512)
KINDS = ("absmax", "signed_absmax", "minmax", "mean_absmax", "rms")
STORED = ("fp32", "fp16", "bf16", "e4m3")
BOOKS = ("nf2", "nf3", "nf4", "nf5", "nf7", "nf8", "lloyd3", "uniform4", "int4", "e2m1")
TORCH_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMPY_FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- bitsandbytes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> Any:
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes").functional


def assert_bit_equal(theirs: Any, x: torch.Tensor, block: int) -> None:
    codes, state = theirs.quantize_4bit(
        x, blocksize=block, quant_type="nf4", compress_statistics=False
    )
    ours = nqkv_rs.quantize(x, "nf4", block=block, flat=True, order="high")
    assert torch.equal(ours.codes, codes.flatten())
    scales, absmax = ours.scales[:, 0], state.absmax.numpy().copy()
    if x.numel() % block and scales[-1] < 1e-38:
        # The one deviation: they store 1e-38 for a last, short block that has no magnitude.
        assert absmax[-1] == np.float32(1e-38)
        absmax[-1] = scales[-1]
    assert scales.tobytes() == absmax.tobytes()


def ties(dtype: torch.dtype) -> torch.Tensor:
    """Each threshold, as close as the dtype has it, and its neighbours on both sides."""
    levels = torch.from_numpy(nqkv_rs.codebook("nf4"))
    on = ((levels[1:] + levels[:-1]) * 0.5).to(dtype)
    up, down = (torch.tensor(v, dtype=dtype) for v in (9.0, -9.0))
    near = torch.cat([on, torch.nextafter(on, up), torch.nextafter(on, down)])
    return torch.cat([torch.ones(1, dtype=dtype), near, torch.zeros(2, dtype=dtype)])


@pytest.mark.parametrize("dtype", TORCH_FLOATS, ids=str)
@pytest.mark.parametrize("block", BITSANDBYTES_BLOCKS)
def test_random_numbers_as_bitsandbytes(theirs: Any, dtype: torch.dtype, block: int) -> None:
    for n in (1, 2, 7, block - 1, block, block + 1, 3 * block - 5, 64 * block):
        assert_bit_equal(theirs, torch.from_numpy(normal(n, seed=n)).to(dtype), block)
    assert_bit_equal(theirs, torch.from_numpy(normal(8, 3, block, seed=3)).to(dtype), block)


@pytest.mark.parametrize("dtype", TORCH_FLOATS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0, 0.1, 1e-4, 6e4])
def test_ties_as_bitsandbytes(theirs: Any, dtype: torch.dtype, scale: float) -> None:
    x = (ties(dtype).float() * scale).to(dtype)
    for n in (48, 47, 33):
        assert_bit_equal(theirs, x[:n], 64)
    whole = torch.cat([x, torch.zeros(16, dtype=dtype)])
    assert_bit_equal(theirs, torch.cat([whole, -whole]), 64)


@pytest.mark.parametrize("dtype", TORCH_FLOATS, ids=str)
def test_edges_as_bitsandbytes(theirs: Any, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    small = info.smallest_normal
    random = torch.from_numpy(normal(64)).to(dtype)
    for fill in (0.0, -0.0, 1.0, -1.0, small, small / 2, small / 64, info.max, info.min):
        block = torch.full((64,), fill, dtype=dtype)
        assert_bit_equal(theirs, block, 64)
        assert_bit_equal(theirs, torch.cat([random, block, random[:9]]), 64)
        assert_bit_equal(theirs, torch.cat([random, block[:9]]), 64)
        spike = torch.zeros(65, dtype=dtype)
        spike[5] = fill
        assert_bit_equal(theirs, spike, 64)


def test_decoded_numbers_as_bitsandbytes(theirs: Any) -> None:
    x = torch.from_numpy(normal(64, 64))
    codes, state = theirs.quantize_4bit(x, quant_type="nf4", compress_statistics=False)
    ours = nqkv_rs.quantize(x, flat=True, order="high")
    assert torch.equal(nqkv_rs.dequantize(ours), theirs.dequantize_4bit(codes, state))


# --- a plain reference for scales, and bounds for what comes back ---------------------------------


def plain_scales(x: np.ndarray, block: int, kind: str, stored: str) -> np.ndarray:
    """fp64 statistics of each block of the last axis, rounded as they are stored."""

    def rounded(v: float) -> float:
        v = float(np.float32(v))
        return v if stored == "fp32" else float(plain_numbers.round_to(np.float64(v), stored))

    out = []
    for row in x.reshape(-1, x.shape[-1]).astype(np.float64):
        for at in range(0, len(row), block):
            b = row[at : at + block]
            extreme = b[np.abs(b).argmax()]
            if kind == "minmax":
                zero = rounded((b.min() + b.max()) / 2)
                out.append([rounded(max(b.max() - zero, zero - b.min())), zero])
            elif kind == "mean_absmax":
                zero = rounded(b.mean())
                out.append([rounded(np.abs(b - zero).max()), zero])
            elif kind == "rms":
                out.append([rounded(np.sqrt((b * b).mean()))])
            else:
                out.append([rounded(extreme if kind == "signed_absmax" else abs(extreme))])
    return np.array(out)


STEP = {"fp32": 2.0**-22, "fp16": 2.0**-10, "bf16": 2.0**-7, "e4m3": 2.0**-3}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_the_statistics_of_their_blocks(kind: str, stored: str) -> None:
    x = normal(5, 150, seed=9) + np.float32(0.5)
    q = nqkv_rs.quantize(x, block=64, scale=kind, scale_dtype=stored)
    want = plain_scales(x, 64, kind, stored)
    assert q.scales.shape == want.shape == (15, want.shape[1])
    if kind in ("absmax", "signed_absmax"):
        np.testing.assert_array_equal(q.scales, want)
    else:
        # Sums in fp32 may fall on the other side of a rounding boundary: one step at most.
        np.testing.assert_allclose(q.scales, want, rtol=STEP[stored], atol=STEP[stored] / 4)


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", STORED)
def test_every_codec_comes_back_within_half_a_gap(book: str, kind: str, stored: str) -> None:
    x = normal(3, 100, seed=4)
    q = nqkv_rs.quantize(x, book, block=32, scale=kind, scale_dtype=stored)
    error = np.abs(nqkv_rs.dequantize(q) - x).reshape(3, 100)
    levels = nqkv_rs.codebook(book).astype(np.float64)
    scale = np.repeat(q.scales[:, :1].reshape(3, 4), 32, axis=1)[:, :100].astype(np.float64)
    zero = q.scales[:, 1:] if q.scales.shape[1] == 2 else np.zeros((12, 1))
    zero = np.repeat(zero.reshape(3, 4), 32, axis=1)[:, :100].astype(np.float64)
    # Inside the levels' range the error is at most half a gap; outside it is the way to the end.
    ends = np.sort(np.stack([scale * levels[0], scale * levels[-1]]), axis=0) + zero
    outside = np.maximum(np.maximum(ends[0] - x, x - ends[1]), 0)
    half = np.abs(scale) * np.diff(levels).max() / 2
    assert (error <= np.maximum(half, outside) * (1 + 1e-5) + 1e-6).all()
    # Quantizing what came back changes nothing where the extreme is a level itself.
    if kind == "absmax" and book in ("nf4", "uniform4", "int4", "e2m1") and stored == "fp32":
        again = nqkv_rs.quantize(nqkv_rs.dequantize(q), book, block=32, scale=kind)
        assert again.codes.tobytes() == q.codes.tobytes()


def test_levels_of_ones_own() -> None:
    x = np.array([[-2.0, -1.1, 0.2, 4.0] * 4], np.float32)
    q = nqkv_rs.quantize(x, [-0.5, -0.25, 0.0, 1.0], block=16)
    np.testing.assert_array_equal(nqkv_rs.dequantize(q), np.array([[-2.0, -1.0, 0.0, 4.0] * 4]))
    assert q.codec["codebook"] == (-0.5, -0.25, 0.0, 1.0)
    assert q.effective_bits == 2 + 32 / 16


def test_blocks_end_with_their_row_unless_flat() -> None:
    x = normal(4, 24)
    rows, flat = nqkv_rs.quantize(x, block=16), nqkv_rs.quantize(x, block=16, flat=True)
    assert (rows.scales.shape, flat.scales.shape) == ((8, 1), (6, 1))
    assert flat.scales[1, 0] == np.abs(x.reshape(-1)[16:32]).max()


# --- dtypes, memory, outputs ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NUMPY_FLOATS, ids=lambda d: np.dtype(d).name)
def test_numpy_dtypes(dtype: Any) -> None:
    x = normal(4, 70).astype(dtype)
    q = nqkv_rs.quantize(x)
    wide = nqkv_rs.quantize(x.astype(np.float32))
    assert isinstance(q.codes, np.ndarray) and q.dtype == x.dtype
    assert (q.codes.tobytes(), q.fields.tobytes()) == (wide.codes.tobytes(), wide.fields.tobytes())
    back = nqkv_rs.dequantize(q)
    assert back.dtype == x.dtype
    assert back.tobytes() == nqkv_rs.dequantize(wide).astype(dtype).tobytes()


@pytest.mark.parametrize("dtype", (torch.float64, *TORCH_FLOATS), ids=str)
def test_torch_dtypes(dtype: torch.dtype) -> None:
    x = torch.from_numpy(normal(4, 70)).to(dtype)
    q, wide = nqkv_rs.quantize(x), nqkv_rs.quantize(x.float().numpy())
    assert isinstance(q.codes, torch.Tensor) and q.codes.numpy().tobytes() == wide.codes.tobytes()
    back = nqkv_rs.dequantize(q)
    assert torch.equal(back, torch.from_numpy(nqkv_rs.dequantize(wide)).to(dtype))


def awkward() -> list[tuple[str, np.ndarray]]:
    x = normal(6, 10, 48)
    raw = bytearray(x.nbytes + 1)
    raw[1:] = x.tobytes()
    misaligned = np.frombuffer(raw, np.uint8, offset=1).view(np.float32).reshape(x.shape)
    frozen = np.frombuffer(x.tobytes(), np.float32).reshape(x.shape)
    assert not frozen.flags.writeable and not misaligned.flags.aligned
    return [
        ("transposed", x.transpose(2, 0, 1)),
        ("every other", x[::2, :, ::3]),
        ("reversed", x[:, ::-1, ::-1]),
        ("broadcast", np.broadcast_to(x[:, :1], x.shape)),
        ("fortran", np.asfortranarray(x)),
        ("misaligned", misaligned),
        ("misaligned and strided", misaligned[1:, ::2]),
        ("read-only", frozen),
    ]


@pytest.mark.parametrize(("name", "x"), awkward(), ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("flat", [False, True])
def test_any_memory_gives_the_same_bytes(name: str, x: np.ndarray, flat: bool) -> None:
    plain = np.array(x, order="C", copy=True)
    q = nqkv_rs.quantize(x, block=16, flat=flat)
    want = nqkv_rs.quantize(plain, block=16, flat=flat)
    assert (q.codes.tobytes(), q.fields.tobytes()) == (want.codes.tobytes(), want.fields.tobytes())
    np.testing.assert_array_equal(x, plain)  # the input is only read


def test_codes_and_fields_may_be_read_only() -> None:
    q = nqkv_rs.quantize(normal(2, 64))
    frozen = {
        name: np.frombuffer(getattr(q, name).tobytes(), np.uint8).reshape(getattr(q, name).shape)
        for name in ("codes", "fields")
    }
    back = nqkv_rs.dequantize(dataclasses.replace(q, **frozen))
    np.testing.assert_array_equal(back, nqkv_rs.dequantize(q))


@pytest.mark.parametrize("dtype", NUMPY_FLOATS, ids=lambda d: np.dtype(d).name)
def test_out_is_written_in_its_own_dtype(dtype: Any) -> None:
    q = nqkv_rs.quantize(normal(3, 50))
    out = np.full((3, 50), 9, dtype)
    assert nqkv_rs.dequantize(q, out=out) is out
    assert out.tobytes() == nqkv_rs.dequantize(q).astype(dtype).tobytes()
    raw = np.zeros(out.nbytes + 1, np.uint8)
    misaligned = raw[1:].view(dtype).reshape(out.shape)
    nqkv_rs.dequantize(q, out=misaligned)
    assert misaligned.tobytes() == out.tobytes() and raw[0] == 0


@pytest.mark.parametrize("shape", [(), (0,), (0, 64), (3, 0), (1,), (2, 0, 5), (1, 1, 1), (17,)])
@pytest.mark.parametrize("kind", ["absmax", "minmax"])
def test_small_shapes(shape: tuple[int, ...], kind: str) -> None:
    x = normal(*shape) if shape else np.array(1.5, np.float32)
    for y, flat in itertools.product((x, torch.from_numpy(np.array(x))), (False, True)):
        q = nqkv_rs.quantize(y, scale=kind, flat=flat)
        back = nqkv_rs.dequantize(q)
        assert tuple(back.shape) == shape and type(back) is type(y)
        assert q.scales.shape == (len(q.fields), 1 + (kind == "minmax"))
        assert q.effective_bits == 0 if x.size == 0 else q.effective_bits > 4
    if x.size == 1:
        np.testing.assert_array_equal(np.asarray(back), x)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [(0, 0), (2, 3), (4, 99)])
def test_the_first_nan_or_infinity_is_named(bad: float, at: tuple[int, int]) -> None:
    x = normal(5, 100)
    x[at] = bad
    x[4, 99] = bad
    word = {"nan": "NaN"}.get(str(bad), str(bad))
    index = at[0] * 100 + at[1]
    for y in (x, torch.from_numpy(x).bfloat16(), np.asfortranarray(x)):
        with pytest.raises(ValueError, match=rf"x: expected finite .*got {word} .*index {index};"):
            nqkv_rs.quantize(y)


def test_a_double_beyond_fp32_is_refused() -> None:
    with pytest.raises(ValueError, match="x: expected finite numbers, got inf"):
        nqkv_rs.quantize(np.full(16, 1e300))


def test_a_tensor_that_needs_a_gradient_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"x: .*x\.detach\(\)"):
        nqkv_rs.quantize(torch.ones(64, requires_grad=True))
    nqkv_rs.quantize(torch.ones(64, requires_grad=True).detach())


def test_a_lazily_negated_tensor_is_not_read_with_the_wrong_sign() -> None:
    lazy = torch._neg_view(torch.ones(64))
    with pytest.raises(TypeError, match=r"x\.resolve_neg\(\)"):
        nqkv_rs.quantize(lazy)
    assert nqkv_rs.dequantize(nqkv_rs.quantize(lazy.resolve_neg()))[0] == -1


def test_fields_of_e4m3_are_read_as_they_are_written() -> None:
    # One block per representable scale: e4m3 gives each back exactly.
    byte = np.arange(1, 0x7F)
    exponent, mantissa = byte >> 3, byte & 7
    scales = np.where(exponent == 0, mantissa / 512, (8 + mantissa) * 2.0 ** (exponent - 10))
    x = np.zeros((len(scales), 16), np.float32)
    x[:, 3] = -scales
    q = nqkv_rs.quantize(x, scale="signed_absmax", scale_dtype="e4m3", block=16)
    np.testing.assert_array_equal(q.scales[:, 0], -scales.astype(np.float32))
    np.testing.assert_array_equal(nqkv_rs.dequantize(q), x)


@pytest.mark.parametrize("shape", [(200_003,), (1500, 72), (3, 70_001), (9000, 13)])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("book", ["nf4", "nf3"])
def test_pieces_of_large_16_bit_tensors_are_the_whole(
    shape: tuple[int, ...], flat: bool, book: str
) -> None:
    """16-bit tensors are converted piece by piece, fp32 ones are read in place: the same bytes."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    codec: dict[str, Any] = {"block": 48, "scale": "minmax", "scale_dtype": "fp16", "flat": flat}
    pieces, whole = nqkv_rs.quantize(x, book, **codec), nqkv_rs.quantize(x.float(), book, **codec)
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.fields, whole.fields)
    assert torch.equal(nqkv_rs.dequantize(pieces), nqkv_rs.dequantize(whole).bfloat16())
    x.view(-1)[-3] = torch.nan
    with pytest.raises(ValueError, match=f"index {x.numel() - 3};"):
        nqkv_rs.quantize(x, book, **codec)
