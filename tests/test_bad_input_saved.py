"""Wrong calls of save and load, from the shim to the core: named, no file made, nothing changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real import everything

from nqkv_rs import LayerCache, _core
from nqkv_rs.saved import map_saved, pages

HEADS, DIM = 2, 16
X = np.random.default_rng(0).standard_normal((1, HEADS, 150, DIM)).astype(np.float32)


def made() -> LayerCache:
    cache = LayerCache(kv_heads=HEADS, key_dim=DIM)
    cache.append(X, X)
    return cache


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (None, TypeError, r"path.*NoneType|PathLike.*NoneType"),
        (3, TypeError, r"PathLike.*int"),
        (object(), TypeError, r"PathLike.*object"),
        (["c"], TypeError, r"PathLike.*list"),
        ("a\0b", ValueError, r"NUL|null"),
        ("\ud800", ValueError, r"surrogates"),
        ("", (ValueError, OSError), r"path: expected the path of a file, got|Is a directory"),
        ("/", (ValueError, OSError), r"path: expected the path of a file, got|Is a directory"),
        ("nowhere/c", FileNotFoundError, r"No such file or directory: 'nowhere/c'"),
        ("x" * 5000, OSError, r"File name too long"),
        (".", (ValueError, OSError), r"path|director"),
    ],
)
def test_a_path_that_is_none(
    path: Any, error: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = made()
    before = everything(cache)
    for call in (cache.save, LayerCache.load):
        with pytest.raises(error, match=message):
            call(path)
    assert everything(cache) == before
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_path_in_any_form(tmp_path: Path) -> None:
    cache = made()
    for path in (tmp_path / "a", str(tmp_path / "b"), os.fsencode(tmp_path / "c\udcff")):
        size = cache.save(path)
        assert os.stat(path).st_size == size
        assert everything(LayerCache.load(path))[:3] == everything(cache)[:3]


Row = tuple[str, Callable[[Path], Any], Any, str]
LOAD: list[Row] = [
    ("layer 1", lambda p: LayerCache.load(p, 1), ValueError, r"layer 1 to be packed, got None"),
    ("layer -1", lambda p: LayerCache.load(p, -1), ValueError, r"layer: .*at least 0, got -1"),
    ("layer 2**70", lambda p: LayerCache.load(p, 2**70), ValueError, r"layer: .*got 118059"),
    ("layer 0.0", lambda p: LayerCache.load(p, 0.0), TypeError, r"layer: .*got 0\.0"),
    ("layer None", lambda p: LayerCache.load(p, None), TypeError, r"layer: .*got None"),
    ("allocate", lambda p: LayerCache.load(p, allocate=3), TypeError, r"allocate: .*got 3"),
    ("of none", lambda p: LayerCache.of_saved(None, {}, 0), TypeError, r"core: .*got NoneType"),
    ("of shim", lambda p: LayerCache.of_saved(made(), {}, 0), TypeError, r"core: .*LayerCache"),
    ("header", lambda p: LayerCache.of_saved(made().core, {}, 0), ValueError, r"header: .*layer 0"),
    ("none", lambda p: LayerCache.of_saved(made().core, None, 0), ValueError, r"header: expected"),
]
SAVED: list[Row] = [
    ("none", lambda p: _core.SavedCache(None), TypeError, r"bytes: .*got NoneType"),
    ("bytes", lambda p: _core.SavedCache(p.read_bytes()), TypeError, r"bytes: .*got bytes"),
    ("2-D", lambda p: _core.SavedCache(np.zeros((8, 8), "u1")), ValueError, r"bytes: .*\[8, 8\]"),
    ("floats", lambda p: _core.SavedCache(np.zeros(64, "f4")), ValueError, r"bytes: .*uint8"),
    ("ints", lambda p: _core.SavedCache(np.zeros(64, "i8")), TypeError, r"bytes: .*int64"),
    ("strides", lambda p: _core.SavedCache(np.zeros(64, "u1")[::2]), TypeError, r"contiguous"),
    ("empty", lambda p: _core.SavedCache(np.zeros(0, "u1")), ValueError, r"truncated: .*got 0"),
    ("zeros", lambda p: _core.SavedCache(np.zeros(64, "u1")), ValueError, r"saved cache: "),
    ("ones", lambda p: _core.SavedCache(np.full(64, 255, "u1")), ValueError, r"saved cache: "),
    (
        "meta",
        lambda p: _core.SavedCache(torch.ones(9, dtype=torch.uint8, device="meta")),
        TypeError,
        r"bytes: .*meta",
    ),
    ("tensor", lambda p: map_saved(p)[1].tensor("x"), ValueError, r"tensor x, got none"),
    ("tensor 3", lambda p: map_saved(p)[1].tensor(3), TypeError, r"str"),
    ("pages 9", lambda p: map_saved(p)[1].pages(9), ValueError, r"layer 9 to be packed"),
    ("layer 9", lambda p: map_saved(p)[1].layer(9, None), ValueError, r"layer 9 to be packed"),
    ("no pool", lambda p: map_saved(p)[1].layer(0, None), TypeError, r"pool: .*got NoneType"),
    (
        "rows",
        lambda p: layer(p, lambda x: x[:0]),
        ValueError,
        r"pool: expected shape \d rows, got 0",
    ),
    ("page", lambda p: layer(p, lambda x: x[..., 1:].copy()), ValueError, r"pool: expected shape"),
    ("order", lambda p: layer(p, lambda x: x.transpose(1, 0, 2)), ValueError, r"pool: "),
    ("dtype", lambda p: layer(p, lambda x: x.astype("f4")), TypeError, r"pool: .*uint8"),
    (
        "read-only",
        lambda p: layer(p, lambda x: read_only(x.copy())),
        TypeError,
        r"pool: .*read-only",
    ),
    ("twice", lambda p: layer(p, lambda x: x, times=2), ValueError, r"pool: .*no cache holds"),
]


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


def layer(path: Path, change: Callable[[Any], Any], times: int = 1) -> list[Any]:
    mapped, saved = map_saved(path)
    pool = change(pages(mapped, saved, 0))
    return [saved.layer(0, pool) for _ in range(times)]


STATE = json.dumps({"tokens": 150})
SAVE: list[Row] = [
    ("none", lambda p: _core.save(p, "null", None), TypeError, r"Sequence"),
    ("shim", lambda p: _core.save(p, "null", [made()]), TypeError, r"LayerArgument"),
    ("pair", lambda p: _core.save(p, "null", [("{}", X)]), TypeError, r"LayerArgument"),
    ("model none", lambda p: _core.save(p, None, [made().core]), TypeError, r"str"),
    ("model", lambda p: _core.save(p, "{", [made().core]), ValueError, r"model: expected JSON"),
    ("model NaN", lambda p: _core.save(p, "NaN", [made().core]), ValueError, r"model: .*JSON"),
    ("model deep", lambda p: _core.save(p, "[" * 10**5, [made().core]), ValueError, r"model: "),
    ("state", lambda p: _core.save(p, "null", [("x", X, X)]), ValueError, r"state: expected JSON"),
    (
        "ints",
        lambda p: _core.save(p, "{}", [(STATE, X, X.astype(int))]),
        TypeError,
        r"values: .*int",
    ),
    (
        "bytes",
        lambda p: _core.save(p, "{}", [(STATE, X.view("u1"), X)]),
        TypeError,
        r"keys: .*uint8",
    ),
    ("strides", lambda p: _core.save(p, "{}", [(STATE, X.T, X)]), TypeError, r"keys: .*contiguous"),
    (
        "meta",
        lambda p: _core.save(p, "{}", [(STATE, X, torch.ones(1, device="meta"))]),
        TypeError,
        r"values: .*meta",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(*row[1:], id=f"{name} {row[0]}")
        for name, table in (("load", LOAD), ("saved", SAVED), ("save", SAVE))
        for row in table
    ],
)
def test_a_refused_call_leaves_the_file_as_it_was(
    call: Callable[[Path], Any], error: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    cache = made()
    cache.save(path)
    before, state = path.read_bytes(), everything(cache)
    with pytest.raises(error, match=message):
        call(path)
    assert path.read_bytes() == before and everything(cache) == state
    assert [x.name for x in tmp_path.iterdir()] == ["c"]
    assert everything(LayerCache.load(path))[1:3] == state[1:3]


def test_a_refused_append_to_a_loaded_cache_changes_nothing(tmp_path: Path) -> None:
    made().save(tmp_path / "c")
    loaded = LayerCache.load(tmp_path / "c")
    before = everything(loaded)
    bad = X.copy()
    bad[0, 1, 149, 3] = np.inf
    for k, v, error in ((X, bad, ValueError), (X[:, :1], X, ValueError), (X, X > 0, TypeError)):
        with pytest.raises(error):
            loaded.append(k, v)
        assert everything(loaded) == before
    with pytest.raises(ValueError, match="at most 150"):
        loaded.crop(151)
    assert everything(loaded) == before
