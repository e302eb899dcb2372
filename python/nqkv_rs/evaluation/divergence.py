"""KL divergence and top-1 agreement of a model with a packed cache against the same model without.

Protocol: windows of 2048 tokens of a long English text, each fed in chunks of at most 32 tokens, so
that no query sees more exact tokens than the sinks, the tail and its own chunk; the first 512
positions of a window are not scored. A window scored in one chunk would read most keys exactly and
flatter every scheme several times over: state text and chunk with every figure.

The dense model and all schemes advance together, chunk by chunk. So the dense logits are computed
once for all of them, nothing of the size (tokens x vocabulary) is ever kept, and all see the same
shapes: a dense cache measured against itself gives exactly 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from nqkv_rs.integrations.naming import cache_keyword

__all__ = [
    "Fp8Cache",
    "Result",
    "divergence",
    "divergences",
    "long_text",
    "text_sha256",
    "windows",
]

MakeCache = Callable[[], Any]
"""Makes a new, empty cache for one window."""

Progress = Callable[[int, int], None]
"""Takes the number of tokens fed so far, and the number there will be."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one cache costs.

    Attributes:
        kl_mean: mean of KL(dense || packed) over the scored positions, in nats.
        kl_stderr: its standard error, as if positions were independent (neighbours are not quite).
        top1_agreement: share of scored positions at which both models prefer the same token.
        scored_tokens: number of scored positions.
        packed_read_share: mean share of attended positions that were read from pages, over the
            scored part; None where the cache does not count them.
    """

    kl_mean: float
    kl_stderr: float
    top1_agreement: float
    scored_tokens: int
    packed_read_share: float | None


class Fp8Cache(DynamicCache):
    """A plain e4m3 cache: scale 1, no sinks, no window; the yardstick for every packed one.

    Every key and value is rounded through ``torch.float8_e4m3fn`` as soon as it is written, those
    of sliding-window layers too, and values beyond its range saturate at 448, as in the engines
    that offer such a cache. The numbers are kept in the model's dtype: this shows what the format
    does to the output, not what it saves.
    """

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round, append, and return all keys and values of the layer.

        Args:
            key_states: new keys, ``[batch, kv_heads, tokens, k_dim]``.
            value_states: new values, ``[batch, kv_heads, tokens, v_dim]``.
            layer_idx: the layer.
            *args: passed on.
            **kwargs: passed on.

        Returns:
            Keys and values of the layer so far, rounded, in the dtype they came in.
        """
        rounded = _through_e4m3(key_states), _through_e4m3(value_states)
        keys, values = super().update(*rounded, layer_idx, *args, **kwargs)
        return keys, values


def _through_e4m3(x: torch.Tensor) -> torch.Tensor:
    # torch's cast makes NaN of what is out of range; engines saturate.
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(x.dtype)


def long_text() -> str:
    """The long English text that every Python carries: all topics of ``pydoc_data.topics``.

    They are joined in sorted order. The text differs a little between Python versions, so its
    :func:`text_sha256` belongs beside every figure.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(str(topics[name]) for name in sorted(topics))


def text_sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def windows(tokenizer: Any, text: str, *, window: int = 2048, count: int = 2) -> torch.Tensor:
    """Cut the beginning of a text into windows that do not overlap.

    Where the tokenizer begins a text with a special token (Gemma's does, and such models are lost
    without it), every window begins with it.

    Args:
        tokenizer: a transformers tokenizer.
        text: the text.
        window: tokens of a window.
        count: number of windows.

    Returns:
        Token ids, int64, ``[count, window]``.

    Raises:
        ValueError: the text is too short.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    empty = list(tokenizer("")["input_ids"])
    head = [bos] if bos is not None and empty[:1] == [bos] else []
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    take = window - len(head)
    if len(ids) < take * count:
        raise ValueError(
            f"the text is too short: expected at least {take * count} tokens "
            f"for {count} windows of {window}, got {len(ids)}"
        )
    return torch.tensor([head + ids[i * take : (i + 1) * take] for i in range(count)])


def divergence(model: Any, make_cache: MakeCache, ids: torch.Tensor, **protocol: Any) -> Result:
    """:func:`divergences` of one cache.

    Args:
        model: as there.
        make_cache: makes a new cache.
        ids: as there.
        **protocol: as there.
    """
    return divergences(model, {"packed": make_cache}, ids, **protocol)["packed"]


