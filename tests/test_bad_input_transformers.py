"""Wrong calls of NqkvCache, from_cache, enable, save and load: named, and the cache as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402
from real import everything  # noqa: E402
from transformers import DynamicCache, StaticCache  # noqa: E402

import nqkv_rs  # noqa: E402
from nqkv_rs import NqkvCache  # noqa: E402

MODEL = tiny.model("llama")
CONFIG = MODEL.config
K = torch.ones(1, 2, 3, 16, dtype=torch.float64)


def filled() -> NqkvCache:
    cache = NqkvCache(CONFIG, tiny.SHORT)
    with torch.no_grad():
        MODEL(torch.arange(2, 92)[None], past_key_values=cache)
    return cache


def dense(k: Any, v: Any) -> DynamicCache:
    cache = DynamicCache(config=CONFIG)
    for layer in range(2):
        cache.update(k, v, layer)
    return cache


def with_nan() -> Any:
    x = K.clone()
    x[0, 1, 2, 3] = float("nan")
    return x


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scheme": 3}, TypeError, r"scheme: .*got int"),
        ({"scheme": "x"}, ValueError, r"scheme: expected one of nqkv4"),
        ({"scheme": None}, TypeError, r"scheme: .*got NoneType"),
        ({"prefill": "fast"}, ValueError, r"prefill: expected 'exact' or 'quantized', got 'fast'"),
        ({"prefill": None}, ValueError, r"prefill: .*got None"),
        ({"nbits": 9}, ValueError, r"nbits: expected 1 to 8, got 9"),
        ({"nbits": 2**70}, ValueError, r"nbits: "),
        ({"nbits": 4.0}, TypeError, r"nbits: .*got 4\.0"),
        ({"residual_length": -1}, ValueError, r"residual_length: .*got -1"),
        ({"residual_length": 0.5}, TypeError, r"residual_length: .*got 0\.5"),
        ({"sink_tokens": "4"}, TypeError, r"sink_tokens: .*got '4'"),
        ({"sink_tokens": 2**63}, ValueError, r"sink_tokens: expected 0 to 4096"),
        ({"skip_layers": [2]}, ValueError, r"skip_layers: expected -2 to 1, got 2"),
        ({"skip_layers": "0"}, TypeError, r"skip_layers: .*got '0'"),
        ({"skip_layers": [0, 1]}, NotImplementedError, r"at least one full-attention layer"),
        ({"colour": 1}, TypeError, r"unexpected keyword argument 'colour'"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        NqkvCache(CONFIG, **options)
    with pytest.raises(error, match=message):
        NqkvCache.from_cache(dense(K, K), **options)
    before = dict(vars(MODEL))
    with pytest.raises(error, match=message):
        nqkv_rs.enable(MODEL, **options)
    assert vars(MODEL) == before


@pytest.mark.parametrize("model", [None, 3, "llama", CONFIG, type(MODEL)])
def test_what_is_no_model_is_not_enabled(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a transformers model with generate\(\)"):
        nqkv_rs.enable(model)
    assert nqkv_rs.disable(model) is model, "nothing was enabled"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: None, TypeError, r"cache: expected a DynamicCache, got NoneType"),
        (lambda: ((K, K), (K, K)), TypeError, r"cache: .*got tuple"),
        (lambda: NqkvCache(CONFIG), TypeError, r"cache: .*got NqkvCache"),
        (lambda: StaticCache(CONFIG, max_cache_len=8), TypeError, r"cache: .*got StaticCache"),
        (lambda: DynamicCache(), ValueError, r"cache: expected at least 1 layers, got 0"),
        (lambda: dense(with_nan(), K), ValueError, r"k: expected finite .*NaN .*index 83"),
        (lambda: dense(K, with_nan()), ValueError, r"v: expected finite .*NaN .*index 83"),
        (lambda: dense(K.long(), K.long()), TypeError, r"dtype .*int64"),
        (lambda: dense(K, K[:, :1]), ValueError, r"v: expected shape \[1, 2, 3, 16\]"),
        (lambda: dense(K, K[:, :, :2]), ValueError, r"v: expected shape .*got \[1, 2, 2, 16\]"),
        (
            lambda: dense(torch.ones(1, 2, 3, 300), torch.ones(1, 2, 3, 300)),
            ValueError,
            r"key_dim: expected 1 to 256, got 300",
        ),
    ],
)
def test_a_cache_that_cannot_be_packed(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        NqkvCache.from_cache(make())


Row = tuple[str, Callable[[NqkvCache], Any], Any, str]
CALLS: list[Row] = [
    ("NaN", lambda c: c.update(with_nan(), K, 0), ValueError, r"k: .*NaN .*index 83"),
    ("inf", lambda c: c.update(K, K / 0, 0), ValueError, r"v: .*inf .*index 0"),
    ("int", lambda c: c.update(K.long(), K.long(), 0), TypeError, r"k: .*got int64"),
    ("complex", lambda c: c.update(K * 1j, K, 0), TypeError, r"k: .*complex128"),
    ("3-D", lambda c: c.update(K[0], K[0], 0), ValueError, r"k: .*4 dimensions"),
    ("heads", lambda c: c.update(K[:, :1], K[:, :1], 0), ValueError, r"k: .*got \[1, 1, 3, 16\]"),
    ("dim", lambda c: c.update(K[..., :8], K, 1), ValueError, r"k: .*got \[1, 2, 3, 8\]"),
    ("batch", lambda c: c.update(K.repeat(2, 1, 1, 1), K, 0), ValueError, r"k: .*\[2, 2, 3, 16\]"),
    ("tokens", lambda c: c.update(K, K[:, :, :1], 0), ValueError, r"v: .*got \[1, 2, 1, 16\]"),
    ("meta", lambda c: c.update(K.to("meta"), K, 0), TypeError, r"k: .*host memory.*meta"),
    ("keys", lambda c: setattr(c.layers[0], "keys", K), AttributeError, r"keys: .*update\(\)"),
    ("crop far", lambda c: c.crop(-91), ValueError, r"at least -90, got -91"),
    (
        "reorder",
        lambda c: c.reorder_cache(torch.tensor([1])),
        ValueError,
        r"expected 0 to 0, got 1",
    ),
    ("save", lambda c: c.save(None), TypeError, r"PathLike.*NoneType"),
    ("save NUL", lambda c: c.save("a\0b"), ValueError, r"path: .*NUL"),
    ("save nowhere", lambda c: c.save("/nowhere/at/all"), FileNotFoundError, r"'/nowhere/at/all'"),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), [pytest.param(*row[1:], id=row[0]) for row in CALLS]
)
def test_a_refused_call_leaves_every_layer_as_it_was(
    call: Callable[[NqkvCache], Any], error: Any, message: str
) -> None:
    cache = filled()
    before = [everything(layer.cache) for layer in cache.layers]
    with pytest.raises(error, match=message):
        call(cache)
    assert [everything(layer.cache) for layer in cache.layers] == before
    with torch.no_grad():
        MODEL(torch.tensor([[5]]), past_key_values=cache)
    assert cache.get_seq_length() == 91


def test_files_and_options_of_load(tmp_path: Path) -> None:
    path = tmp_path / "c"
    cache = filled()
    cache.save(path)
    for where, options, error, message in (
        (None, {}, TypeError, r"PathLike.*NoneType"),
        (tmp_path, {}, IsADirectoryError, r"directory"),
        (path, {"prefill": "x"}, ValueError, r"prefill: .*got 'x'"),
        (path, {"colour": 1}, TypeError, r"colour"),
    ):
        with pytest.raises(error, match=message):
            NqkvCache.load(where, CONFIG, **options)
    in_bytes = str(path).encode()
    assert cache.save(in_bytes) == path.stat().st_size
    assert NqkvCache.load(in_bytes, CONFIG).get_seq_length() == 90


OPERATIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("config None", lambda c: NqkvCache(None), TypeError, r"config: expected a model's config"),
    ("config int", lambda c: NqkvCache.load("x", 3), TypeError, r"config: expected a model's"),
    ("strict", lambda c: NqkvCache(tiny.CONFIGS["llama"](), strict="no"), TypeError, r"strict: "),
    ("reorder -1", lambda c: c.reorder_cache(torch.tensor([-1])), ValueError, r"beam_idx: .*-1"),
    ("reorder 9", lambda c: c.reorder_cache(torch.tensor([9])), ValueError, r"beam_idx: .*got 9"),
    ("reorder floats", lambda c: c.reorder_cache(torch.tensor([0.5])), TypeError, r"beam_idx: "),
    ("reorder 2-D", lambda c: c.reorder_cache(torch.tensor([[0]])), TypeError, r"beam_idx: "),
    ("mask", lambda c: c.batch_select_indices(torch.tensor([True] * 3)), ValueError, r"mask"),
    ("repeat -1", lambda c: c.batch_repeat_interleave(-1), ValueError, r"repeats: .*-1"),
    ("crop text", lambda c: c.crop("1"), TypeError, r"."),
    ("crop far", lambda c: c.layers[0].crop(-(2**70)), ValueError, r"tokens_to_remove: "),
]


@pytest.mark.parametrize(("name", "call", "kind", "message"), OPERATIONS, ids=lambda x: str(x)[:20])
def test_operations_are_refused_by_name(
    name: str, call: Any, kind: type[Exception], message: str
) -> None:
    cache = NqkvCache(tiny.CONFIGS["llama"](), tiny.SHORT)
    k = torch.randn(2, 2, 90, 16)
    cache.update(k, k, 0)
    before = [x.clone() for x in cache.layers[0].read()]
    with pytest.raises(kind, match=message):
        call(cache)
    assert all(torch.equal(x, y) for x, y in zip(before, cache.layers[0].read(), strict=True))
