"""One attention layer of a transformers cache, stored in pages."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from nqkv_rs._arguments import whole, wholes
from nqkv_rs.cache import LayerCache
from nqkv_rs.integrations.packed import PackedKV
from nqkv_rs.integrations.shared import Shared
from nqkv_rs.scheme import Scheme

if TYPE_CHECKING:
    from nqkv_rs.cuda_cache import CudaLayerCache

__all__ = ["NqkvLayer"]


class NqkvLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A layer of an :class:`~nqkv_rs.NqkvCache`.

    Args:
        scheme: the recipe.
        shared: what all layers share.
        window: positions that a query attends at most, its own included; None for all. Tokens
            outside the window stay in the cache.

    Attributes:
        pool: uint8 tensors ``[rows, kv_heads, page_bytes]`` that hold the pages.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, scheme: Scheme, shared: Shared, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scheme = scheme
        self.shared = shared
        self.window = window
        self.cache: LayerCache | CudaLayerCache | None = None
        self.kv_heads = 0

    @property
    def pool(self) -> list[Any]:
        """The tensors that hold the pages."""
        return [] if self.cache is None else self.cache.pool

    @property
    def keys(self) -> torch.Tensor | None:
        """Dequantized keys ``[batch, kv_heads, tokens, key_dim]``, made anew at each access."""
        return None if self.cache is None else self.read()[0]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        if value is not None:
            raise AttributeError("keys: a packed layer is written by update() only")

    @property
    def values(self) -> torch.Tensor | None:
        """Dequantized values ``[batch, kv_heads, tokens, value_dim]``, made anew at each access."""
        return None if self.cache is None else self.read()[1]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        if value is not None:
            raise AttributeError("values: a packed layer is written by update() only")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Fit the layer to the first keys and values.

        Args:
            key_states: ``[batch, kv_heads, tokens, key_dim]``.
            value_states: ``[batch, kv_heads, tokens, value_dim]``.

        Raises:
            NotImplementedError: a device that is neither the CPU nor CUDA.
            RuntimeError: a CUDA driver that is too old.
        """
        batch, self.kv_heads, _, key_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        shape: dict[str, Any] = {
            "kv_heads": self.kv_heads,
            "key_dim": key_dim,
            "value_dim": value_states.shape[-1],
            "batch": batch,
            "exact_dtype": str(key_states.dtype).removeprefix("torch."),
        }
        if self.device.type == "cpu":
            self.cache = LayerCache(self.scheme, **shape, allocate=self.allocate)
        elif self.device.type == "cuda":
            from nqkv_rs.cuda_cache import CudaLayerCache

            self.cache = CudaLayerCache(self.scheme, **shape, device=self.device)
            self.cache.strict = self.shared.strict
        else:
            raise NotImplementedError(
                f"NqkvCache: expected a model on the CPU or on CUDA, got tensors on {self.device}"
            )
        self.is_initialized = True

    @staticmethod
    def allocate(rows: int, kv_heads: int, page_bytes: int) -> torch.Tensor:
        """Memory for pages.

        Args:
            rows: pool rows.
            kv_heads: KV heads.
            page_bytes: bytes of a page.
        """
        return torch.empty((rows, kv_heads, page_bytes), dtype=torch.uint8)

    def adopt(self, cache: LayerCache | CudaLayerCache) -> None:
        """Hold what ``cache`` holds.

        Args:
            cache: a cache of this layer's scheme.
        """
        self.cache, self.kv_heads = cache, cache.core.kv_heads
        self.dtype = getattr(torch, cache.core.exact_dtype)
        self.device = torch.device("cpu") if isinstance(cache, LayerCache) else cache.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return what attention should read.

        Args:
            key_states: new keys, ``[batch, kv_heads, tokens, key_dim]``, after RoPE.
            value_states: new values.
            *args: ignored, as in transformers.
            **kwargs: ignored, as in transformers.

        Returns:
            A pair of :class:`~nqkv_rs.integrations.packed.PackedKV`; for a prompt into an empty
            cache with ``prefill="exact"``, the keys and values as they came.
        """
        k, v = key_states.detach(), value_states.detach()
        before, queries = self.get_seq_length(), k.shape[2]
        self.append(k, v)
        exact = self.shared.prefill == "exact" and queries > 1
        if exact and before == 0:
            self.shared.count(exact_prefill=1)
            return key_states, value_states
        tokens = before + queries if k.shape[0] else 0
        return (
            self._packed("k", k, tokens, k if exact else None),
            self._packed("v", v, tokens, v if exact else None),
        )

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append, whatever attention reads.

        Args:
            k: new keys, ``[batch, kv_heads, tokens, key_dim]``, after RoPE.
            v: new values.
        """
        # An empty layer fits itself to what comes: after `reset`, another batch or dtype may.
        if self.cache is None or (self.get_seq_length() == 0 and not self._fits(k)):
            self.lazy_initialization(k, v)
        assert self.cache is not None
        self.cache.append(k, v)

    def _fits(self, k: torch.Tensor) -> bool:
        assert self.cache is not None
        return k.shape[0] == self.cache.core.batch and k.dtype == self.dtype

    def _packed(
        self, which: str, x: torch.Tensor, tokens: int, fresh: torch.Tensor | None
    ) -> PackedKV:
        batch, heads, queries, dim = x.shape
        return PackedKV.make(self, which, (batch, heads, tokens, dim), x, queries, fresh)

    def attend(
        self,
        query: torch.Tensor,
        scale: float | None,
        fresh_k: torch.Tensor | None,
        fresh_v: torch.Tensor | None,
        *,
        starts: list[int] | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """Attention on pages; see :meth:`nqkv_rs.LayerCache.attend`.

        Args:
            query: ``[batch, q_heads, queries, key_dim]``.
            scale: multiplies scores; ``key_dim ** -0.5`` if None.
            fresh_k: exact keys of the newest tokens, or None.
            fresh_v: exact values of the newest tokens, or None.
            starts: first attended position of each sequence.
            window: sliding window.
            soft_cap: soft cap of scores.

        Returns:
            ``[batch, queries, q_heads, value_dim]`` in the query's dtype.
        """
        assert self.cache is not None
        query = query.detach()
        b, heads, queries, _ = query.shape
        shape = (b, queries, heads, self.cache.value_dim)
        out = torch.empty(shape, dtype=query.dtype, device=query.device)
        fresh = None if fresh_k is None or fresh_v is None else (fresh_k, fresh_v)
        if starts is not None and len(starts) != b:
            starts = starts * b
        attended, packed = self.cache.attend_into(
            query, out, scale, starts=starts, fresh=fresh, window=window, soft_cap=soft_cap
        )
        call = "packed_decode" if queries == 1 else "packed_chunk"
        self.shared.count(**{call: 1, "attended_positions": attended, "packed_positions": packed})
        return out

    def dense(self, which: str, reason: str) -> torch.Tensor:
        """Dequantized keys or values, for an operation that cannot read pages.

        Args:
            which: ``"k"`` or ``"v"``.
            reason: the operation; goes into the warning.
        """
        self.shared.slow_path(reason)
        return self.read()[0 if which == "k" else 1]

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantized keys and values, ``[batch, kv_heads, tokens, dim]``, in the model's dtype."""
        assert self.cache is not None
        tokens = self.get_seq_length()
        if not isinstance(self.cache, LayerCache):
            return self.cache.read(0, tokens, self.dtype)
        core = self.cache.core
        k = torch.empty((core.batch, self.kv_heads, tokens, self.cache.key_dim), dtype=self.dtype)
        v = torch.empty((core.batch, self.kv_heads, tokens, self.cache.value_dim), dtype=self.dtype)
        for b in range(core.batch):
            core.read(b, 0, k[b], v[b])
        return k, v

    def get_seq_length(self) -> int:
        """Tokens held."""
        # Asked several times a step and layer.
        core = None if self.cache is None else self.cache.core
        return 0 if core is None or core.batch == 0 else core.tokens(0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask of the next ``query_length`` tokens."""
        # Before 5.5 this was a tensor of positions.
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + new, 0

    def get_max_length(self) -> int:
        """-1: grows without bound."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    def reset(self) -> None:
        """Drop every token; memory stays, for reuse."""
        if self.cache is not None:
            self.cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens.

        Args:
            tokens_to_remove: minus their number, as in transformers 5.16 and newer; a positive
                number is the length to keep, as before.
        """
        if self.cache is None:
            return
        held = self.get_seq_length()
        n = whole("tokens_to_remove", tokens_to_remove, -held)
        self.cache.core.remove_newest(-n if n <= 0 else max(held - n, 0))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make each sequence what the one at its index was. Pages are shared, not copied."""
        if self.cache is not None:
            most = self.cache.core.batch - 1
            self.cache.select(wholes("beam_idx", torch.as_tensor(beam_idx).tolist(), 0, most))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences (a boolean mask, or indices)."""
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            batch = 0 if self.cache is None else self.cache.core.batch
            if self.cache is not None and indices.shape != (batch,):
                got = list(indices.shape)
                raise ValueError(f"indices: expected a mask of shape [{batch}], got {got}")
            indices = indices.nonzero().flatten()
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence. Pages are shared, not copied."""
        repeats = whole("repeats", repeats, 0)
        if self.cache is not None:
            batch = self.cache.core.batch
            self.cache.select([i for i in range(batch) for _ in range(repeats)])

    def offload(self) -> None:
        """Nothing to move: pages stay where the model's layer is."""

    def prefetch(self) -> None:
        """Nothing to move back; see :meth:`offload`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NqkvLayer:
        """A layer with the same tokens. Pages are shared; each goes on in pages of its own."""
        other = NqkvLayer(self.scheme, copy.deepcopy(self.shared, memo), self.window)
        if self.cache is not None:
            other.cache = self.cache.fork()
            other.kv_heads, other.dtype, other.device = self.kv_heads, self.dtype, self.device
            other.is_initialized = True
        return other
