"""Rotary embedding, centring and Hadamard rotation of keys and values on their way in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nqkv_rs import _core, _cuda
from nqkv_rs._arguments import dimensions

__all__ = ["Transform", "transform"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Transform:
    """What is done to each token of a head, in this order; what is left out is not done.

    Attention can take all of it back: give queries the same ``rope`` and ``hadamard``; softmax does
    not see what is subtracted from every key of a head; a Hadamard rotation of values is undone by
    rotating the output (it is its own inverse). All arithmetic is float32, in a fixed order, and
    every device gives the same bits.

    Attributes:
        rope: cosines and sines of the angles, two arrays ``[batch or 1, tokens, pairs]``; the first
            ``2 * pairs`` channels turn.
        interleaved: pair ``i`` is channels ``2 i`` and ``2 i + 1`` (GPT-J), not ``i`` and
            ``pairs + i`` (Llama).
        centre: subtracted, ``[heads, dim]``.
        hadamard: rotate by the orthonormal Hadamard matrix, in blocks of the largest power of two
            that divides the head size: outliers are spread over the channels.

    Example:
        >>> import numpy as np
        >>> from nqkv_rs import Transform, transform
        >>> x = np.zeros((1, 1, 1, 64), np.float32)
        >>> x[..., 5] = 8.0
        >>> float(abs(transform(x, Transform(hadamard=True))).max())
        1.0
    """

    rope: tuple[Any, Any] | None = None
    interleaved: bool = False
    centre: Any | None = None
    hadamard: bool = False

    def parts(self) -> tuple[Any, Any, bool, Any, bool]:
        """As the core takes them: float32, contiguous."""
        known: tuple[Any, Any, bool, Any, bool] | None = self.__dict__.get("_parts")
        if known is not None:
            return known
        pair = self.rope
        if pair is not None and (not isinstance(pair, (tuple, list)) or len(pair) != 2):
            raise TypeError(f"rope: expected a pair (cos, sin), got {type(pair).__name__}")
        cos, sin = (None, None) if pair is None else map(_float32, pair)
        centre = None if self.centre is None else _float32(self.centre)
        parts = cos, sin, bool(self.interleaved), centre, bool(self.hadamard)
        given = (*(pair or (None, None)), self.centre)
        # Kept for the next step, unless one is a copy: what is written to the original counts.
        if all(map(_same_memory, given, (cos, sin, centre))) and not isinstance(pair, list):
            object.__setattr__(self, "_parts", parts)
        return parts


def parts_of(what: str, how: Transform | None) -> tuple[Any, Any, bool, Any, bool] | None:
    """:meth:`Transform.parts` of an argument that may be None."""
    if how is None:
        return None
    if not isinstance(how, Transform):
        raise TypeError(f"{what}: expected a Transform, got {type(how).__name__}")
    return how.parts()


def _same_memory(given: Any, taken: Any) -> bool:
    if given is taken:
        return True
    return hasattr(given, "data_ptr") and bool(given.data_ptr() == taken.data_ptr())


def _float32(x: Any) -> Any:
    if hasattr(x, "detach"):
        return x.detach().float().contiguous()
    if hasattr(x, "__dlpack_device__") and x.__dlpack_device__()[0] != 1:
        return x
    return np.ascontiguousarray(x, dtype=np.float32)


def transform(x: Any, how: Transform, *, out: Any | None = None) -> Any:
    """Change keys, values, queries or outputs.

    Args:
        x: ``[batch, heads, tokens, dim]``, any float dtype and strides, in host memory or on a CUDA
            device.
        how: what is done.
        out: where to write, contiguous, of the shape of ``x``; each number is rounded once to its
            dtype. Otherwise a new array like ``x`` (NumPy float32 for anything that is neither
            PyTorch's nor NumPy's).

    Returns:
        ``out``.

    Raises:
        TypeError: a wrong dtype or device.
        ValueError: a wrong shape.
    """
    if not isinstance(how, Transform):
        raise TypeError(f"how: expected a Transform, got {type(how).__name__}")
    shape = dimensions("x", x)
    if out is None:
        out = _like(x, shape)
    run = _core.cuda_transform if _cuda.on_device(x) else _core.transform
    run(x, out, how.parts())
    return out


def _like(x: Any, shape: tuple[int, ...]) -> Any:
    if hasattr(x, "new_empty"):
        return x.new_empty(shape)
    if _cuda.on_device(x):
        return _cuda.empty(x, shape, str(x.dtype))
    return np.empty(shape, dtype=x.dtype if isinstance(x, np.ndarray) else np.float32)
