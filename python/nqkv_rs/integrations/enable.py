"""Make plain ``model.generate`` of a transformers model use a packed cache, and take that back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MethodType
from typing import Any

from nqkv_rs.integrations.naming import CACHE_KEYWORDS, cache_keyword
from nqkv_rs.integrations.transformers import NqkvCache
from nqkv_rs.scheme import Scheme

__all__ = ["disable", "enable"]

# What an enabled model carries: the options of its caches, and the `generate` that an earlier
# wrapper had put on the model itself, if any.
_MARK = "_nqkv_enabled"


def enable(model: Any, scheme: str | Scheme | Mapping[str, Any] = "nqkv4", **options: Any) -> Any:
    """Let every ``model.generate(...)`` make and use an :class:`~nqkv_rs.NqkvCache` of its own.

    A call that brings a cache (``cache``, ``past_key_values``), asks for a
    ``cache_implementation`` or says ``use_cache=False`` is left alone. The cache of a call is in
    what it returns: ``generate(..., return_dict_in_generate=True).past_key_values`` (``.cache``
    from transformers 5.24 on). Calling it again replaces scheme and options; the model's weights
    and its attention stay as they are.

    Args:
        model: a transformers model with ``generate``; also one that is to be an assistant model.
        scheme: as for :class:`~nqkv_rs.NqkvCache`.
        **options: the other arguments of :class:`~nqkv_rs.NqkvCache`.

    Returns:
        ``model``.

    Raises:
        TypeError: not a model with ``generate``.
        NotImplementedError: a model that :class:`~nqkv_rs.NqkvCache` refuses.
        ValueError: a scheme or option outside its domain, or a model whose ``generation_config``
            names a cache of the library's.

    Example:
        ``nqkv_rs.enable(model, "nqkv4")``; ``model.generate(**inputs)``;
        ``nqkv_rs.disable(model)``.
    """
    if not callable(getattr(type(model), "generate", None)) or not hasattr(model, "config"):
        raise TypeError(
            f"model: expected a transformers model with generate(), got {type(model).__name__}"
        )
    # Whatever would be refused later is refused now.
    NqkvCache(model.config, scheme, **options)
    named = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    if named is not None:
        raise ValueError(
            "model.generation_config.cache_implementation: expected None, so that generate() takes "
            f"the cache that it is given, got {named!r}"
        )
    state = vars(model)
    previous = state[_MARK][1] if _MARK in state else state.get("generate")
    state[_MARK] = (dict(options, scheme=scheme), previous)
    # A bound method follows `copy.deepcopy` of the model; a closure would call the original.
    state["generate"] = MethodType(_generate, model)
    return model


def disable(model: Any) -> Any:
    """Take back :func:`enable`; nothing happens where it was not called.

    Args:
        model: the model.

    Returns:
        ``model``.
    """
    state = getattr(model, "__dict__", {})
    if _MARK in state:
        previous = state.pop(_MARK)[1]
        if previous is None:
            del state["generate"]
        else:
            state["generate"] = previous
    return model


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    options, previous = vars(self)[_MARK]
    # Before 5.16 an assistant's generation config asks for "a dynamic cache that can go back":
    # the library's word for its default there, and nobody's choice.
    given = kwargs.get("generation_config")
    if given is not None and getattr(given, "cache_implementation", None) == "dynamic_full":
        given = copy.deepcopy(given)
        given.cache_implementation = None
        kwargs["generation_config"] = given
    if _wants_a_cache(self, args, kwargs):
        kwargs[cache_keyword()] = NqkvCache(self.config, **options)
    if previous is not None:
        return previous(*args, **kwargs)
    return type(self).generate(self, *args, **kwargs)


def _wants_a_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if any(kwargs.get(word) is not None for word in CACHE_KEYWORDS):
        return False
    # `generation_config` is the second argument; what stands beside it goes before it.
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    config = model.generation_config if given is None else given

    def said(name: str) -> Any:
        return kwargs.get(name, getattr(config, name, None))

    return said("use_cache") is not False and said("cache_implementation") is None
