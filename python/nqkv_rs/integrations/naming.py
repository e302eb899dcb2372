"""What transformers calls things whose names change inside the supported window."""

from __future__ import annotations

from functools import cache

__all__ = ["CACHE_KEYWORDS", "cache_keyword"]

# Of `generate` and `forward`: the first from 5.24 on, the second before, and until 6.0 with a
# warning.
CACHE_KEYWORDS = ("cache", "past_key_values")


@cache
def cache_keyword() -> str:
    """The keyword that takes a cache without a warning."""
    import transformers

    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return CACHE_KEYWORDS[0] if release >= (5, 24) else CACHE_KEYWORDS[1]
