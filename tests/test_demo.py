"""The evaluation protocol on a tiny random model, and the demo on the real one."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny  # noqa: E402

from nqkv_rs import models  # noqa: E402
from nqkv_rs.evaluation import (  # noqa: E402
    Fp8Cache,
    divergence,
    divergences,
    long_text,
    text_sha256,
    windows,
)

KEYS = {
    "model",
    "scheme",
    "context_tokens",
    "text_dense",
    "text_packed",
    "cache_bytes",
    "dense_bytes",
    "ratio",
    "effective_bits",
    "tokens_per_second",
    "scored_tokens",
    "text_sha256",
    "packed_read_share",
    "kl_mean",
    "kl_mean_fp8",
    "top1_agreement",
}
PROTOCOL = {"window": 96, "chunk": 16, "skip": 24, "scored": 100}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def ids() -> Any:
    return torch.randint(0, 97, (2, 96), generator=torch.Generator().manual_seed(1))


def test_a_dense_cache_costs_nothing(model: Any, ids: Any) -> None:
    got = divergence(model, transformers.DynamicCache, ids, **PROTOCOL)
    assert (got.kl_mean, got.kl_stderr, got.top1_agreement) == (0.0, 0.0, 1.0)
    # Whole windows are taken: 100 positions need two of 72.
    assert got.scored_tokens == 144
    assert got.packed_read_share is None


def test_fp8_costs_something_and_schemes_do_not_disturb_each_other(model: Any, ids: Any) -> None:
    alone = divergence(model, Fp8Cache, ids, **PROTOCOL)
    both = divergences(
        model, {"fp8": Fp8Cache, "dense": transformers.DynamicCache}, ids, **PROTOCOL
    )
    assert 0.0 < alone.kl_mean < 1.0
    assert 0.0 < alone.kl_stderr < alone.kl_mean
    assert 0.0 < alone.top1_agreement <= 1.0
    assert both["fp8"] == alone
    assert both["dense"].kl_mean == 0.0


def test_kl_is_the_definition(model: Any, ids: Any) -> None:
    row = ids[:1]
    got = divergence(model, Fp8Cache, row, window=96, chunk=16, skip=24, scored=72)
    cache, parts = Fp8Cache(), []
    with torch.inference_mode():
        dense = model(row).logits[0, 24:].double().softmax(-1)
        for start in range(0, 96, 8):
            parts.append(model(row[:, start : start + 8], past_key_values=cache).logits[0])
    packed = torch.cat(parts)[24:].double().softmax(-1)
    expected = (dense * (dense / packed).log()).sum(-1).mean()
    # Another chunk size and a dense pass in one go: fp32 noise only.
    assert got.kl_mean == pytest.approx(float(expected), rel=0.05)


def test_progress_reaches_the_end_and_chunks_respect_the_border(model: Any, ids: Any) -> None:
    seen: list[tuple[int, int]] = []
    divergence(
        model,
        transformers.DynamicCache,
        ids.flatten(),
        **PROTOCOL,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (192, 192)
    assert (24, 192) in seen
    steps = [b[0] - a[0] for a, b in zip([(0, 0), *seen], seen, strict=False)]
    assert max(steps) == 16


def test_reads_are_counted_over_the_scored_part_only(model: Any, ids: Any) -> None:
    class Counting(transformers.DynamicCache):  # type: ignore[misc]
        """Pretends that before position 24 nothing, and after it half, was read from pages."""

        def stats(self) -> dict[str, int]:
            n = self.get_seq_length()
            return {"attended_positions": 10 * n, "packed_positions": 5 * max(n - 24, 0)}

    got = divergence(model, Counting, ids, **PROTOCOL)
    assert got.packed_read_share == 0.5


def test_nan_is_never_perfect(model: Any, ids: Any) -> None:
    class Broken(transformers.DynamicCache):  # type: ignore[misc]
        def update(self, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            return super().update(k, v * float("nan"), *args, **kwargs)

    assert math.isnan(divergence(model, Broken, ids, **PROTOCOL).kl_mean)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"skip": 96}, "skip < window"),
        ({"chunk": 0}, "chunk > 0"),
        ({"scored": 1000}, "at least 14 windows"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(
    model: Any, ids: Any, changed: dict[str, int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        divergence(model, transformers.DynamicCache, ids, **{**PROTOCOL, **changed})


def test_e4m3_saturates_and_rounds() -> None:
    cache = Fp8Cache()
    x = torch.tensor([1e4, -1e4, 1.06, 0.0]).view(1, 1, 1, 4)
    keys, values = cache.update(x, x, 0)
    assert keys.flatten().tolist() == values.flatten().tolist() == [448.0, -448.0, 1.0, 0.0]


def test_the_long_text_is_long_and_the_same_every_time() -> None:
    text = long_text()
    assert len(text) > 300_000
    assert text_sha256(text) == text_sha256(long_text())
    assert len(text_sha256(text)) == 64


@pytest.mark.parametrize("special", [True, False])
def test_windows_begin_as_the_tokenizer_begins_a_text(special: bool) -> None:
    class Letters:
        bos_token_id = 7

        def __call__(
            self, text: str, add_special_tokens: bool = True, verbose: bool = True
        ) -> dict[str, list[int]]:
            head = [7] if special and add_special_tokens else []
            return {"input_ids": head + [ord(c) for c in text]}

    got = windows(Letters(), "abcdefgh", window=4, count=2).tolist()
    letters = [[7, 97, 98, 99], [7, 100, 101, 102]] if special else [[*b"abcd"], [*b"efgh"]]
    assert got == letters
    with pytest.raises(ValueError, match="too short"):
        windows(Letters(), "ab", window=4, count=1)


def test_a_name_that_is_no_model_is_refused_by_name(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        models.load("./nowhere", say=lambda line: None)
    with pytest.raises(FileNotFoundError, match="got 0 GGUF files"):
        models.load(str(tmp_path), say=lambda line: None)
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="expected a GGUF file"):
        models.load(str(tmp_path / "x.gguf"), say=lambda line: None)
    with pytest.raises(ValueError, match="dtype"):
        models.load(dtype="int4", say=lambda line: None)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with a tokenizer of a few words, as a user's folder."""
    backend = pytest.importorskip("tokenizers")
    words = backend.Tokenizer(backend.models.WordLevel({"the": 0, "?": 1, "of": 2}, unk_token="?"))
    words.pre_tokenizer = backend.pre_tokenizers.Whitespace()
    path = str(tmp_path_factory.mktemp("tiny"))
    model.save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


