"""What runs on CUDA devices: where tensors come from, and when a result is looked at."""

from __future__ import annotations

from typing import Any

__all__ = ["empty", "on_device"]


def _library(x: Any) -> str:
    return type(x).__module__.split(".")[0]


def on_device(x: Any) -> bool:
    """Whether an array lies on a CUDA device.

    Args:
        x: anything with ``__dlpack_device__``.
    """
    if _library(x) == "torch":
        return bool(x.is_cuda)
    ask = getattr(x, "__dlpack_device__", None)
    if ask is None or _library(x) == "numpy":
        return False
    return int(ask()[0]) == 2


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """A new array on the device of ``like``: its library's, or CuPy's where arrays are immutable.

    Args:
        like: an array on a CUDA device.
        shape: its shape.
        dtype: its element type, by NumPy's name.

    Raises:
        TypeError: a library whose arrays nobody may write, and no CuPy.
    """
    if _library(like) == "torch":
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    try:
        import cupy  # type: ignore[import-not-found]
    except ImportError:
        raise TypeError(
            f"x: expected a PyTorch or CuPy array on a CUDA device (or cupy to be installed, to "
            f"hold results), got {type(like).__name__}"
        ) from None
    with cupy.cuda.Device(int(like.__dlpack_device__()[1])):
        return cupy.empty(shape, dtype=dtype)
