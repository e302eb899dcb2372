"""Checks of plain arguments, so that a wrong one is named before the core sees it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

__all__ = ["whole", "word"]


def whole(what: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` as an int in ``low ..= high``.

    Args:
        what: the argument's name, for the message.
        value: anything with ``__index__`` (NumPy's integers have it).
        low: smallest value.
        high: largest value; None for no limit.

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
    if number < low or (high is not None and number > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{what}: expected {expected}, got {number}")
    return number


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
