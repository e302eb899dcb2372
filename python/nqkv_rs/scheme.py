"""The scheme: the whole recipe of a cache as one frozen value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nqkv_rs import _core
from nqkv_rs._arguments import whole

__all__ = ["Scheme", "Side", "presets"]


def presets() -> list[str]:
    """Names of the presets, the default first."""
    return list(_core.presets())


def _json(fields: Mapping[str, Any]) -> str:
    """JSON, or an error that says what it was made of."""
    try:
        return json.dumps(fields, allow_nan=False)
    except (TypeError, ValueError) as error:
        expected = "finite numbers, words and lists of them"
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"scheme: expected {expected}, got something else ({error})") from None
    except RecursionError:
        raise ValueError("scheme: expected a few levels of nesting, got too many") from None


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what}: expected a str, got {type(value).__name__}")
    return value


def _tuple(x: Any) -> Any:
    if isinstance(x, Sequence) and not isinstance(x, str):
        return tuple(_tuple(v) for v in x)
    return x


@dataclass(frozen=True, kw_only=True)
class Side:
    """The recipe of one side, keys or values.

    Attributes:
        codebook: a name (``"nf4"``, ``"lloyd3"``, ``"uniform4"``, ``"int4"``, ``"e2m1"``,
            ``"l2absmax4-64"``, ``"l2signed4-64"``) or the ascending levels themselves.
        axis: ``"channel"``, a block runs along the channels of one token; or ``"token"``, along
            the tokens of one channel (keys only).
        block: elements of a block; 16 to 512 along channels; 16, 32 or 64 along tokens.
        span: ``"head"`` or ``"heads"`` (all heads of a token, concatenated; channels only).
        scale: ``"absmax"``, ``"signed_absmax"``, ``"minmax"``, ``"mean_absmax"`` or ``"rms"``.
        scale_dtype: ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"e4m3"``.
        widths: bits of each slab of 16 stored channels, widest first; None for the codebook's own.
        channel_order: for each head the channel at each stored place (keys only); None: identity.
    """

    codebook: str | tuple[float, ...]
    axis: str
    block: int
    span: str = "head"
    scale: str = "absmax"
    scale_dtype: str = "fp16"
    widths: tuple[int, ...] | None = None
    channel_order: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("codebook", "widths", "channel_order"):
            object.__setattr__(self, name, _tuple(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Everything that decides a cache's bytes: keys, values, exact tokens.

    Frozen, equal by value, hashable; checked when it is made.

    Attributes:
        key: the keys' recipe.
        value: the values' recipe.
        residual_length: newest tokens that are always exact.
        sink_tokens: first tokens that are always exact.
        exact_dtype: ``"f64"``, ``"f32"``, ``"f16"`` or ``"bf16"``; None for the input's.
        skip_layers: layers that keep an ordinary cache; negative ones count from the last.
        name: a name for people.

    Raises:
        ValueError: a field is outside its domain (the message says what was expected).
        NotImplementedError: a combination that this version does not have.

    Example:
        >>> Scheme.preset("nqkv4").sink_tokens
        4
        >>> Scheme.from_json(Scheme.preset("nqkv").to_json()) == Scheme.preset("nqkv")
        True
    """

    key: Side
    value: Side
    residual_length: int = 32
    sink_tokens: int = 4
    exact_dtype: str | None = None
    skip_layers: tuple[int, ...] = ()
    name: str = "custom"

    def __post_init__(self) -> None:
        for name in ("key", "value"):
            side = getattr(self, name)
            if not isinstance(side, Side):
                raise TypeError(f"{name}: expected a Side, got {type(side).__name__}")
        if isinstance(self.skip_layers, str) or not isinstance(self.skip_layers, Sequence):
            raise TypeError(f"skip_layers: expected layer numbers, got {self.skip_layers!r}")
        layers = tuple(whole("skip_layers", i, -4096, 4096) for i in self.skip_layers)
        object.__setattr__(self, "skip_layers", layers)
        for name in ("residual_length", "sink_tokens"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 0, 4096))
        _core.check_scheme(self.to_json())

    @classmethod
    def preset(cls, name: str) -> Scheme:
        """A recipe by name; see :func:`presets`.

        ``nqkv4``, ``nqkv4-signed``: ours (the signed code is that of arXiv 2505.06653, fitted
        anew); ``nqkv``: arXiv 2505.16210; ``kivi4``, ``kivi2``: arXiv 2402.02750.

        Args:
            name: one of :func:`presets`.

        Raises:
            ValueError: there is no such preset.
        """
        return cls.from_json(_core.preset(_text("preset", name)))

    @classmethod
    def from_json(cls, text: str) -> Scheme:
        """Parse the JSON form.

        Args:
            text: what :meth:`to_json` gave.

        Raises:
            ValueError: not such a form, or another version of it.
        """
        fields: dict[str, Any] = json.loads(_core.check_scheme(_text("text", text)))
        fields.pop("version")
        key, value = Side(**fields.pop("key")), Side(**fields.pop("value"))
        return cls(key=key, value=value, **fields)

    def to_json(self) -> str:
        """The JSON form, versioned."""
        fields = {k: v for k, v in asdict(self).items() if v is not None}
        for side in ("key", "value"):
            fields[side] = {k: v for k, v in fields[side].items() if v is not None}
        return _json({"version": 1, **fields})

    @classmethod
    def of(
        cls,
        scheme: str | Scheme | Mapping[str, Any],
        *,
        nbits: int | None = None,
        residual_length: int | None = None,
        sink_tokens: int | None = None,
        skip_layers: Sequence[int] | None = None,
    ) -> Scheme:
        """A scheme from a preset's name, a scheme, or a mapping.

        Takes the words that users of transformers know besides.

        Args:
            scheme: a preset's name, a :class:`Scheme`, or a mapping of the JSON form.
            nbits: bits of a code, keys and values alike; the codebooks keep their family.
            residual_length: newest tokens that are always exact.
            sink_tokens: first tokens that are always exact.
            skip_layers: layers that keep an ordinary cache.

        Raises:
            ValueError: as for :class:`Scheme`.
        """
        if isinstance(scheme, str):
            scheme = cls.preset(scheme)
        elif isinstance(scheme, Mapping):
            scheme = cls.from_json(_json(scheme))
        elif not isinstance(scheme, cls):
            expected = "a preset's name, a Scheme or a mapping"
            raise TypeError(f"scheme: expected {expected}, got {type(scheme).__name__}")
        changes: dict[str, Any] = {}
        if nbits is not None:
            nbits = whole("nbits", nbits, 1, 8)
            changes["key"] = _with_bits(scheme.key, nbits)
            changes["value"] = _with_bits(scheme.value, nbits)
        given = {
            "residual_length": residual_length,
            "sink_tokens": sink_tokens,
            "skip_layers": skip_layers,
        }
        changes |= {k: v for k, v in given.items() if v is not None}
        if not changes:
            return scheme
        return replace(scheme, name=f"{scheme.name}, changed", **changes)


def _with_bits(side: Side, nbits: int) -> Side:
    if not isinstance(side.codebook, str) or not any(c.isdigit() for c in side.codebook):
        raise ValueError(f"nbits: expected a scheme with named codebooks, got {side.codebook!r}")
    if side.codebook == "e2m1":
        raise ValueError("nbits: expected a codebook family of several widths, got 'e2m1'")
    # The width follows the family's letters: nf4, lloyd3, l2signed4-64.
    families = [f for f in ("l2signed", "l2absmax") if side.codebook.startswith(f)]
    prefix = families[0] if families else side.codebook.rstrip("0123456789")
    rest = side.codebook[len(prefix) :].lstrip("0123456789")
    return replace(side, codebook=f"{prefix}{nbits}{rest}", widths=None)
