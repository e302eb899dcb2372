"""Two proofs on a real model, 300 tokens: the packed cache is what plain.py says."""

from __future__ import annotations

import json
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import plain
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache  # noqa: E402
from transformers.cache_utils import DynamicLayer  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

from nqkv_rs import NqkvCache, Scheme  # noqa: E402
from nqkv_rs.integrations.layer import NqkvLayer  # noqa: E402
from nqkv_rs.models import load  # noqa: E402

pytestmark = pytest.mark.model

TOKENS = 300
# A prompt of 200 tokens in uneven chunks; the rest one by one.
CHUNKS = (77, 77, 46, *[1] * 100)


@pytest.fixture(scope="module")
def ids() -> Any:
    tokenizer = load("smollm2").tokenizer
    text = " ".join(topics[name] for name in ("assignment", "for", "class"))
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
    assert tokens.shape == (1, TOKENS)
    return tokens


def logits(model: Any, cache: Any, ids: Any) -> Any:
    """[tokens, vocabulary] of one text, fed in CHUNKS through ``cache``."""
    out, at = [], 0
    with torch.inference_mode():
        for n in CHUNKS:
            step = model(ids[:, at : at + n], past_key_values=cache, use_cache=True)
            out.append(step.logits[0])
            at += n
    return torch.cat(out)


def dense(layer: Any) -> tuple[int, int, int]:
    return layer.kv_heads, layer.cache.key_dim, layer.cache.value_dim


@pytest.mark.parametrize("name, replayed", [("nqkv4", None), ("nqkv", (0, 29))])
def test_recorded_tensors_give_the_same_codes_and_attention(
    name: str, replayed: tuple[int, ...] | None, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k and v of every layer from a real forward, replayed through plain.py.

    Codes are equal bit for bit. Attention of few queries may multiply in 16-bit integers, and
    differs by that.
    """
    calls: dict[int, list[list[Any]]] = {}
    update, attend = NqkvLayer.update, NqkvLayer.attend

    def record_update(self: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        calls.setdefault(id(self), []).append([k.numpy().copy(), v.numpy().copy()])
        return update(self, k, v, *args, **kwargs)

    def record_attend(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        out = attend(self, query, *args, **kwargs)
        calls[id(self)][-1] += [query.numpy().copy(), out.numpy().copy()]
        return out

    monkeypatch.setattr(NqkvLayer, "update", record_update)
    monkeypatch.setattr(NqkvLayer, "attend", record_attend)
    model = load("smollm2").model
    cache = NqkvCache(model.config, name, prefill="quantized", strict=True)
    logits(model, cache, ids)
    scale = model.config.head_dim**-0.5
    scheme = json.loads(Scheme.of(name).to_json())

    worst = 0.0
    for i in replayed or range(len(cache.layers)):
        layer = cache.layers[i]
        want = plain.Cache(scheme, *dense(layer), "float32")
        assert len(calls[id(layer)]) == len(CHUNKS)
        for k, v, q, out in calls[id(layer)]:
            want.append(k, v)
            keys, values = want.read()
            expected, _ = plain.attention(q[0], keys, values, scale)
            error = np.abs(out[0] - expected).max() / max(1.0, np.abs(values).max())
            worst = max(worst, error)
            assert error < 1e-4, f"layer {i}: {error:.2e} after {want.tokens()} tokens"
        rows = np.concatenate([x.numpy() for x in layer.pool])
        table = layer.cache.core.table(0)
        assert [n for _, n in table] == [n for _, n in want.sequences[0].pages]
        assert len(table) == (4 if name == "nqkv4" else 5)
        for (row, count), (page, _) in zip(table, want.sequences[0].pages, strict=True):
            if count == plain.PAGE:
                np.testing.assert_array_equal(rows[row], page, err_msg=f"layer {i}, row {row}")
                continue
            # Bytes of slots not yet written mean nothing; the numbers of the others are compared.
            for x, y in zip(
                want.page.read(rows[row], count), want.page.read(page, count), strict=True
            ):
                np.testing.assert_array_equal(x, y, err_msg=f"layer {i}, row {row}")
    print(f"{name}: worst attention error {worst:.1e}")


class PlainLayer(DynamicLayer):
    """A transformers layer whose keys and values live in plain.Cache."""

    def __init__(self, scheme: dict[str, Any]) -> None:
        super().__init__()
        self.scheme = scheme
        self.plain: plain.Cache | None = None

    def update(self, k: Any, v: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.plain is None:
            shape = (k.shape[1], k.shape[3], v.shape[3])
            self.plain = plain.Cache(self.scheme, *shape, "float64")
            self.lazy_initialization(k, v)
        self.plain.append(k.numpy(), v.numpy())
        keys, values = self.plain.read()
        return torch.from_numpy(keys)[None], torch.from_numpy(values)[None]

    def get_seq_length(self) -> int:
        return 0 if self.plain is None else self.plain.tokens()


def plain_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any
) -> tuple[Any, None]:
    plain_calls.append(key.shape[2])
    out, _lse = plain.attention(query[0].numpy(), key[0].numpy(), value[0].numpy(), scaling)
    return torch.from_numpy(out)[None], None


plain_calls: list[int] = []


@pytest.fixture
def plain_registered() -> None:
    AttentionInterface.register("plain", plain_attention)
    AttentionMaskInterface.register("plain", sdpa_mask)
    plain_calls.clear()


def test_a_float64_model_gives_the_same_logits(ids: Any, plain_registered: None) -> None:
    """The model in float64; only cache and attention are replaced by plain.py's."""
    model = load("smollm2", dtype="float64").model
    packed = NqkvCache(model.config, "nqkv4", prefill="quantized", strict=True)
    got = logits(model, packed, ids)
    stats = packed.stats()
    assert stats["dequantized"] == 0 and stats["packed_decode"] == 100 * len(packed.layers)
    assert stats["packed_positions"] > 0.3 * stats["attended_positions"]

    # The exact cache differs visibly: what follows is not the comparison of two dense runs.
    with torch.inference_mode():
        exact = model(ids).logits[0]
    assert (got - exact).abs().max() > 1e-3

    model.set_attn_implementation("plain")
    scheme = json.loads(Scheme.of("nqkv4").to_json())
    cache = DynamicCache()
    cache.layers = [PlainLayer(scheme) for _ in range(model.config.num_hidden_layers)]
    want = logits(model, cache, ids)
    assert len(plain_calls) == len(CHUNKS) * len(cache.layers)
    assert all(layer.plain.packed() == 256 for layer in cache.layers)
    # Attention differs by 1e-15 or so. RMSNorm computes in fp32 even here, which may round that
    # away: a difference of exactly 0 is no sign that the same code ran twice.
    error = (got - want).abs().max().item()
    print(f"float64 logits differ by at most {error:.1e}")
    assert error < 1e-6
