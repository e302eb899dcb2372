"""One layer's cache over memory that Python owns: for engine and kernel authors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nqkv_rs import _core
from nqkv_rs._arguments import dimensions, real, whole, wholes
from nqkv_rs.saved import map_saved, pages
from nqkv_rs.scheme import Scheme
from nqkv_rs.transform import Transform, transform

__all__ = ["LayerCache"]

Allocate = Callable[[int, int, int], Any]


def _numpy_rows(rows: int, kv_heads: int, page_bytes: int) -> Any:
    # From the start of a cache line, which codes are read by.
    size = rows * kv_heads * page_bytes
    room = np.empty(size + 63, dtype=np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + size].reshape(rows, kv_heads, page_bytes)


def _allocator(allocate: Any) -> Allocate:
    if allocate is None:
        return _numpy_rows
    if not callable(allocate):
        raise TypeError(f"allocate: expected a function, got {allocate!r}")
    return allocate  # type: ignore[no-any-return]


class LayerCache:
    """The packed cache of one attention layer: ``sinks | pages | tail`` for each sequence.

    Tensors are anything that speaks DLPack in host memory (NumPy arrays, PyTorch CPU tensors), in
    float64, float32, float16 or bfloat16 (NumPy's through ml_dtypes), with any strides. Calls lock
    the cache: threads may share one, and see whole calls.

    Args:
        scheme: a preset's name, a :class:`Scheme`, or a mapping of its JSON form.
        kv_heads: KV heads of the layer.
        key_dim: head size of keys, 1 to 256; padded to a multiple of 16 in pages.
        value_dim: head size of values; keys' if None.
        batch: sequences.
        exact_dtype: element type of exact tokens (tail and sinks), unless the scheme names one.
        allocate: ``(rows, kv_heads, page_bytes) -> uint8 array`` of that shape (or of more rows),
            contiguous and writable, in memory that no cache has; NumPy's ``empty`` if None.

    Raises:
        ValueError: a number or shape outside its domain.
        NotImplementedError: a combination that this version does not have.

    Example:
        >>> import numpy as np
        >>> cache = LayerCache("nqkv4", kv_heads=2, key_dim=64)
        >>> k, v = np.random.randn(2, 1, 2, 200, 64).astype("float32")
        >>> cache.append(k, v)
        >>> cache.attend(np.ones((1, 4, 1, 64), "float32")).shape
        (1, 1, 4, 64)
    """

    def __init__(
        self,
        scheme: str | Scheme | Mapping[str, Any] = "nqkv4",
        *,
        kv_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        batch: int = 1,
        exact_dtype: str = "float32",
        allocate: Allocate | None = None,
    ) -> None:
        self.scheme = Scheme.of(scheme)
        kv_heads = whole("kv_heads", kv_heads, 1, 4096)
        batch = whole("batch", batch, 0, 65536)
        self.key_dim = whole("key_dim", key_dim, 1, 256)
        self.value_dim = key_dim if value_dim is None else whole("value_dim", value_dim, 1, 256)
        if not isinstance(exact_dtype, str):
            raise TypeError(f"exact_dtype: expected a name such as 'float32', got {exact_dtype!r}")
        self._allocate = _allocator(allocate)
        self.core = _core.LayerCache(
            self.scheme.to_json(), kv_heads, key_dim, self.value_dim, exact_dtype, batch
        )

    @classmethod
    def _of(cls, core: _core.LayerCache, like: LayerCache) -> LayerCache:
        cache = cls.__new__(cls)
        cache.scheme, cache.core = like.scheme, core
        cache.key_dim, cache.value_dim = like.key_dim, like.value_dim
        cache._allocate = like._allocate
        return cache

    @property
    def pool(self) -> list[Any]:
        """The arrays that hold all pages, ``[rows, kv_heads, page_bytes]`` uint8.

        Own ones first, then those of other caches whose pages are shared; rows of page tables
        count over them in this order. ``src/page.rs`` draws the format.
        """
        return self.core.pool()

    def append(
        self, k: Any, v: Any, *, keys: Transform | None = None, values: Transform | None = None
    ) -> None:
        """Append the same number of tokens to every sequence.

        One by one or in bulk, the bytes are the same.

        Args:
            k: keys, ``[batch, kv_heads, tokens, key_dim]``; must be finite.
            v: values, ``[batch, kv_heads, tokens, value_dim]``; must be finite.
            keys: what is done to the keys first.
            values: what is done to the values first.

        Raises:
            ValueError: a wrong shape, or a NaN or infinity (named by its index).
            TypeError: a wrong dtype or device. After any error the cache is as it was.
        """
        k = k if keys is None else transform(k, keys)
        v = v if values is None else transform(v, values)
        # Asked again after every allocation: other threads may have taken the rows meanwhile.
        while missing := self.core.try_append(k, v):
            rows = self._allocate(missing, self.core.kv_heads, self.core.page_bytes)
            self.core.add_rows(rows, missing)

    def attend(
        self,
        q: Any,
        *,
        out: Any | None = None,
        scale: float | None = None,
        starts: Sequence[int] | None = None,
        fresh: tuple[Any, Any] | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        lse: Any | None = None,
    ) -> Any:
        """Attention of queries on the cache, read from codes.

        Call it after the queries' own tokens were appended. Query ``i`` of ``n`` stands at
        position ``tokens - n + i`` and attends every earlier position and its own.

        Args:
            q: ``[batch, q_heads, n, key_dim]``; ``q_heads`` is a multiple of ``kv_heads``. In
                float64 the arithmetic is float64 too, otherwise float32.
            out: where to write, ``[batch, n, q_heads, value_dim]``, contiguous; a new NumPy
                float32 array (float64 for a float64 ``q``) if None.
            scale: multiplies scores; ``key_dim ** -0.5`` if None.
            starts: for each sequence the first position that may be attended (left padding).
            fresh: exact keys and values of the newest ``n`` tokens, read instead of the cache's.
            window: a query at ``p`` attends ``p - window + 1 ..= p``.
            soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``.
            lse: where to write the log-sum-exp of scores, float32 ``[batch, n, q_heads]``.

        Returns:
            ``out``. A query that may attend nothing gets zeros, and log-sum-exp minus infinity.

        Raises:
            ValueError: a wrong shape, or fewer tokens in the cache than queries.
            TypeError: a wrong dtype or device.
        """
        if out is None:
            shape = dimensions("q", q)
            if len(shape) != 4:
                got = f"{type(q).__name__} of shape {shape}"
                raise ValueError(
                    f"q: expected an array [batch, q_heads, queries, key_dim], got {got}"
                )
            b, heads, n, _ = shape
            if n > 1 and self.core.batch > 0 and n > (held := self.core.tokens(0)):
                # Said here, before memory is asked for.
                expected = f"at most {held} (the tokens held, queries included)"
                raise ValueError(f"queries: expected {expected}, got {n}")
            dtype = "float64" if str(getattr(q, "dtype", "")).endswith("float64") else "float32"
            out = np.empty((b, n, heads, self.value_dim), dtype=dtype)
        self.attend_into(
            q, out, scale, starts=starts, fresh=fresh, window=window, soft_cap=soft_cap, lse=lse
        )
        return out

    def attend_into(
        self,
        q: Any,
        out: Any,
        scale: float | None,
        *,
        starts: Sequence[int] | None = None,
        fresh: tuple[Any, Any] | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        lse: Any | None = None,
    ) -> tuple[int, int]:
        """:meth:`attend` into ``out``, returning what was read.

        Returns:
            Attended positions, and those of them that were read from pages, each summed over
            sequences and queries.
        """
        if fresh is not None and (not isinstance(fresh, (tuple, list)) or len(fresh) != 2):
            raise TypeError(f"fresh: expected a pair (keys, values), got {type(fresh).__name__}")
        fresh_k, fresh_v = fresh if fresh is not None else (None, None)
        if starts is not None:
            if not hasattr(starts, "__iter__"):
                raise TypeError(f"starts: expected a position per sequence, got {starts!r}")
            starts = wholes("starts", starts, 0)
        if window is not None:
            window = whole("window", window, 1)
        if soft_cap is not None:
            soft_cap = real("soft_cap", soft_cap)
        return self.core.attend(
            q,
            out,
            1 / math.sqrt(self.key_dim) if scale is None else real("scale", scale),
            starts=starts,
            fresh_k=fresh_k,
            fresh_v=fresh_v,
            window=window,
            soft_cap=soft_cap,
            lse=lse,
        )

    def tokens(self, sequence: int = 0) -> int:
        """Tokens of a sequence."""
        return self.core.tokens(whole("sequence", sequence, 0))

    def memory(self) -> dict[str, int]:
        """Bytes allocated for ``codes``, ``scales`` (fields, padding, tables), ``tail``, ``sinks``.

        ``total`` is their sum.
        """
        return self.core.memory()

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Cut every sequence to its first tokens: valid counts go down, nothing is re-encoded.

        Args:
            lengths: tokens to keep, one number for all sequences or one for each.

        Raises:
            ValueError: more than a sequence holds.
        """
        # NumPy's numbers have `__iter__`, too.
        if hasattr(lengths, "__iter__") and getattr(lengths, "ndim", 1) > 0:
            kept = wholes("lengths", lengths, 0)
        else:
            kept = [whole("lengths", lengths, 0)] * self.core.batch
        self.core.crop(kept)

    def select(self, sequences: Sequence[int]) -> None:
        """Make sequence ``i`` what ``sequences[i]`` was: reorder, repeat or drop sequences.

        Args:
            sequences: indices; pages are shared, exact tokens copied.
        """
        self.core.select(wholes("sequences", sequences, 0))

    def fork(self) -> LayerCache:
        """A cache of its own with the same tokens.

        Pages are shared and stay as they are, whatever is done to either cache; exact tokens are
        copied. What the fork appends stands in memory of its own. ``copy.copy`` and
        ``copy.deepcopy`` fork, too.
        """
        return self._of(self.core.fork(), self)

    def __copy__(self) -> LayerCache:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCache:
        return self.fork()

    def split(self, sizes: Sequence[int]) -> list[LayerCache]:
        """Forks of consecutive sequences.

        Args:
            sizes: sequences of each fork; their sum is the batch.
        """
        sizes = wholes("sizes", sizes, 0)
        if sum(sizes) != self.core.batch:
            raise ValueError(f"sizes: expected a sum of {self.core.batch} (the batch), got {sizes}")
        parts, first = [], 0
        for n in sizes:
            part = self.fork()
            part.core.select(list(range(first, first + n)))
            parts.append(part)
            first += n
        return parts

    @classmethod
    def join(cls, caches: Sequence[LayerCache]) -> LayerCache:
        """One cache with the sequences of all, in order: forks of them, put together.

        Args:
            caches: at least one, all of one scheme and shape; lengths may differ.
        """
        if not hasattr(caches, "__iter__"):
            raise TypeError(f"caches: expected several LayerCache, got {type(caches).__name__}")
        caches = list(caches)
        for cache in caches:
            if not isinstance(cache, LayerCache):
                got = f"{type(cache).__module__}.{type(cache).__qualname__}"
                raise TypeError(f"caches: expected nqkv_rs.LayerCache, got {got}")
        joined = _core.LayerCache.join([cache.core for cache in caches])
        return cls._of(joined, caches[0])

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the cache as one safetensors file that :meth:`load` maps; complete or not at all.

        Args:
            path: where to; a file there is replaced.

        Returns:
            Bytes written.
        """
        return _core.save(os.fsdecode(path), "null", [self.core])

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        layer: int = 0,
        *,
        allocate: Allocate | None = None,
    ) -> LayerCache:
        """A saved cache over the mapped file: pages are not read into memory of their own.

        What is appended stands in new memory; the file never changes. Do not shorten it while the
        cache lives.

        Args:
            path: what :meth:`save`, or :meth:`nqkv_rs.NqkvCache.save`, wrote.
            layer: which of the file's layers.
            allocate: as for the constructor.

        Raises:
            ValueError: a truncated, damaged, foreign or newer file, or a layer that is not packed.
            OSError: no such file.
        """
        layer, allocate = whole("layer", layer, 0), _allocator(allocate)
        mapped, saved = map_saved(path)
        try:
            core = saved.layer(layer, pages(mapped, saved, layer))
        except ValueError as error:
            raise ValueError(f"{os.fsdecode(path)}: {error}") from None
        return cls.of_saved(core, json.loads(saved.header), layer, allocate=allocate)

    @classmethod
    def of_saved(
        cls,
        core: _core.LayerCache,
        header: Mapping[str, Any],
        layer: int,
        *,
        allocate: Allocate | None = None,
    ) -> LayerCache:
        """A restored core as what :meth:`load` returns: for integrations.

        Args:
            core: what ``_core.SavedCache.layer`` made.
            header: the file's header.
            layer: the layer's index.
            allocate: as for the constructor.
        """
        if not isinstance(core, _core.LayerCache):
            raise TypeError(f"core: expected _core.LayerCache, got {type(core).__name__}")
        try:
            of = header["layers"][layer]
            scheme = Scheme.of(header["schemes"][of["scheme"]])
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"header: expected a saved one with a packed layer {layer}") from None
        shape = of["key_dim"], of["value_dim"]
        return cls.of_core(core, scheme, *shape, allocate=allocate)

    @classmethod
    def of_core(
        cls,
        core: _core.LayerCache,
        scheme: Scheme,
        key_dim: int,
        value_dim: int,
        *,
        allocate: Allocate | None = None,
    ) -> LayerCache:
        """A core that was made elsewhere as a cache: for integrations.

        Args:
            core: the core's cache.
            scheme: its scheme.
            key_dim: its head size of keys.
            value_dim: its head size of values.
            allocate: as for the constructor.
        """
        cache = cls.__new__(cls)
        cache.scheme = scheme
        cache.key_dim, cache.value_dim = key_dim, value_dim
        cache._allocate = _allocator(allocate)
        cache.core = core
        return cache

    def reset(self) -> None:
        """Drop every token. The pool's memory stays, for reuse."""
        self.core.reset()
