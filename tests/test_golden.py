"""Golden vectors of every page format, made by plain.py; tests/golden.rs reproduces the same bytes.

`python tests/test_golden.py` writes the files again. They may only change with PAGE_VERSION.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest

FOLDER = Path(__file__).parent / "golden"
FOLDED = 0xFFFF_FFFF_FFFF_FFFF


def fnv1a(data: bytes) -> str:
    """64-bit FNV-1a: enough to notice a change, and ten lines in any language."""
    h = 0xCBF29CE484222325
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & FOLDED
    return f"{h:016x}"


def side(codebook: Any, axis: str, block: int, scale: str, **more: Any) -> dict[str, Any]:
    spec = {"codebook": codebook, "axis": axis, "block": block, "scale": scale}
    return {**spec, "scale_dtype": "fp16", **more}


def scheme(name: str, key: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    # No window and no sinks: the first 64 tokens are the first page.
    both = {"key": key, "value": value}
    return {"version": 1, "name": name, **both, "residual_length": 0, "sink_tokens": 0}


NF4_KEY = side("nf4", "token", 64, "mean_absmax")
NF4_VALUE = side("nf4", "channel", 64, "absmax")
PAPER = side("nf4", "channel", 256, "absmax", span="heads")
KINDS = ("absmax", "signed_absmax", "minmax", "mean_absmax", "rms")
DTYPES = ("fp32", "fp16", "bf16", "e4m3")
LEVELS = [-2.5, -1.0, -0.25, 0.125, 1.75]
SHAPES = ((1, 16, 16), (2, 64, 64), (3, 80, 48), (5, 20, 33), (1, 96, 128), (1, 256, 256))


def order(heads: int, stored: int, step: int) -> list[list[int]]:
    return [[(c * step + 3 * h + 1) % stored for c in range(stored)] for h in range(heads)]


def cases() -> Iterator[dict[str, Any]]:
    """Scheme, shape and inputs of every vector; ``tokens`` below 64 leave slots unwritten."""

    def case(s: dict[str, Any], heads: int, kd: int, vd: int, tokens: int = 64) -> dict[str, Any]:
        shape = {"heads": heads, "key_dim": kd, "value_dim": vd, "tokens": tokens}
        return {"name": s["name"], "scheme": s, **shape}

    kivi = {b: side(f"uniform{b}", "token", 32, "minmax") for b in (2, 4)}
    kivi_value = {b: side(f"uniform{b}", "channel", 32, "minmax") for b in (2, 4)}
    presets = {
        "nqkv4": (NF4_KEY, NF4_VALUE),
        "nqkv": (PAPER, PAPER),
        "kivi2": (kivi[2], kivi_value[2]),
        "kivi4": (kivi[4], kivi_value[4]),
        "nqkv4-signed": (NF4_KEY, side("l2signed4-64", "channel", 64, "signed_absmax")),
    }
    for name, (key, value) in presets.items():
        for heads, kd, vd in SHAPES:
            yield case(scheme(f"{name} {heads}x{kd}/{vd}", key, value), heads, kd, vd)
    for tokens in (1, 37):
        yield case(scheme(f"nqkv {tokens} tokens", PAPER, PAPER), 4, 80, 80, tokens)
    for i, (kind, dtype) in enumerate((k, d) for k in KINDS for d in DTYPES):
        key = side("uniform4", "token", (16, 32, 64)[i % 3], kind, scale_dtype=dtype)
        value = side("uniform4", "channel", (16, 48, 32)[i % 3], kind, scale_dtype=dtype)
        yield case(scheme(f"{kind} {dtype}", key, value), 2, 48, 40)
    for bits in (1, 2, 3, 4, 5, 6, 8):
        key = side(f"uniform{bits}", "channel", 32, "minmax")
        value = side(f"uniform{bits}", "channel", 128, "absmax", span="heads")
        yield case(scheme(f"{bits} bits", key, value), 3, 48, 48)
    widths = [8, 6, 5, 4, 3, 2, 1, 0]
    for axis, block in (("token", 32), ("channel", 64)):
        more = {"widths": widths, "channel_order": order(2, 128, 37)}
        key = side("uniform4", axis, block, "mean_absmax", **more)
        yield case(scheme(f"mixed widths, {axis}", key, NF4_VALUE), 2, 128, 64)
    padded = side("lloyd4", "channel", 32, "minmax", channel_order=order(2, 48, 7))
    yield case(scheme("padded channels, reordered", padded, NF4_VALUE), 2, 40, 20)
    books = ["nf2", "nf3", "nf5", "nf6", "nf8", "lloyd2", "lloyd3", "int2", "int4", "e2m1", LEVELS]
    for book in [*books, "l2absmax3-32", "l2absmax4-64"]:
        key = side(book, "token", 64, "rms" if str(book).startswith("lloyd") else "absmax")
        yield case(scheme(f"codebook {book}", key, {**key, "axis": "channel"}), 1, 32, 32)


def build(
    case: dict[str, Any], seed: int
) -> tuple[plain.Page, plain.Array, plain.Array, plain.Array]:
    heads, kd, vd = case["heads"], case["key_dim"], case["value_dim"]
    page = plain.Page(case["scheme"], heads, kd, vd)
    k = plain.keys_like(case["tokens"], heads, kd, seed)
    v = plain.keys_like(case["tokens"], heads, vd, seed + 1000)
    row = page.empty()
    page.write(row, k, v)
    return page, k, v, row


def vectors() -> tuple[list[dict[str, Any]], bytes]:
    """The content of both files: every case with digests, and a few pages in full."""
    out, pages = [], b""
    for seed, case in enumerate(cases(), start=1):
        page, _, _, row = build(case, seed)
        k, v = page.read(row, case["tokens"])
        entry = {**case, "seed": seed, "row_bytes": row.size, "row": fnv1a(row.tobytes())}
        entry["decoded"] = fnv1a(k.astype("<f4").tobytes() + v.astype("<f4").tobytes())
        if row.size <= 4096 or case["name"] in ("nqkv4 2x64/64", "mixed widths, token"):
            entry["page_at"], pages = len(pages), pages + row.tobytes()
        out.append(entry)
    return out, pages


@pytest.fixture(scope="module")
def made() -> tuple[list[dict[str, Any]], bytes]:
    return vectors()


def test_the_committed_files_are_what_the_plain_implementation_makes(
    made: tuple[list[dict[str, Any]], bytes],
) -> None:
    stored = json.loads((FOLDER / "pages.json").read_text())
    assert [c["name"] for c in stored] == [c["name"] for c in made[0]]
    for got, want in zip(made[0], stored, strict=True):
        assert got == want, want["name"]
    assert (FOLDER / "pages.bin").read_bytes() == made[1]


@pytest.mark.parametrize("seed, case", list(enumerate(cases(), start=1)), ids=lambda x: str(x)[:60])
def test_the_extension_writes_and_reads_the_same_bytes(seed: int, case: dict[str, Any]) -> None:
    core = pytest.importorskip("nqkv_rs._core")
    page, k, v, want = build(case, seed)
    shape = (case["heads"], case["key_dim"], case["value_dim"])
    cache = core.LayerCache(json.dumps(case["scheme"]), *shape, "float32", 1)
    assert cache.page_bytes == page.bytes and cache.value_offset == page.key.bytes
    pool = np.zeros((1, *want.shape), np.uint8)
    cache.add_rows(pool)
    cache.append(k.transpose(1, 0, 2)[None], v.transpose(1, 0, 2)[None])
    assert cache.table(0) == [(0, case["tokens"])]
    wrong = np.argwhere(pool[0] != want)
    assert len(wrong) == 0, f"{len(wrong)} bytes differ, first at head, byte {wrong[0]}"
    got = [np.empty((case["heads"], case["tokens"], d), np.float32) for d in shape[1:]]
    cache.read(0, 0, *got)
    for x, y in zip(got, page.read(want, case["tokens"]), strict=True):
        np.testing.assert_array_equal(x.transpose(1, 0, 2), y)


def test_plain_reads_what_it_wrote() -> None:
    """The second implementation on its own: every element within its block's half step."""
    case = next(c for c in cases() if c["name"] == "nqkv4 3x80/48")
    page, k, v, row = build(copy.deepcopy(case), 1)
    for x, y in zip((k, v), page.read(row), strict=True):
        assert np.abs(x - y).max() < 0.16 * np.abs(x).max()


if __name__ == "__main__":
    entries, blob = vectors()
    lines = ",\n".join(json.dumps(e, separators=(",", ":")) for e in entries)
    (FOLDER / "pages.json").write_text(f"[\n{lines}\n]\n")
    (FOLDER / "pages.bin").write_bytes(blob)
    print(f"{len(entries)} vectors, {len(blob)} bytes of pages")
