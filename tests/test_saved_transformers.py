"""A prompt cache saved once continues in another run as if it had never been written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402

from nqkv_rs import NqkvCache  # noqa: E402


def prompt(tokens: int, batch: int = 1) -> Any:
    return torch.randint(2, 97, (batch, tokens), generator=torch.Generator().manual_seed(3))


def continued(model: Any, cache: NqkvCache, ids: Any, steps: int = 20) -> list[int]:
    """Greedy tokens after ``ids``, of which the cache holds all but the last."""
    out = model.generate(ids, past_key_values=cache, max_new_tokens=steps, do_sample=False)
    return out[0].tolist()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "mistral", "opt"])
def test_a_loaded_cache_continues_like_the_saved_one(name: str, tmp_path: Path) -> None:
    model = tiny.model(name)
    ids = prompt(200)
    cache = NqkvCache(model.config, tiny.SHORT)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    path = tmp_path / "prompt.safetensors"
    assert cache.save(path) == path.stat().st_size
    expected = continued(model, cache, ids)
    bytes_before = path.read_bytes()
    for _ in range(2):
        loaded = NqkvCache.load(path, model.config, strict=True)
        assert loaded.get_seq_length() == 199
        assert loaded.scheme == cache.scheme
        assert continued(model, loaded, ids) == expected
        assert loaded.stats()["dequantized"] == 0
    assert path.read_bytes() == bytes_before


def test_a_skipped_layer_and_a_batch_survive(tmp_path: Path) -> None:
    model = tiny.model("llama")
    cache = NqkvCache(model.config, tiny.SHORT, skip_layers=[0])
    with torch.no_grad():
        model(prompt(150, batch=3), past_key_values=cache)
    cache.batch_select_indices(torch.tensor([2, 2, 0]))
    cache.save(tmp_path / "c")
    loaded = NqkvCache.load(tmp_path / "c", model.config)
    assert list(loaded.scheme.skip_layers) == [0]
    for (k, v, _), (k2, v2, _) in zip(cache, loaded, strict=True):
        assert torch.equal(k, k2) and torch.equal(v, v2)
    # The two equal sequences share their pages in the file.
    assert loaded.layers[1].cache.core.rows == 2 * len(loaded.layers[1].cache.core.table(0))


def saved(tmp_path: Path, name: str = "llama") -> Path:
    model = tiny.model(name)
    cache = NqkvCache(model.config, tiny.SHORT)
    with torch.no_grad():
        model(prompt(90), past_key_values=cache)
    cache.save(tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 128}, r"this model \(hidden_size 128\), got .* model \(hidden_size 64\)"),
        ({"num_key_value_heads": 4}, r"num_key_value_heads 4\), got one of another"),
        ({"num_hidden_layers": 3}, r"num_hidden_layers 3"),
        ({"vocab_size": 98}, r"vocab_size 98"),
    ],
)
def test_another_model_is_refused(change: dict[str, int], message: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    config = tiny.CONFIGS["llama"]()
    for key, value in change.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=message):
        NqkvCache.load(path, config)
    with pytest.raises(ValueError, match=r"model_type qwen2\), got .*model_type llama"):
        NqkvCache.load(path, tiny.CONFIGS["qwen2"]())


def test_a_sibling_of_the_same_shape_is_named(tmp_path: Path) -> None:
    model = tiny.model("llama")
    model.config._name_or_path = "maker/first"
    cache = NqkvCache(model.config, tiny.SHORT)
    with torch.no_grad():
        model(prompt(20), past_key_values=cache)
    cache.save(tmp_path / "c")
    model.config._name_or_path = "/elsewhere/first/"
    NqkvCache.load(tmp_path / "c", model.config, strict=True)
    model.config._name_or_path = "maker/second"
    with pytest.warns(UserWarning, match="expected one of second, got one of first"):
        NqkvCache.load(tmp_path / "c", model.config)
    with pytest.raises(ValueError, match=r"strict=True: .*expected one of second"):
        NqkvCache.load(tmp_path / "c", model.config, strict=True)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    config = tiny.CONFIGS["llama"]()
    with pytest.raises(ValueError, match=r"expected a cache that holds tokens, got an empty one"):
        NqkvCache(config).save(tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        NqkvCache.load(tmp_path / "c", config)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path}: saved cache: damaged: layers"):
        NqkvCache.load(path, tiny.CONFIGS["llama"]())
