"""What the layers of one cache share: settings, counters, and the mask of the current step."""

from __future__ import annotations

import threading
import warnings
from typing import Any, NamedTuple

import torch

__all__ = ["Shared"]

_COUNTERS = (
    "packed_decode",
    "packed_chunk",
    "exact_prefill",
    "dequantized",
    "attended_positions",
    "packed_positions",
)


class _Judged(NamedTuple):
    """A mask, what it was judged for, and the verdict."""

    mask: torch.Tensor
    # Tensors of inference mode do not count their versions: these keep what they held instead.
    written: int | torch.Tensor
    question: tuple[int, int, int | None]
    starts: list[int] | None
    # Who has had this verdict.
    askers: set[int]

    def holds(
        self, mask: torch.Tensor, question: tuple[int, int, int | None], asker: object
    ) -> bool:
        if mask is not self.mask or question != self.question:
            return False
        if not isinstance(self.written, torch.Tensor):
            return mask._version == self.written
        if mask.is_cuda and asker is not None and id(asker) not in self.askers:
            # A look would wait for the device, in every layer: the step's first has looked.
            self.askers.add(id(asker))
            return True
        return torch.equal(mask, self.written)


class Shared:
    """One for all layers of a cache; threads may call it for different layers at once.

    Args:
        prefill: ``"exact"`` or ``"quantized"``.
        strict: raise where a slow path would be taken.
    """

    def __init__(self, prefill: str, strict: bool) -> None:
        self.prefill = prefill
        self.strict = strict
        self.warned = False
        self._counters = dict.fromkeys(_COUNTERS, 0)
        self._lock = threading.Lock()
        self._judged: _Judged | None = None

    def count(self, **more: int) -> None:
        """Add to counters.

        Args:
            **more: how much, by name.
        """
        with self._lock:
            for name, n in more.items():
                self._counters[name] += n

    def counters(self) -> dict[str, int]:
        """A copy of all counters."""
        with self._lock:
            return dict(self._counters)

    def left_padding(
        self,
        mask: torch.Tensor,
        queries: int,
        tokens: int,
        window: int | None = None,
        asker: object = None,
    ) -> list[int] | None:
        """First attended position of each sequence; None unless the mask is causal, left-padded.

        All layers of a step pass the same mask, so it is judged once.

        Args:
            mask: a boolean keep-mask, ``[batch or 1, 1, queries, tokens]``.
            queries: new tokens.
            tokens: tokens in the cache, the new ones included.
            window: how many positions a query attends at most, its own included.
            asker: the layer, which asks once a step.
        """
        question = (queries, tokens, window)
        judged = self._judged
        if judged is None or not judged.holds(mask, question, asker):
            written = mask.clone() if mask.is_inference() else mask._version
            starts = _starts(mask, queries, tokens, window)
            judged = _Judged(mask, written, question, starts, {id(asker)})
            # One assignment: a thread at another layer sees a whole verdict, old or new.
            self._judged = judged
        return judged.starts

    def slow_path(self, reason: str) -> None:
        """Count a dequantization, and warn once (or raise, if strict).

        Args:
            reason: which operation wanted dense numbers.
        """
        text = (
            f"{reason} wants dense keys or values, so this layer's whole cache is dequantized for "
            "the call. Expected attention through sdpa, or set_attn_implementation('nqkv'), "
            "with a causal or left-padded mask"
        )
        if self.strict:
            raise RuntimeError(f"strict=True: {text}")
        self.count(dequantized=1)
        if not self.warned:
            self.warned = True
            warnings.warn(f"nqkv_rs: {text}", stacklevel=4)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        other = Shared(self.prefill, self.strict)
        other.warned, other._counters = self.warned, self.counters()
        return other

    def __reduce__(self) -> Any:
        raise TypeError("NqkvCache: expected save() and load(), it cannot be pickled")


def _starts(mask: torch.Tensor, queries: int, tokens: int, window: int | None) -> list[int] | None:
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    if mask.shape[2] != queries or mask.shape[3] != tokens:
        return None
    keep = mask[:, 0]
    # The first position that any query keeps. Where a window hides the true start, no query of
    # this step could reach beyond this one anyway.
    seen = keep.any(1)
    starts = torch.where(seen.any(-1), seen.long().argmax(-1), tokens)
    position = torch.arange(tokens, device=mask.device)
    query = torch.arange(tokens - queries, tokens, device=mask.device)[:, None]
    expected = position <= query
    if window is not None:
        expected &= position > query - window
    if bool((keep == (expected & (position >= starts[:, None, None]))).all()):
        return [int(s) for s in starts]
    return None