def test_a_model_is_fetched_where_standard_error_is_no_file(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What stands in for Python takes any arguments.
    monkeypatch.setattr(models.sys, "executable", shutil.which("true"))
    models._download("any", tmp_path)
    monkeypatch.setattr(models.sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="could not fetch any"):
        models._download("any", tmp_path)
    assert capsys.readouterr().out == ""


def test_a_folder_is_loaded_as_it_is(folder: str) -> None:
    lines: list[str] = []
    loaded = models.load(folder, dtype="float64", say=lines.append)
    assert loaded.model.dtype == torch.float64
    assert not loaded.model.training
    assert len(lines) == 1
    assert loaded.tokenizer("the")["input_ids"] == [0]


def check_shape(o: dict[str, Any]) -> None:
    """Exactly the keys that users were promised, and bytes that add up."""
    assert set(o) == KEYS
    parts = ("codes", "scales", "tail", "sinks")
    assert set(o["cache_bytes"]) == {*parts, "total"}
    assert o["cache_bytes"]["total"] == sum(o["cache_bytes"][part] for part in parts)
    assert set(o["tokens_per_second"]) == {"dense", "packed"}
    assert o["ratio"] == pytest.approx(o["dense_bytes"] / o["cache_bytes"]["total"])
    assert o["effective_bits"] == pytest.approx(16 / o["ratio"])
    assert o["text_sha256"] == text_sha256(long_text())


def run_demo(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    from nqkv_rs.cli import main

    status = main(["demo", "--json", *arguments])
    out, err = capsys.readouterr()
    assert status == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_demo_on_a_tiny_model(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    arguments = ["--model", folder, "--context", "256", "--max-new-tokens", "8"]
    quick = run_demo(capsys, *arguments, "--skip-quality", "--scheme", "nqkv", "--scheme", "nqkv")
    assert [o["scheme"] for o in quick] == ["nqkv"]
    check_shape(quick[0])
    # bf16 bytes of the same tokens: K and V, 2 layers, 2 heads of 16, whatever the model's dtype.
    assert (quick[0]["context_tokens"], quick[0]["dense_bytes"]) == (256, 2 * 2 * 2 * 16 * 256 * 2)
    assert quick[0]["kl_mean"] is None and quick[0]["scored_tokens"] == 0

    (full,) = run_demo(capsys, *arguments, "--scored", "1500", "--scheme", "nqkv4")
    check_shape(full)
    assert full["scored_tokens"] == 1536
    assert full["kl_mean"] > 0 and full["kl_mean_fp8"] > 0
    assert 0.85 < full["packed_read_share"] < 1


@pytest.mark.model
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="needs the package gguf")
def test_demo_on_the_real_model(capsys: pytest.CaptureFixture[str]) -> None:
    objects = run_demo(capsys, "--max-new-tokens", "64")
    assert [o["scheme"] for o in objects] == ["nqkv4", "nqkv"]
    for o in objects:
        check_shape(o)
        assert o["context_tokens"] == 2048
        assert o["scored_tokens"] >= 3000
        assert "gravity" in o["text_packed"].lower()
    nqkv4, nqkv = objects
    assert nqkv4["kl_mean"] <= 0.010
    assert nqkv4["kl_mean"] < nqkv4["kl_mean_fp8"]
    assert nqkv["kl_mean"] >= 10 * nqkv4["kl_mean"]
    assert nqkv4["top1_agreement"] > 0.9
    assert nqkv4["packed_read_share"] > 0.85
    assert nqkv["packed_read_share"] > 0.95
