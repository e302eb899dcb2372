"""The operators of ``torch.ops.nqkv``: registered rightly, and held by ``torch.compile``."""

from __future__ import annotations

from typing import Any

import pytest

import nqkv_rs

torch = pytest.importorskip("torch")

from torch import library  # noqa: E402

from nqkv_rs import ops  # noqa: E402

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not nqkv_rs.cuda_is_available(), reason="needs a CUDA device"),
        ],
    ),
]
WORDS = ("nf4", 64, "absmax", "fp16", False, "low")


@pytest.mark.parametrize("device", DEVICES)
def test_operators_are_registered_rightly(device: str) -> None:
    x = torch.randn(5, 200, device=device)
    codes, fields = torch.ops.nqkv.quantize(x, *WORDS)
    out = torch.empty_like(x)
    check = library.opcheck
    check(torch.ops.nqkv.quantize.default, (x, *WORDS))
    check(torch.ops.nqkv.quantize_into.default, (x, codes, fields, *WORDS))
    check(torch.ops.nqkv.dequantize.default, (codes, fields, [5, 200], torch.float32, *WORDS))
    check(torch.ops.nqkv.dequantize_into.default, (codes, fields, out, *WORDS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_whole(device: str, dtype: Any) -> None:
    def through(x: Any) -> Any:
        codes, fields = ops.quantize(x * 2, scale_dtype="fp16")
        return ops.dequantize(codes, fields, tuple(x.shape), x.dtype, scale_dtype="fp16") + 1

    x = torch.randn(3, 256, device=device).to(dtype)
    compiled = torch.compile(through, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), through(x))
    expected = nqkv_rs.dequantize(nqkv_rs.quantize(x * 2, scale_dtype="fp16")) + 1
    assert torch.equal(through(x), expected)


def test_wrong_words_are_named() -> None:
    with pytest.raises(ValueError, match="block"):
        ops.quantize(torch.randn(64), block=7)
    with pytest.raises((ValueError, KeyError), match=r"nf99|codebook"):
        ops.quantize(torch.randn(64), "nf99")
