"""Checks of plain arguments, so that a wrong one is named before the core sees it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

__all__ = ["dimensions", "real", "whole", "wholes", "word"]

# Where the core's own integers end.
_MOST = 2**63 - 1


def whole(what: str, value: Any, low: int, high: int = _MOST) -> int:
    """``value`` as an int in ``low ..= high``.

    Args:
        what: the argument's name, for the message.
        value: anything with ``__index__`` (NumPy's integers have it).
        low: smallest value.
        high: largest value.

    Raises:
        TypeError: not a whole number.
        ValueError: outside the range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{what}: expected a whole number, got {value!r} ({type(value).__name__})"
        ) from None
    if not low <= number <= high:
        expected = f"at least {low}" if high == _MOST and number < low else f"{low} to {high}"
        raise ValueError(f"{what}: expected {expected}, got {number}")
    return number


def wholes(what: str, values: Any, low: int, high: int = _MOST) -> list[int]:
    """Several of :func:`whole`.

    Args:
        what: the argument's name, for the message.
        values: anything that can be iterated over.
        low: smallest value.
        high: largest value.

    Raises:
        TypeError: not several whole numbers.
        ValueError: one outside the range.
    """
    try:
        each = iter(values)
    except TypeError:
        raise TypeError(f"{what}: expected whole numbers, got {values!r}") from None
    return [whole(what, value, low, high) for value in each]


def real(what: str, value: Any) -> float:
    """``value`` as a float.

    Args:
        what: the argument's name, for the message.
        value: a number.

    Raises:
        TypeError: not a number.
        ValueError: too large for a float.
    """
    try:
        if isinstance(value, (str, bytes, bytearray)):
            raise TypeError
        return float(value)
    except TypeError:
        raise TypeError(
            f"{what}: expected a number, got {value!r} ({type(value).__name__})"
        ) from None
    except OverflowError:
        raise ValueError(f"{what}: expected a number that fits in float64, got more") from None


def dimensions(what: str, x: Any) -> tuple[int, ...]:
    """The shape of an array.

    Args:
        what: the argument's name, for the message.
        x: the array.

    Raises:
        TypeError: not an array.
        ValueError: a shape that no array has.
    """
    shape = getattr(x, "shape", None)
    if shape is None:
        expected = "an array with __dlpack__ and shape"
        raise TypeError(f"{what}: expected {expected}, got {type(x).__name__}")
    return tuple(wholes(f"{what}.shape", shape, 0))


def word(what: str, value: Any, known: Sequence[str]) -> str:
    """``value`` if it is one of the words of the scheme language.

    Args:
        what: the argument's name, for the message.
        value: what was passed.
        known: the words.

    Raises:
        TypeError: not a string.
        ValueError: another word.
    """
    if not isinstance(value, str):
        raise TypeError(f"{what}: expected one of {', '.join(known)}, got {value!r}")
    if value not in known:
        raise ValueError(f"{what}: expected one of {', '.join(known)}, got {value!r}")
    return value
