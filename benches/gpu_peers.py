"""bf16 (and fp8) decode attention of others, each as a call without arguments."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Call = Callable[[], Any]
# Tokens of a page of FlashInfer's.
PAGE = 16


@functools.cache
def say(line: str) -> None:
    """A line for the person at the terminal, once."""
    print(line, file=sys.stderr, flush=True)


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """A CUDA graph that holds one call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def sdpa(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """PyTorch's attention by the backend of this name."""
    with sdpa_kernel([_BACKENDS[name]]):
        return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> Call:
    """FlashInfer on pages of its own that hold the same tokens."""
    import flashinfer  # type: ignore[import-not-found]

    batch, heads, context, dim = k.shape
    pages = context // PAGE
    shape = (batch, heads, pages, PAGE, dim)

    def paged(x: torch.Tensor) -> torch.Tensor:
        # [batch, heads, tokens, dim] to [pages, tokens of a page, heads, dim]
        x = x[:, :, : pages * PAGE].reshape(shape).permute(0, 2, 3, 1, 4)
        return x.reshape(batch * pages, PAGE, heads, dim).to(dtype)

    held = torch.stack([paged(k), paged(v)], dim=1)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=q.shape[1] >= 4 * heads
    )
    ints: dict[str, Any] = {"dtype": torch.int32, "device": q.device}
    wrapper.plan(
        torch.arange(batch + 1, **ints) * pages,
        torch.arange(batch * pages, **ints),
        torch.full((batch,), PAGE, **ints),
        q.shape[1],
        heads,
        dim,
        PAGE,
        q_data_type=q.dtype,
        kv_data_type=dtype,
    )
    rows = q[:, :, 0].contiguous()
    return lambda: wrapper.run(rows, held)


def peers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.cuda.CUDAGraph]:
    """Graphs of one call each, by name: those that work here.

    Args:
        q: ``[batch, q_heads, 1, dim]``, bf16.
        k: ``[batch, kv_heads, tokens, dim]``, bf16.
        v: values.
    """
    calls: dict[str, Callable[[], Call]] = {
        "cudnn": lambda: functools.partial(sdpa, "cudnn", q, k, v),
        "flash": lambda: functools.partial(sdpa, "flash", q, k, v),
        "flashinfer": lambda: _flashinfer(q, k, v, torch.bfloat16),
        "flashinfer fp8": lambda: _flashinfer(q, k, v, torch.float8_e4m3fn),
    }
    working = {}
    for name, make in calls.items():
        try:
            call = make()
            call()
            working[name] = captured(call)
        except ImportError:
            say("FlashInfer is not installed: not among the peers")
        except Exception as error:
            say(f"{name} is not among the peers: {str(error).splitlines()[0][:120]}")
    return working
