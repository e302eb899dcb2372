"""It is really packed: the codes decide what the model says, and the memory is really saved."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402

from nqkv_rs import LayerCache, NqkvCache  # noqa: E402


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 4.6), ("float32", 4.75)])
def test_effective_bits_at_8k_tokens(dtype: str, bits: float) -> None:
    """SmolLM2's shape, every allocated byte counted."""
    layer = LayerCache("nqkv4", kv_heads=3, key_dim=64, exact_dtype=dtype)
    x = torch.randn(1, 3, 8192, 64)
    layer.append(x, x)
    assert 4.375 < 8 * layer.memory()["total"] / (2 * x.numel()) <= bits


@pytest.mark.parametrize("scheme", ["nqkv4", "nqkv"])
@pytest.mark.parametrize("half", ["keys", "values"])
def test_zeroing_codes_in_place_changes_the_logits(scheme: str, half: str) -> None:
    model = tiny.model("llama", dtype=torch.float32)
    ids = torch.randint(0, 97, (1, 221), generator=torch.Generator().manual_seed(1))

    def last(spoil: bool) -> Any:
        cache = NqkvCache(model.config, scheme, strict=True)
        with torch.inference_mode():
            model(ids[:, :220], past_key_values=cache)
            for layer in cache.layers:
                core = layer.cache.core
                assert len(core.table(0)) >= 2
                for rows in layer.pool if spoil else []:
                    assert rows.dtype == torch.uint8 and rows.shape[2] == core.page_bytes
                    # 64 tokens, 16 channels, 4 bits: a slab is 512 bytes, and codes come first.
                    first = 0 if half == "keys" else core.value_offset
                    rows[:, :, first : first + 512].zero_()
            out = model(ids[:, 220:], past_key_values=cache).logits[0, -1]
        assert cache.stats()["dequantized"] == 0
        return out

    assert torch.equal(last(False), last(False))
    assert (last(True) - last(False)).abs().max() > 1e-4


# In a process of its own, so that nothing else grows or shrinks meanwhile. One layer of 8 KV heads
# of 256 channels: dense fp32 keys and values of 8192 tokens are 128 MiB, the packed ones 18.
DECODE = textwrap.dedent(
    """
    import ctypes, json, resource, sys
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import LlamaConfig
    from nqkv_rs import NqkvCache

    torch.manual_seed(5)
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=256,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=8192,
        eos_token_id=None,
    )).eval()
    ids = torch.randint(0, 97, (1, 8192))

    def resident():
        # Not the cache's: what allocators hold but nobody uses, libraries' code as it first runs.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/status") as file:
            return 1024 * int(next(x for x in file if x.startswith("RssAnon")).split()[1])

    def feed(cache, ids, sizes):
        at = 0
        for n in sizes:
            model(ids[:, at : at + n], past_key_values=cache, logits_to_keep=1)
            at += n

    with torch.inference_mode():
        # Everything that is allocated once: threads, what allocators keep of the masks.
        warm = NqkvCache(model.config, strict=True)
        feed(warm, ids, [128] * 63 + [1] * 8)
        del warm
        before = resident()
        cache = NqkvCache(model.config, strict=True)
        feed(cache, ids, [64] * 126 + [1] * 128)
        after = resident()
    assert cache.get_seq_length() == 8192
    stats = cache.stats()
    assert stats["dequantized"] == 0 and stats["packed_decode"] == 128
    print(json.dumps({"growth": after - before, **cache.memory_usage()}))
    """
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_grows_by_the_caches_own_total() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DECODE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    print(got)
    assert got["dense"] == 2 * 8192 * 8 * 512
    # 1 MiB besides: the interpreter's own heap. Nor less: the cache before gave its memory back.
    assert 0.8 * got["total"] <= got["growth"] <= got["total"] * 1.10 + 2**20
    # The bound means something: a dense cache, or one dense copy, would not fit.
    assert got["total"] < 0.32 * got["dense"]
