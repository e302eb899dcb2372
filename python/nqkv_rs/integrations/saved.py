"""`NqkvCache.save` and `load`: what the file says of the model, and its ordinary layers."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from nqkv_rs import _core
from nqkv_rs.cache import LayerCache
from nqkv_rs.cuda_cache import CudaLayerCache
from nqkv_rs.integrations.layer import NqkvLayer
from nqkv_rs.saved import map_saved, pages
from nqkv_rs.scheme import Scheme

__all__ = ["check_model", "describe", "restore", "save"]

# What decides whether keys and values of one model mean anything to another.
_WORDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "sliding_window",
    "layer_types",
    "rope_theta",
    "rope_parameters",
)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def describe(config: Any) -> dict[str, Any]:
    """What a file says of the model.

    Args:
        config: the model's config.

    Returns:
        The words of the config that decide about keys and values, and the model's name.
    """
    text = config.get_text_config(decoder=True)
    words = {word: getattr(text, word, None) for word in _WORDS}
    name = os.path.basename(str(getattr(config, "_name_or_path", "")).rstrip("/"))
    described = {**words, "name": name}
    return dict(json.loads(json.dumps(described, default=str)))


def check_model(path: str, theirs: Any, config: Any, strict: bool) -> None:
    """Refuse a cache of another model.

    Args:
        path: the file, for messages.
        theirs: what :func:`describe` said when it was saved; None if the config was not known.
        config: the config of the model that the cache is loaded for.
        strict: raise, instead of warning, where only the names differ.

    Raises:
        ValueError: another model.
    """
    if not isinstance(theirs, dict):
        return
    mine = describe(config)
    for word in _WORDS:
        if theirs.get(word) != mine[word]:
            raise ValueError(
                f"{path}: saved cache: expected one of this model ({word} {mine[word]}), got one "
                f"of another model ({word} {theirs.get(word)})"
            )
    if theirs.get("name") and mine["name"] and theirs["name"] != mine["name"]:
        text = (
            f"{path}: saved cache: expected one of {mine['name']}, got one of {theirs['name']}, a "
            "model of the same shape: unless the weights are the same, its tokens mean nothing here"
        )
        if strict:
            raise ValueError(f"strict=True: {text}")
        warnings.warn(f"nqkv_rs: {text}", stacklevel=3)


def save(path: str | os.PathLike[str], model: dict[str, Any] | None, layers: list[Any]) -> int:
    """Write layers as one file.

    Args:
        path: where to.
        model: what :func:`describe` says, or None.
        layers: a cache's layers.

    Returns:
        Bytes written.

    Raises:
        ValueError: no packed layer holds a token.
        NotImplementedError: a layer that is neither packed nor ordinary attention.
    """
    saved: list[Any] = []
    for i, layer in enumerate(layers):
        if isinstance(layer, NqkvLayer):
            cache = layer.cache
            if cache is not None and not isinstance(cache, LayerCache):
                cache = cache.to_host()
            saved.append(None if cache is None else cache.core)
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            if layer.keys is None or layer.values is None or layer.get_seq_length() == 0:
                saved.append(None)
                continue
            state = {"tokens": int(layer.get_seq_length())}
            tensors = [x.detach().cpu().contiguous() for x in (layer.keys, layer.values)]
            saved.append((json.dumps(state), *tensors))
        else:
            raise NotImplementedError(
                f"save: expected attention layers, got layer {i} of {type(layer).__name__}"
            )
    if not any(isinstance(x, _core.LayerCache) for x in saved):
        raise ValueError("save: expected a cache that holds tokens, got an empty one")
    return _core.save(os.fsdecode(path), json.dumps(model), saved)


def restore(
    path: str | os.PathLike[str],
    config: Any,
    layers: list[Any],
    pack: Callable[[list[Any], Scheme], list[Any]],
    strict: bool,
    device: torch.device,
) -> None:
    """Fill a new cache from a file.

    Args:
        path: the file.
        config: the model's config.
        layers: the library's own layers for it.
        pack: puts packed layers in their places, by the file's scheme; returns all layers.
        strict: as for :func:`check_model`.
        device: where the cache goes.

    Raises:
        ValueError: a file that cannot be read, or a cache of another model.
    """
    name = os.fsdecode(path)
    mapped, saved = map_saved(path)
    header = json.loads(saved.header)
    check_model(name, header["model"], config, strict)
    if len(header["layers"]) != len(layers):
        raise ValueError(
            f"{name}: saved cache: expected one of this model ({len(layers)} layers), got one of "
            f"another model ({len(header['layers'])} layers)"
        )
    if not header["schemes"]:
        raise ValueError(f"{name}: saved cache: expected at least one packed layer, got none")
    for i, layer in enumerate(pack(layers, Scheme.of(header["schemes"][0]))):
        try:
            _fill(layer, i, mapped, saved, header, device)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _fill(
    layer: Any,
    i: int,
    mapped: Any,
    saved: _core.SavedCache,
    header: dict[str, Any],
    device: torch.device,
) -> None:
    kind = header["layers"][i]["kind"]
    expected = "packed" if isinstance(layer, NqkvLayer) else "dense"
    if kind not in (expected, "empty"):
        raise ValueError(f"saved cache: expected layer {i} to be {expected}, got {kind}")
    if kind == "packed":
        core = saved.layer(i, torch.from_numpy(pages(mapped, saved, i)))
        cache = LayerCache.of_saved(core, header, i, allocate=layer.allocate)
        layer.adopt(cache if device.type == "cpu" else CudaLayerCache.of_host(cache, device))
    elif kind == "dense":
        tensors = []
        for which in ("keys", "values"):
            dtype, shape, start, stop = saved.tensor(f"layers.{i}.{which}")
            tensors.append(torch.from_numpy(mapped[start:stop].copy()).view(_DTYPES[dtype]))
            tensors[-1] = tensors[-1].reshape(shape).to(device)
        layer.lazy_initialization(*tensors)
        layer.keys, layer.values = tensors
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = header["layers"][i]["state"]["tokens"]
