"""One layer's cache on a CUDA device: the same pages, appended and read by kernels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nqkv_rs import _attend, _core
from nqkv_rs._arguments import whole
from nqkv_rs.cache import LayerCache
from nqkv_rs.scheme import Scheme
from nqkv_rs.transform import Transform, parts_of, transform

__all__ = ["CudaLayerCache"]


@dataclass
class _Room:
    """Device memory of a cache besides its rows, as the core takes it."""

    codec: Any
    counts: Any
    table: Any
    arrived: Any
    sinks: tuple[Any, Any]
    tail: tuple[Any, Any]
    capacity: int


class CudaLayerCache:
    """:class:`nqkv_rs.LayerCache` on a CUDA device, for PyTorch tensors.

    Pages are byte for byte those of the CPU. Nothing waits for the device: a NaN or infinity that
    is appended is not refused here. A decode step is one launch on pages, sinks and tail; what no
    kernel takes (docs/limits.md), and a prompt's chunk, dequantizes a bounded number of tokens at a
    time.

    Args:
        scheme: as for :class:`nqkv_rs.LayerCache`.
        kv_heads: KV heads of the layer.
        key_dim: head size of keys, 1 to 256.
        value_dim: head size of values; keys' if None.
        batch: sequences.
        exact_dtype: element type of exact tokens, unless the scheme names one.
        device: the CUDA device.

    Raises:
        RuntimeError: no such device, or a driver that is too old.
    """

    def __init__(
        self,
        scheme: str | Scheme | Mapping[str, Any] = "nqkv4",
        *,
        kv_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        batch: int = 1,
        exact_dtype: str = "bfloat16",
        device: Any = "cuda",
    ) -> None:
        self.scheme = Scheme.of(scheme)
        self.device = torch.device(device)
        if self.device.type != "cuda":
            raise ValueError(f"device: expected a CUDA device, got {self.device}")
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        # Raise where attention dequantizes tiles though it is a decode step.
        self.strict = False
        self.key_dim = whole("key_dim", key_dim, 1, 256)
        self.value_dim = key_dim if value_dim is None else whole("value_dim", value_dim, 1, 256)
        self.core = _core.CudaLayerCache(
            self.scheme.to_json(),
            whole("kv_heads", kv_heads, 1, 4096),
            self.key_dim,
            self.value_dim,
            exact_dtype,
            whole("batch", batch, 0, 65536),
            self.device.index,
        )
        blob = torch.frombuffer(bytearray(self.core.codec_bytes()), dtype=torch.uint8)
        self._codec = blob.to(self.device)

    @property
    def pool(self) -> list[Any]:
        """The tensors that hold all pages, ``[rows, kv_heads, page_bytes]`` uint8."""
        return self.core.pool()

    def _room(self, batch: int, capacity: int) -> _Room:
        sinks, tail = self.core.sizes()

        def zeros(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.uint8, device=self.device)

        return _Room(
            codec=self._codec,
            counts=zeros(16 * batch),
            table=zeros(8 * batch * capacity),
            arrived=zeros(4 * batch),
            sinks=(zeros(sinks[0] * batch), zeros(sinks[1] * batch)),
            tail=(zeros(tail[0] * batch), zeros(tail[1] * batch)),
            capacity=capacity,
        )

    def reserve(self, tokens: int) -> bool:
        """Make ready for the next tokens, so that appending them allocates nothing.

        A CUDA graph may hold appends of up to 16 tokens. Before it is captured all tokens of its
        replays have to be reserved; a capture that would need more is refused. Lengths lie on the
        device, so that each replay goes on where the last one ended, pages included: count its
        tokens with :meth:`advance`. The capture itself counts as the first replay. A replay that
        finds no reserved page for a sequence leaves that sequence as it is. After
        :meth:`crop`, :meth:`select` and :meth:`reset`, reserve again before the next replay.

        Args:
            tokens: of every sequence.

        Returns:
            Whether memory that graphs hold has moved: those captured before must not be replayed.
            Reserving at once what all replays take moves nothing later.
        """
        tokens = whole("tokens", tokens, 0)
        moved = self._make_room(tokens)
        self.core.reserve(tokens, self._codec)
        _attend.make_ready(self)
        return moved

    def advance(self, tokens: int) -> None:
        """Count tokens that a replayed CUDA graph has appended.

        Args:
            tokens: of every sequence.

        Raises:
            ValueError: more than were reserved.
        """
        self.core.advance(whole("tokens", tokens, 0))

    def _make_room(self, tokens: int) -> bool:
        missing = self.core.rows_missing(tokens)
        if missing > 0:
            shape = (missing, self.core.kv_heads, self.core.page_bytes)
            # Bytes that stand for nothing stay 0, as on the CPU.
            self.core.add_rows(torch.zeros(shape, dtype=torch.uint8, device=self.device))
        pages = self.core.capacity_missing(tokens)
        if pages > 0:
            # Twice what is needed: a longer table is a copy of the old one.
            self.core.set_room(self._room(self.core.batch, max(64, 2 * pages)))
        return pages > 0

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        keys: Transform | None = None,
        values: Transform | None = None,
    ) -> None:
        """Append the same number of tokens to every sequence.

        Up to 16 tokens are transformed by the launch that appends them, which a CUDA graph may
        hold: its replays read cosines, sines and centres where they lie. More tokens, and large
        batches of schemes without a fast way, take a launch and a copy for each transform.

        Args:
            k: keys, ``[batch, kv_heads, tokens, key_dim]``, any float dtype and strides.
            v: values.
            keys: what is done to the keys first.
            values: what is done to the values first.

        Raises:
            ValueError: a wrong shape.
            TypeError: a wrong dtype or device.
        """
        if keys is None and values is None:
            self.core.append(k, v, self._make_room)
            return
        # A step of decoding transforms in its one launch; what cannot, takes a launch for each.
        parts = parts_of("keys", keys), parts_of("values", values)
        if self.core.append(k, v, self._make_room, *parts):
            return
        k = k if keys is None else transform(k, keys)
        v = v if values is None else transform(v, values)
        self.core.append(k, v, self._make_room)

    def read(
        self, start: int, tokens: int, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantized tokens of every sequence; zeros past a sequence's end.

        Args:
            start: first token.
            tokens: how many.
            dtype: of the result.

        Returns:
            Keys and values, ``[batch, kv_heads, tokens, dim]``.
        """
        heads, batch = self.core.kv_heads, self.core.batch
        k = torch.empty((batch, heads, tokens, self.key_dim), dtype=dtype, device=self.device)
        v = torch.empty((batch, heads, tokens, self.value_dim), dtype=dtype, device=self.device)
        self.core.read(start, k, v)
        return k, v

    def attend_into(
        self,
        q: torch.Tensor,
        out: torch.Tensor,
        scale: float | None,
        *,
        starts: Sequence[int] | None = None,
        fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        lse: torch.Tensor | None = None,
    ) -> tuple[int, int]:
        """Attention into ``out``; arguments as for :meth:`nqkv_rs.LayerCache.attend`.

        One launch where a kernel takes the call. Elsewhere tiles of tokens are dequantized one
        after the other and merged by their log-sum-exp.

        Returns:
            Attended positions, and those of them that were read from pages.
        """
        _attend.into(self, q, out, scale, starts, fresh, window, soft_cap, lse)
        return self.core.attended(q.shape[2], starts, window, fresh is not None)

    def attend(self, q: torch.Tensor, **words: Any) -> torch.Tensor:
        """Attention of queries on the cache; see also :func:`nqkv_rs.decode_attention`.

        Args:
            q: ``[batch, q_heads, queries, key_dim]``.
            **words: as for :meth:`nqkv_rs.LayerCache.attend`.

        Returns:
            ``[batch, queries, q_heads, value_dim]`` in the dtype of ``q``.
        """
        batch, heads, queries, _ = q.shape
        shape = (batch, queries, heads, self.value_dim)
        out = torch.empty(shape, dtype=q.dtype, device=self.device)
        _attend.into(self, q, out, words.pop("scale", None), **words)
        return out

    def tokens(self, sequence: int = 0) -> int:
        """Tokens of a sequence."""
        return self.core.tokens(whole("sequence", sequence, 0))

    def memory(self) -> dict[str, int]:
        """Bytes allocated on the device, as :meth:`nqkv_rs.LayerCache.memory` names them."""
        return self.core.memory()

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Cut every sequence to its first tokens.

        Args:
            lengths: tokens to keep, one number for all sequences or one for each.
        """
        kept = [lengths] * self.core.batch if isinstance(lengths, int) else list(lengths)
        self.core.crop([whole("lengths", n, 0) for n in kept])

    def _capacity(self) -> int:
        tables = (len(self.core.table(b)) for b in range(self.core.batch))
        return max(64, 2 * max(tables, default=0))

    def select(self, sequences: Sequence[int]) -> None:
        """Make sequence ``i`` what ``sequences[i]`` was; pages are shared.

        Args:
            sequences: indices.
        """
        chosen = [whole("sequences", i, 0) for i in sequences]
        self.core.select(chosen, self._room(len(chosen), self._capacity()))

    def fork(self, sequences: Sequence[int] | None = None) -> CudaLayerCache:
        """A cache of its own with the same tokens; pages are shared.

        Args:
            sequences: those to take; all if None.
        """
        all_ = range(self.core.batch)
        chosen = list(all_) if sequences is None else [whole("sequences", i, 0) for i in sequences]
        copy = CudaLayerCache.__new__(CudaLayerCache)
        copy.scheme, copy.device, copy._codec = self.scheme, self.device, self._codec
        copy.key_dim, copy.value_dim, copy.strict = self.key_dim, self.value_dim, self.strict
        copy.core = self.core.fork(chosen, self._room(len(chosen), self._capacity()))
        return copy

    def to_host(self) -> LayerCache:
        """The same cache in host memory, page for page; waits for the device."""
        shape = (self.core.named_rows(), self.core.kv_heads, self.core.page_bytes)
        pool = torch.empty(shape, dtype=torch.uint8)
        core = self.core.to_host(pool, self._codec)
        return LayerCache.of_core(core, self.scheme, self.key_dim, self.value_dim)

    @classmethod
    def of_host(cls, cache: LayerCache, device: Any = "cuda") -> CudaLayerCache:
        """A cache on a device with what one in host memory holds, page for page.

        Args:
            cache: it may go on by itself; nothing is shared.
            device: the CUDA device.
        """
        core = cache.core
        made = cls(
            cache.scheme,
            kv_heads=core.kv_heads,
            key_dim=cache.key_dim,
            value_dim=cache.value_dim,
            batch=core.batch,
            exact_dtype=core.exact_dtype,
            device=device,
        )
        tables = [core.table(b) for b in range(core.batch)]
        rows = len({row for table in tables for row, _ in table})
        shape = (rows, core.kv_heads, core.page_bytes)
        if rows > 0:
            made.core.add_rows(torch.empty(shape, dtype=torch.uint8, device=made.device))
        longest = max(map(len, tables), default=0)
        made.core.set_room(made._room(core.batch, max(64, 2 * longest)))
        made.core.fill(core, made._codec)
        return made

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the cache as :meth:`nqkv_rs.LayerCache.save` does, by way of host memory.

        Args:
            path: where to; a file there is replaced.

        Returns:
            Bytes written.
        """
        return self.to_host().save(path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], layer: int = 0, *, device: Any = "cuda"
    ) -> CudaLayerCache:
        """A saved cache on a device; errors as for :meth:`nqkv_rs.LayerCache.load`.

        Args:
            path: what :meth:`save`, or that of another cache, wrote.
            layer: which of the file's layers.
            device: the CUDA device.
        """
        return cls.of_host(LayerCache.load(path, layer), device)

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaLayerCache:
        return self.fork()

    def reset(self) -> None:
        """Drop every token. Memory stays, for reuse."""
        self.core.reset()
