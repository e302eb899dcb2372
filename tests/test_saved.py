"""Saved caches: the same bits back, no copy, and a message of its own for every way to be wrong."""

from __future__ import annotations

import copy
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nqkv_rs
from nqkv_rs import LayerCache, _core

safetensors = pytest.importorskip("safetensors.numpy")

HEADS, DIM = 2, 24


def numbers(tokens: int, batch: int = 2, seed: int = 0) -> Any:
    """Keys and values."""
    shape = (2, batch, HEADS, tokens, DIM)
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def filled(scheme: str = "nqkv4", tokens: int = 300) -> LayerCache:
    """Two sequences of different lengths that share no row, and a third that shares the first's."""
    cache = LayerCache(scheme, kv_heads=HEADS, key_dim=DIM, batch=2)
    cache.append(*numbers(tokens))
    if tokens:
        cache.crop([max(tokens - 7, 1), tokens // 3])
    cache.select([0, 1, 0])
    return cache


def state(cache: LayerCache) -> list[Any]:
    """Every number that a cache holds."""
    core, out = cache.core, []
    for b in range(core.batch):
        k, v = np.empty((2, core.kv_heads, core.tokens(b), cache.key_dim), "f4")
        core.read(b, 0, k, v)
        out += [k.tobytes(), v.tobytes(), [count for _, count in core.table(b)]]
    return out


@pytest.mark.parametrize("tokens", [0, 1, 3, 64, 100, 300])
@pytest.mark.parametrize("scheme", nqkv_rs.presets())
def test_a_loaded_cache_is_the_saved_one(scheme: str, tokens: int, tmp_path: Path) -> None:
    cache = filled(scheme, tokens)
    path = tmp_path / "cache.safetensors"
    assert cache.save(path) == path.stat().st_size
    loaded = LayerCache.load(path)
    assert state(loaded) == state(cache)
    assert loaded.scheme == cache.scheme
    # Shared rows stand in the file once, and are shared again.
    rows = {row for b in range(3) for row, _ in cache.core.table(b)}
    assert loaded.core.rows == len(rows)
    assert loaded.core.table(0) == loaded.core.table(2)
    before = path.read_bytes()
    for x in (cache, loaded):
        x.append(*numbers(90, batch=3, seed=1))
    assert state(loaded) == state(cache)
    assert path.read_bytes() == before, "the file is never written to"
    assert state(LayerCache.load(path)) != state(loaded)


def test_one_file_serves_many_caches(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    cache = filled("nqkv")
    cache.save(path)
    caches = [LayerCache.load(path) for _ in range(3)]
    caches.append(copy.deepcopy(caches[0]))
    for i, x in enumerate(caches):
        x.append(*numbers(70, batch=3, seed=i))
    for i, x in enumerate(caches):
        expected = cache.fork()
        expected.append(*numbers(70, batch=3, seed=i))
        assert state(x)[0:2] == state(expected)[0:2]


def test_pages_are_mapped_not_copied(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")

    def anonymous() -> int:
        rows = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(rows["RssAnon"].split()[0]) * 1024

    cache = LayerCache("nqkv4", kv_heads=8, key_dim=128, exact_dtype="float16")
    k = np.random.default_rng(0).standard_normal((1, 8, 8192, 128)).astype("f4")
    cache.append(k, k)
    size = cache.save(tmp_path / "c")
    q = np.ones((1, 8, 1, 128), "f4")
    LayerCache.load(tmp_path / "c").attend(q)
    before = anonymous()
    loaded = LayerCache.load(tmp_path / "c")
    result = loaded.attend(q)
    grown = anonymous() - before
    assert size > 9e6 and grown < size / 10, (size, grown)
    np.testing.assert_array_equal(result, cache.attend(q))


def test_the_file_is_safetensors(tmp_path: Path) -> None:
    cache = filled()
    cache.save(tmp_path / "c")
    tensors = safetensors.load_file(tmp_path / "c")
    assert sorted(x.removeprefix("layers.0.") for x in tensors) == [
        "lengths", "pages", "sinks_k", "sinks_v", "table", "tail_k", "tail_v",
    ]  # fmt: skip
    pages = tensors["layers.0.pages"]
    used = np.concatenate(cache.pool)
    for row, (mine, _) in zip(pages, cache.core.table(0), strict=False):
        np.testing.assert_array_equal(row, used[mine])
    assert tensors["layers.0.lengths"].tolist()[0][:2] == [4, len(cache.core.table(0))]


# --- refusals -------------------------------------------------------------------------------------


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A file's JSON header and its data."""
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def whole(header: dict[str, Any], data: bytes) -> bytes:
    """A file of these."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def edited(data: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with another header of ours, its checksum right."""
    header, rest = parts(data)
    ours = json.loads(header["__metadata__"]["nqkv_rs"])
    edit(ours)
    text = json.dumps(ours)
    crc = f"{zlib.crc32(text.encode()):08x}"
    header["__metadata__"] = {"nqkv_rs": text, "nqkv_rs_crc32": crc}
    return whole(header, rest)


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    """The file with one bit of byte ``at`` changed."""
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def foreign(data: bytes) -> bytes:
    header, rest = parts(data)
    del header["__metadata__"]
    return whole(header, rest)


def table_row(data: bytes) -> bytes:
    """Row 99 in the page table, checksums right."""
    header, rest = parts(data)
    at = header["layers.0.table"]["data_offsets"]
    table = struct.pack("<I", 99) + rest[at[0] + 4 : at[1]]
    changed = whole(header, rest[: at[0]] + table + rest[at[1] :])
    crc = f"{zlib.crc32(table):08x}"
    return edited(changed, lambda h: h["tensors"]["layers.0.table"].update(crc32=crc))


WRONG: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("empty", lambda d: b"", r"truncated: expected at least 8 bytes, got 0"),
    ("seven bytes", lambda d: d[:7], r"truncated: expected at least 8 bytes, got 7"),
    ("in the header", lambda d: d[:300], r"truncated: expected a header of \d+ bytes, got a file"),
    ("in the data", lambda d: d[:-1], r"truncated: expected (\d+) bytes, got \d+"),
    ("appended", lambda d: d + b"x", r"something was appended: expected \d+ bytes, got \d+"),
    ("a picture", lambda d: b"\x89PNG" + d, r"expected a safetensors file"),
    ("text", lambda d: b"hello, world. " * 99, r"expected a safetensors file"),
    ("other safetensors", foreign, r"without \"nqkv_rs\" metadata"),
    ("bit in a page", lambda d: flipped(d, 8 + len(d) // 4), r"damaged: layers\.0\.pages does not"),
    ("last bit", lambda d: flipped(d, len(d) - 1, 7), r"damaged: layers\.0\.\w+ does not match"),
    ("newer", lambda d: edited(d, lambda h: h.update(format=2)), r"format 1, got 2: .* newer"),
    (
        "newer pages",
        lambda d: edited(d, lambda h: h.update(page_version=9)),
        r"page_version 1, got 9: written by a newer",
    ),
    ("no layers", lambda d: edited(d, lambda h: h.update(layers=[])), r"layer 0 to be packed"),
    (
        "other heads",
        lambda d: edited(d, lambda h: h["layers"][0].update(kv_heads=3)),
        r"layers\.0\.pages: expected U8 of shape \[any, 3, ",
    ),
    (
        "huge batch",
        lambda d: edited(d, lambda h: h["layers"][0].update(batch=1 << 60)),
        r"layers\.0\.lengths: expected U32 of shape",
    ),
    (
        "wrong scheme",
        lambda d: edited(d, lambda h: h["schemes"][0].update(sink_tokens=1)),
        r"sequence 0: sinks: expected 0 to 1 tokens",
    ),
    ("wrong row", table_row, r"row of a page: expected below \d+ \(the rows held\), got 99"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_files_are_refused_by_name(
    name: str, change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "cache.safetensors"
    filled().save(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        LayerCache.load(path)
    assert str(error.value).startswith(str(path)), "the message names the file"


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    cache = LayerCache("nqkv", kv_heads=1, key_dim=16)
    cache.append(*np.random.default_rng(0).standard_normal((2, 1, 1, 3, 16)).astype("f4"))
    cache.save(tmp_path / "c")
    good = (tmp_path / "c").read_bytes()
    data = np.frombuffer(good, np.uint8).copy()
    _core.SavedCache(data)
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        with pytest.raises(ValueError, match="saved cache"):
            _core.SavedCache(data)
        data[at] ^= 1 << at % 8


def test_saving_fails_whole(tmp_path: Path) -> None:
    cache = filled()
    with pytest.raises(OSError, match="No such file"):
        cache.save(tmp_path / "nowhere" / "c")
    with pytest.raises(OSError):
        cache.save(tmp_path)
    with pytest.raises(FileNotFoundError):
        LayerCache.load(tmp_path / "none")
    (tmp_path / "c").write_bytes(b"old")
    with pytest.raises(TypeError, match="Packed"):
        _core.save(tmp_path / "c", "null", ["no layer"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="model: expected JSON"):
        _core.save(tmp_path / "c", "{", [cache.core])
    assert (tmp_path / "c").read_bytes() == b"old"
    assert [x.name for x in tmp_path.iterdir()] == ["c"]


def test_the_format_does_not_drift(tmp_path: Path) -> None:
    """A file that an earlier build saved: read to the same numbers, written to the same bytes."""
    golden = Path(__file__).parent / "golden" / "saved-v1.safetensors"
    loaded = LayerCache.load(golden)
    k, v = np.linspace(-1, 1, 2 * 2 * 170 * 16, dtype="f4").reshape(2, 1, 2, 170, 16)
    cache = LayerCache("nqkv4-signed", kv_heads=2, key_dim=16, exact_dtype="bfloat16")
    cache.append(k, v)
    cache.select([0, 0])
    cache.crop([170, 66])
    assert state(loaded) == state(cache)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == golden.read_bytes()
