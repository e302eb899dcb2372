"""`NqkvCache`, a packed cache for transformers' ``generate``, and the ``nqkv`` attention."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from nqkv_rs.integrations import saved
from nqkv_rs.integrations.attention import nqkv_attention_forward
from nqkv_rs.integrations.layer import NqkvLayer
from nqkv_rs.integrations.shared import Shared
from nqkv_rs.scheme import Scheme

__all__ = ["NqkvCache", "nqkv_attention_forward"]


class NqkvCache(Cache):
    """A KV cache in 4-bit pages for a decoder model of transformers 5, read without being unpacked.

    Pass it as ``past_key_values``. Under the default ``sdpa`` attention every decode step and every
    chunk reads packed pages; there is nothing else to switch on. In a hybrid model, layers that are
    not full attention (sliding windows, linear attention) keep the library's own classes. In a
    model whose layers all slide they are packed, and keep the tokens outside the window, too.

    ``copy.deepcopy`` gives a cache with the same tokens that shares their pages: encode a prefix
    once, and continue it as often as you like.

    Args:
        config: the model's config.
        scheme: a preset's name (:func:`nqkv_rs.presets`), a :class:`nqkv_rs.Scheme`, or a mapping.
        prefill: ``"exact"``: a prompt attends its own tokens as they came, and is packed for what
            follows; ``"quantized"``: it attends what the cache holds, as decoding does.
        nbits: bits of a code, keys and values alike; the scheme's if None.
        residual_length: newest tokens that are always exact; the scheme's if None.
        sink_tokens: first tokens that are always exact; the scheme's if None.
        skip_layers: layers that keep an ordinary cache, negative ones from the last.
        strict: raise where a slow path would be taken, instead of warning once.

    Raises:
        NotImplementedError: multi-head latent attention, encoder-decoder and state-space models.
        ValueError: a scheme or an argument outside its domain.

    Example:
        ``cache = NqkvCache(model.config)``;
        ``model.generate(**inputs, past_key_values=cache)``; ``cache.memory_usage()``.
    """

    def __init__(
        self,
        config: Any,
        scheme: str | Scheme | Mapping[str, Any] = "nqkv4",
        *,
        prefill: Literal["exact", "quantized"] = "exact",
        nbits: int | None = None,
        residual_length: int | None = None,
        sink_tokens: int | None = None,
        skip_layers: Sequence[int] | None = None,
        strict: bool = False,
    ) -> None:
        recipe = Scheme.of(
            scheme,
            nbits=nbits,
            residual_length=residual_length,
            sink_tokens=sink_tokens,
            skip_layers=skip_layers,
        )
        self._pack(_library_layers(config), recipe, prefill, strict)
        self._model: dict[str, Any] | None = saved.describe(config)

    def _pack(self, layers: list[Any], scheme: Scheme, prefill: str, strict: bool) -> None:
        """Put packed layers in the place of the library's attention layers."""
        if prefill not in ("exact", "quantized"):
            raise ValueError(f"prefill: expected 'exact' or 'quantized', got {prefill!r}")
        if not isinstance(strict, bool):
            raise TypeError(f"strict: expected True or False, got {strict!r}")
        self.scheme = scheme
        self._shared = Shared(prefill, strict)
        count = len(layers)
        for i in scheme.skip_layers:
            if not -count <= i < count:
                raise ValueError(f"skip_layers: expected {-count} to {count - 1}, got {i}")
        skipped = {i % count for i in scheme.skip_layers}
        kinds = {type(x) for x in layers}
        # All layers of a kind share one mask, so all of them show their tokens alike: where
        # sliding layers are packed, a skipped one keeps what is outside its window, too.
        slides = kinds == {DynamicSlidingWindowLayer}
        kind = DynamicSlidingWindowLayer if slides else DynamicLayer
        mine = [i for i, x in enumerate(layers) if type(x) is kind]
        if not set(mine) - skipped:
            raise NotImplementedError(
                "NqkvCache: expected at least one full-attention layer to pack, got "
                f"{count} layers of {', '.join(sorted(x.__name__ for x in kinds))}"
                + (f", of which {len(skipped)} are skipped" if skipped else "")
            )
        for i in mine:
            window = getattr(layers[i], "sliding_window", None)
            if i in skipped:
                layers[i] = _growing()
            else:
                layers[i] = NqkvLayer(scheme, self._shared, window)
        super().__init__(layers=layers)

    @classmethod
    def from_cache(
        cls,
        cache: Cache,
        scheme: str | Scheme | Mapping[str, Any] = "nqkv4",
        *,
        config: Any = None,
        prefill: Literal["exact", "quantized"] = "exact",
        strict: bool = False,
        **words: Any,
    ) -> NqkvCache:
        """Pack what a dense cache holds, layer by layer; the dense cache stays as it is.

        Args:
            cache: a ``DynamicCache``.
            scheme: as for the constructor.
            config: the model's config. If None, the kinds of layers are those of ``cache``; pass it
                where that was made without one and the model has sliding-window layers.
            prefill: as for the constructor.
            strict: as for the constructor.
            **words: ``nbits``, ``residual_length``, ``sink_tokens``, ``skip_layers``.

        Returns:
            A cache with the same tokens: the one that prefilling them would have made.

        Raises:
            TypeError: another kind of cache.
            ValueError: ``cache`` is of another model, or has dropped tokens that are to be packed.
        """
        if not isinstance(cache, DynamicCache):
            raise TypeError(f"cache: expected a DynamicCache, got {type(cache).__name__}")
        layers = list(cache.layers) if config is None else _library_layers(config)
        if len(layers) != len(cache.layers) or not layers:
            wanted = "at least 1" if config is None else f"{len(layers)} (config's)"
            raise ValueError(f"cache: expected {wanted} layers, got {len(cache.layers)}")
        made = cls.__new__(cls)
        made._pack(layers, Scheme.of(scheme, **words), prefill, strict)
        for i, dense in enumerate(cache.layers):
            made.layers[i] = _filled(i, made.layers[i], dense)
        made._model = None if config is None else saved.describe(config)
        return made

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the cache as one safetensors file that :meth:`load` maps; complete or not at all.

        Args:
            path: where to; a file there is replaced.

        Returns:
            Bytes written.

        Raises:
            ValueError: an empty cache.
            NotImplementedError: layers that are not attention (linear attention).
            OSError: the file cannot be written.
        """
        return saved.save(path, self._model, self.layers)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: Any,
        *,
        prefill: Literal["exact", "quantized"] = "exact",
        strict: bool = False,
        device: torch.device | str = "cpu",
    ) -> NqkvCache:
        """A saved cache over the mapped file: pages are not read into memory of their own.

        One file serves any number of runs: what is appended stands in new memory, and the file
        never changes. Do not shorten it while a cache lives.

        Args:
            path: what :meth:`save` wrote.
            config: the config of the model that continues it.
            prefill: as for the constructor.
            strict: as for the constructor; refuses a file that names another model of the same
                shape, too, instead of warning.
            device: "cpu" maps the file; a CUDA device gets a copy of it.

        Raises:
            ValueError: a truncated, damaged, foreign or newer file, or a cache of another model;
                each has its own message.
            OSError: no such file.
        """
        made = cls.__new__(cls)

        def pack(layers: list[Any], scheme: Scheme) -> list[Any]:
            made._pack(layers, scheme, prefill, strict)
            return made.layers

        where = torch.device(device)
        if where.type not in ("cpu", "cuda"):
            raise ValueError(f"device: expected the CPU or a CUDA device, got {where}")
        saved.restore(path, config, _library_layers(config), pack, strict, where)
        made._model = saved.describe(config)
        return made

    def to_dense(self) -> DynamicCache:
        """A ``DynamicCache`` of the dequantized keys and values, a copy in every layer."""
        dense = DynamicCache()
        # It would add layers as they come; here they are.
        dense.layer_class_to_replicate = None
        dense.layers = [_dense(layer) for layer in self.layers]
        return dense

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        """For each layer: keys, values (dequantized, made anew), and its window, a tensor or None.

        This is what ``DynamicCache`` gives to those who gather or export a cache.
        """
        for layer in self.layers:
            yield (
                getattr(layer, "keys", None),
                getattr(layer, "values", None),
                getattr(layer, "_sliding_window_tensor", None),
            )

    def stats(self) -> dict[str, int]:
        """Calls of attention by path since the cache was made.

        Returns:
            ``packed_decode`` (one query per sequence) and ``packed_chunk`` (several), read from
            pages; ``exact_prefill``, a prompt on its own tokens; ``dequantized``, slow calls;
            ``attended_positions`` and ``packed_positions`` (those read from pages), summed over
            layers, sequences and queries.
        """
        return self._shared.counters()

    def memory_usage(self) -> dict[str, float]:
        """Bytes really allocated for keys and values.

        Returns:
            ``codes``, ``scales`` (fields, padding, page tables), ``tail``, ``sinks``; ``other``
            (layers of the library's own classes); ``total``; ``dense``, the same tokens in 16
            bits; ``ratio``, dense over total; ``effective_bits``, total bits per element held.
        """
        used = dict.fromkeys(("codes", "scales", "tail", "sinks", "other"), 0)
        elements = 0
        for layer in self.layers:
            if isinstance(layer, NqkvLayer):
                if layer.cache is not None:
                    memory = layer.cache.memory()
                    for name in ("codes", "scales", "tail", "sinks"):
                        used[name] += memory[name]
                    width = layer.kv_heads * (layer.cache.key_dim + layer.cache.value_dim)
                    tokens = (layer.cache.tokens(b) for b in range(layer.cache.core.batch))
                    elements += width * sum(tokens)
            else:
                for x in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                    if isinstance(x, torch.Tensor):
                        used["other"] += x.untyped_storage().nbytes()
                        elements += x.numel()
        total = sum(used.values())
        return {
            **used,
            "total": total,
            "dense": 2 * elements,
            "ratio": 2 * elements / total if total else 0.0,
            "effective_bits": 8 * total / elements if elements else 0.0,
        }


def _growing() -> Any:
    return DynamicLayer()  # type: ignore[no-untyped-call]


def _library_layers(config: Any) -> list[Any]:
    """The library's own empty layers, by its own rules."""
    if not callable(getattr(config, "get_text_config", None)):
        raise TypeError(f"config: expected a model's config, got {type(config).__name__}")
    _refuse(config)
    text = config.get_text_config(decoder=True)
    layers = list(DynamicCache(config=text).layers)
    if len(layers) != text.num_hidden_layers:
        layers = [_growing() for _ in range(text.num_hidden_layers)]
    return layers


def _filled(i: int, layer: Any, dense: Any) -> Any:
    """``layer`` with the tokens of ``dense``; a copy of ``dense`` if it is of the same class."""
    if layer is dense or type(layer) is type(dense):
        return copy.deepcopy(dense)
    if not isinstance(getattr(dense, "keys", None), torch.Tensor) or dense.get_seq_length() == 0:
        return layer
    held, seen = dense.keys.shape[2], dense.get_seq_length()
    if held != seen:
        raise ValueError(
            f"cache: expected all tokens of layer {i}, got the last {held} of {seen}: its window "
            "has slid over the others"
        )
    if isinstance(layer, NqkvLayer):
        layer.append(dense.keys.detach(), dense.values.detach())
    else:
        layer.update(dense.keys, dense.values)
    return layer


def _dense(layer: Any) -> Any:
    """``layer`` in the library's own class, with tensors of its own."""
    if not isinstance(layer, NqkvLayer):
        return copy.deepcopy(layer)
    grown = _growing()
    if layer.get_seq_length() > 0:
        grown.update(*layer.read())
    return grown


def _refuse(config: Any) -> None:
    """Name the kinds of models whose caches are something else."""
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder model"
    elif getattr(text, "kv_lora_rank", None) is not None:
        what = "a model with multi-head latent attention (MLA)"
    elif text.model_type in ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"):
        what = "a state-space model"
    else:
        return
    raise NotImplementedError(
        f"NqkvCache: expected a decoder with full-attention layers, got {what} ({text.model_type})"
    )