def divergences(
    model: Any,
    make_caches: Mapping[str, MakeCache],
    ids: torch.Tensor,
    *,
    window: int = 2048,
    chunk: int = 32,
    skip: int = 512,
    scored: int = 3000,
    progress: Progress | None = None,
) -> dict[str, Result]:
    """Measure several caches on the same tokens against one dense run of the model.

    Args:
        model: a transformers causal LM in evaluation mode.
        make_caches: for each name, what makes a new cache. Packed ones should be made with
            ``prefill="quantized"``, else the scored tokens hardly read a page.
        ids: token ids, int64: ``[windows, window]``, or one row that is cut into windows.
        window: tokens of a window.
        chunk: most tokens of one forward call.
        skip: positions at the beginning of each window that are not scored.
        scored: at least so many positions are scored; whole windows are taken until they are.
        progress: told after every chunk how many tokens of how many are done.

    Returns:
        A :class:`Result` for each name.

    Raises:
        ValueError: a size that makes no sense, or fewer tokens than needed.
    """
    if not (0 <= skip < window and chunk > 0 and scored > 0):
        raise ValueError(
            "expected 0 <= skip < window, chunk > 0 and scored > 0, "
            f"got skip={skip}, window={window}, chunk={chunk}, scored={scored}"
        )
    rows = ids if ids.dim() == 2 else ids[: ids.numel() // window * window].view(-1, window)
    count = math.ceil(scored / (window - skip))
    if rows.dim() != 2 or rows.shape[1] != window or rows.shape[0] < count:
        raise ValueError(
            f"expected at least {count} windows of {window} tokens to score {scored} positions, "
            f"got token ids of shape {tuple(ids.shape)}"
        )

    tallies = {name: _Tally() for name in make_caches}
    with torch.inference_mode():
        for row in range(count):
            tokens = rows[row : row + 1].to(model.device)
            _one_window(model, make_caches, tokens, chunk, skip, tallies, row, count, progress)
    return {name: tally.result() for name, tally in tallies.items()}


def _one_window(
    model: Any,
    make_caches: Mapping[str, MakeCache],
    tokens: torch.Tensor,
    chunk: int,
    skip: int,
    tallies: Mapping[str, _Tally],
    row: int,
    count: int,
    progress: Progress | None,
) -> None:
    window = tokens.shape[1]
    # With the configuration, so that sliding-window layers are sliding here too.
    dense = DynamicCache(config=model.config)
    caches = {name: make() for name, make in make_caches.items()}
    before: dict[str, tuple[int, int]] = {}
    start = 0
    while start < window:
        # A chunk never straddles the border: what is counted from there on is scored.
        stop = min(start + chunk, skip if start < skip else window)
        if start == skip:
            before = {name: _reads(cache) or (0, 0) for name, cache in caches.items()}
        part = tokens[:, start:stop]
        # Unscored chunks need no logits, but a model has to be asked for at least one row.
        keep = 0 if start >= skip else 1
        words = {"use_cache": True, "logits_to_keep": keep}
        reference = model(part, **words, **{cache_keyword(): dense}).logits
        log_p = torch.log_softmax(reference[0].double(), dim=-1) if start >= skip else None
        for name, cache in caches.items():
            out = model(part, **words, **{cache_keyword(): cache}).logits
            if log_p is not None:
                tallies[name].add(log_p, torch.log_softmax(out[0].double(), dim=-1))
        start = stop
        if progress is not None:
            progress(row * window + stop, count * window)
    for name, cache in caches.items():
        after = _reads(cache)
        if after is not None:
            packed, attended = (a - b for a, b in zip(after, before[name], strict=True))
            tallies[name].add_reads(packed, attended)


def _reads(cache: Any) -> tuple[int, int] | None:
    """Positions read from pages, and positions attended to, since the cache was made."""
    if not hasattr(cache, "stats"):
        return None
    stats = cache.stats()
    return int(stats["packed_positions"]), int(stats["attended_positions"])


class _Tally:
    """Running sums over the scored positions."""

    def __init__(self) -> None:
        self.kl: list[torch.Tensor] = []
        self.same = 0
        self.packed = 0
        self.attended = 0

    def add(self, log_p: torch.Tensor, log_q: torch.Tensor) -> None:
        """Take log-probabilities of both models, float64, ``[positions, vocabulary]``."""
        # KL >= 0 by Jensen; rounding may leave -1e-17, which would read as a bug.
        kl = (log_p.exp() * (log_p - log_q)).nansum(-1).clamp_min(0.0)
        # nansum is for 0 * (-inf + inf), a token that both models exclude; a model that went to
        # NaN altogether must not look perfect.
        kl = torch.where(log_q.isnan().any(-1), torch.nan, kl)
        self.kl.append(kl.cpu())
        self.same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    def add_reads(self, packed: int, attended: int) -> None:
        self.packed += packed
        self.attended += attended

    def result(self) -> Result:
        kl = torch.cat(self.kl)
        n = kl.numel()
        return Result(
            kl_mean=float(kl.mean()),
            kl_stderr=float(kl.std() / math.sqrt(n)) if n > 1 else math.nan,
            top1_agreement=self.same / n,
            scored_tokens=n,
            packed_read_share=self.packed / self.attended if self.attended else None,
        )
