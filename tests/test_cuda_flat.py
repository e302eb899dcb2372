"""Tensor codecs on a CUDA device: the CPU core's bits."""

from __future__ import annotations

from typing import Any

import pytest

import nqkv_rs

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not nqkv_rs.cuda_is_available(), reason="needs a CUDA device"),
]

DTYPES = ["float32", "float16", "bfloat16"]


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Any:
    """Normal numbers with zeros, ties, tiny ones and an outlier among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    flat = x.view(-1)
    if flat.numel() > 40:
        flat[3:20] = 0.0
        flat[7] = -0.0
        flat[21] = 30.0
        flat[25:30] = 1e-6
    return x.to(getattr(torch, dtype))


def same(x: Any, **words: Any) -> None:
    """Codes, fields and values of both sides, compared bit by bit."""
    host = nqkv_rs.quantize(x, **words)
    device = nqkv_rs.quantize(x.cuda(), **words)
    assert torch.equal(host.fields, device.fields.cpu()), words
    assert torch.equal(host.codes, device.codes.cpu()), words
    mine, theirs = nqkv_rs.dequantize(host), nqkv_rs.dequantize(device).cpu()
    bits = torch.int32 if mine.dtype == torch.float32 else torch.int16
    assert torch.equal(mine.view(bits), theirs.view(bits)), words


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 4097, 100_000])
@pytest.mark.parametrize("order", ["low", "high"])
def test_lengths(length: int, dtype: str, order: str) -> None:
    same(numbers((length,), dtype), flat=True, order=order)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["absmax", "signed_absmax", "minmax", "mean_absmax", "rms"])
@pytest.mark.parametrize("scale_dtype", ["fp32", "fp16", "bf16", "e4m3"])
@pytest.mark.parametrize("block", [16, 64, 128, 256])
def test_fields(dtype: str, scale: str, scale_dtype: str, block: int) -> None:
    x = numbers((5000,), dtype, seed=block)
    same(x, flat=True, scale=scale, scale_dtype=scale_dtype, block=block)


@pytest.mark.parametrize(
    "codebook", ["nf2", "nf3", "nf4", "nf5", "int6", "uniform7", "nf8", "lloyd4", "e2m1", "nf4-bnb"]
)
@pytest.mark.parametrize("block", [24, 32, 64, 80, 512])
def test_codebooks_and_odd_blocks(codebook: str, block: int) -> None:
    same(numbers((4097,), "bfloat16", seed=block), codebook=codebook, block=block, flat=True)
    same(numbers((37, 80), "float32", seed=block), codebook=codebook, block=block)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256, 7])
def test_rows(dim: int) -> None:
    for dtype in DTYPES:
        same(numbers((3, 5, dim), dtype))
        same(numbers((3, 5, dim), dtype).transpose(0, 1), scale="mean_absmax")


def test_ties_and_scales_of_every_size() -> None:
    book = torch.tensor(nqkv_rs.codebook("nf4"))
    ties = (book[1:] + book[:-1]) / 2
    for power in [-130.0, -120.0, -40.0, -20.0, -3.0, 0.0, 10.0, 100.0]:
        x = torch.cat([ties, torch.nextafter(ties, torch.tensor(9.0)), book, torch.ones(18)])[:64]
        same((x.double() * 2.0**power).float(), flat=True)
        same((x.double() * 2.0**power * 1.7).float(), flat=True, order="high")


def test_large() -> None:
    same(numbers(((1 << 26) + 64,), "bfloat16"), flat=True, order="high")


def test_a_cuda_graph_holds_it() -> None:
    x = numbers((1 << 16,), "bfloat16").cuda()
    q = nqkv_rs.quantize(x)
    out = torch.empty_like(x)
    nqkv_rs.warmup()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        nqkv_rs.dequantize(q, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nqkv_rs.dequantize(q, out=out)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, nqkv_rs.dequantize(q))


def test_bad_input_is_named() -> None:
    x = torch.randn(64, 64, device="cuda")
    with pytest.raises(TypeError, match="float64"):
        nqkv_rs.quantize(x.double())
    q = nqkv_rs.quantize(x)
    with pytest.raises(TypeError, match=r"out: .*CUDA device"):
        nqkv_rs.dequantize(q, out=torch.empty(64, 64))
    with pytest.raises(ValueError, match="out: expected shape"):
        nqkv_rs.dequantize(q, out=torch.empty(64, device="cuda"))


@pytest.mark.parametrize("codebook", ["nf4", "l2signed4-64", "uniform4", "lloyd4", "e2m1"])
@pytest.mark.parametrize("scale", ["absmax", "signed_absmax", "minmax"])
@pytest.mark.parametrize("scale_dtype", ["fp32", "fp16", "bf16"])
def test_scales_that_saturate_vanish_and_tie(codebook: str, scale: str, scale_dtype: str) -> None:
    words: dict[str, Any] = dict(codebook=codebook, scale=scale, scale_dtype=scale_dtype, flat=True)
    for dtype in DTYPES:
        powers = [-22, -15, 0, 10] if dtype == "float16" else [-130, -27, -24, -15, 0, 14, 17, 100]
        for power in powers:
            x = numbers((64 * 40,), "float32", seed=power + 200).double() * 2.0**power
            same(x.to(getattr(torch, dtype)), **words)
        # Few numbers, so that extremes of both signs stand in most blocks, in either order.
        x = numbers((64 * 200,), "float32", seed=7).mul(2).round().clamp(-3, 3) / 3
        same(x.to(getattr(torch, dtype)), **words)
        same(-x.to(getattr(torch, dtype)), **words)
        same((x + 2).to(getattr(torch, dtype)), **words)
