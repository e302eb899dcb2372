"""The tensor that stands for a layer's packed keys or values inside a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from nqkv_rs.integrations.layer import NqkvLayer

__all__ = ["PackedKV"]

# Questions about the tensor that its shape, dtype and device answer: they never touch the codes.
_METADATA = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,
    torch.Tensor.layout.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.get_device,
    torch.Tensor.__len__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
_ALL = slice(None)


class PackedKV(torch.Tensor):
    """All keys (or values) of a layer: ``[batch, heads, tokens, dim]`` to all who ask its shape.

    ``F.scaled_dot_product_attention`` on a pair of these reads pages; so does the ``nqkv``
    attention function. ``repeat_kv`` (index with None, expand, reshape) only marks how often heads
    repeat. Anything else gets dequantized numbers, is counted, and warns once.
    """

    layer: NqkvLayer
    which: str
    queries: int
    fresh: torch.Tensor | None
    repeats: int
    unfolded: bool
    # The shape once more: asking the tensor itself would come back to `__torch_function__`.
    shown: tuple[int, ...]

    @staticmethod
    def make(
        layer: NqkvLayer,
        which: str,
        shape: Sequence[int],
        like: torch.Tensor,
        queries: int,
        fresh: torch.Tensor | None,
        repeats: int = 1,
        unfolded: bool = False,
    ) -> PackedKV:
        """A tensor without storage.

        Args:
            layer: the cache layer that holds the numbers.
            which: ``"k"`` or ``"v"``.
            shape: the shape to show.
            like: gives dtype and device.
            queries: tokens of the update that made this.
            fresh: those tokens' own keys or values, if they are to be attended exactly.
            repeats: how often ``repeat_kv`` repeats each head.
            unfolded: whether the repeats stand in an axis of their own (inside ``repeat_kv``).
        """
        shown = tuple(shape)
        self: PackedKV = torch.Tensor._make_wrapper_subclass(
            PackedKV, shown, dtype=like.dtype, device=like.device, requires_grad=False
        )
        self.layer, self.which, self.queries, self.fresh = layer, which, queries, fresh
        self.repeats, self.unfolded, self.shown = repeats, unfolded, shown
        return self

    def _like(self, shape: Sequence[int], repeats: int, unfolded: bool) -> PackedKV:
        return PackedKV.make(
            self.layer, self.which, shape, self, self.queries, self.fresh, repeats, unfolded
        )

    def dense(self, reason: str) -> torch.Tensor:
        """The dequantized numbers, in the shape shown.

        Args:
            reason: which operation wants them; goes into the warning.
        """
        x = self.layer.dense(self.which, reason)
        if self.fresh is not None:
            x[:, :, x.shape[2] - self.queries :] = self.fresh
        if self.repeats > 1 or self.unfolded:
            b, h, t, d = x.shape
            x = x[:, :, None].expand(b, h, self.repeats, t, d).reshape(self.shown)
        return x

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer what can be answered on codes; dequantize for the rest."""
        kwargs = dict(kwargs or {})
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            out = _attention(*args, **kwargs)
            if out is not None:
                return out
        repeated = _repeat_kv(func, args)
        if repeated is not None:
            return repeated
        reason = getattr(func, "__name__", repr(func))
        args, kwargs = _dequantize(args, reason), _dequantize(kwargs, reason)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What reaches the dispatcher past ``__torch_function__`` gets dequantized numbers."""
        if "detach" in str(func) and isinstance(args[0], PackedKV):
            self = args[0]
            return self._like(self.shown, self.repeats, self.unfolded)
        return func(*_dequantize(args, str(func)), **_dequantize(dict(kwargs or {}), str(func)))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedKV({self.which}, shape={self.shown}, dtype={self.dtype})"


def _dequantize(x: Any, reason: str) -> Any:
    if isinstance(x, PackedKV):
        return x.dense(reason)
    if isinstance(x, dict):
        return {k: _dequantize(v, reason) for k, v in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(_dequantize(v, reason) for v in x)
    return x


def _repeat_kv(func: Callable[..., Any], args: tuple[Any, ...]) -> PackedKV | None:
    """The three steps of ``repeat_kv``, on shapes alone; None for anything else."""
    x = args[0] if args else None
    if not isinstance(x, PackedKV):
        return None
    shape = x.shown
    if func is torch.Tensor.__getitem__:
        if args[1] == (_ALL, _ALL, None, _ALL, _ALL) and len(shape) == 4 and x.repeats == 1:
            b, h, t, d = shape
            return x._like((b, h, 1, t, d), 1, True)
    elif func is torch.Tensor.expand and x.unfolded:
        target = tuple(args[1] if isinstance(args[1], (tuple, list, torch.Size)) else args[1:])
        b, h, _, t, d = shape
        if len(target) == 5 and target[:2] == (b, h) and target[3:] == (t, d):
            return x._like(target, target[2], True)
    elif func is torch.Tensor.reshape and x.unfolded:
        target = tuple(args[1] if isinstance(args[1], (tuple, list, torch.Size)) else args[1:])
        b, h, n, t, d = shape
        if target == (b, h * n, t, d):
            return x._like(target, n, False)
    return None


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """``F.scaled_dot_product_attention`` on pages; None if the pattern is not a decoder's."""
    packed = isinstance(key, PackedKV) and isinstance(value, PackedKV)
    if not packed or isinstance(query, PackedKV) or dropout_p != 0.0:
        return None
    if key.layer is not value.layer or key.repeats != value.repeats:
        return None
    layer, new = key.layer, key.queries
    b, heads, rows, dim = query.shape
    if new == 1 and heads == layer.kv_heads:
        # `pack_gqa`: at one new token the query heads of a group came as rows.
        flat = query.reshape(b, heads * rows, 1, dim)
    elif rows == new:
        flat = query
    else:
        return None
    tokens, window = layer.get_seq_length(), layer.window
    starts: list[int] | None = None
    if attn_mask is not None:
        starts = layer.shared.left_padding(attn_mask, new, tokens, window, layer)
        if starts is None:
            return None
    elif new > 1 and not (is_causal and tokens == new):
        return None
    elif window is not None and tokens > window:
        # Whoever dropped the mask did not mean a window.
        return None
    out: torch.Tensor = layer.attend(
        flat, scale, key.fresh, value.fresh, starts=starts, window=window
    )
    if flat is not query:
        return out.reshape(b, heads, rows, -1)
    return out.transpose(1, 2)
