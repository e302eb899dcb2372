"""Saved caches: a file mapped into memory, privately, so that nothing is read before it is used."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from nqkv_rs import _core

__all__ = ["map_saved"]


def map_saved(path: str | os.PathLike[str]) -> tuple[np.ndarray[Any, Any], _core.SavedCache]:
    """Map a saved cache and check it: every byte is compared with the checksums once.

    Args:
        path: the file. Do not shorten it while the map lives.

    Returns:
        The file's bytes (uint8; writing to them does not change the file), and what stands where.

    Raises:
        ValueError: a truncated, damaged, foreign or newer file; the message says which.
        OSError: no such file, or one that cannot be mapped.
    """
    path = os.fsdecode(path)
    with Path(path).open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError(f"{path}: saved cache: truncated: expected at least 8 bytes, got 0")
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8)
    try:
        return mapped, _core.SavedCache(mapped)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def pages(mapped: np.ndarray[Any, Any], saved: _core.SavedCache, layer: int) -> Any:
    """The pages of a packed layer, ``[rows, kv_heads, page_bytes]``, where they lie in the file.

    Args:
        mapped: the file's bytes.
        saved: what stands where.
        layer: its index.
    """
    shape, start, stop = saved.pages(layer)
    return mapped[start:stop].reshape(shape)
