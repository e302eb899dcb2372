"""``nqkv-rs demo``: a real model generates with a dense and with a packed cache, side by side.

Three measurements, each where it means something:

* **Text.** The answer to ``--prompt``, greedy, streamed: once with a dense cache, once per scheme.
* **Memory and speed** at ``--context`` tokens of a long text (``context_tokens``), because after a
  short prompt most of a packed cache is still its exact tail. Bytes are those allocated for the
  cache right after the prefill of exactly so many tokens, and are compared with 16 bits per number
  whatever the model's dtype. Where a model has layers that are not full attention, ``total`` holds
  their bytes too, so it exceeds the sum of the four parts. Tokens per second are those of greedy
  decoding from there on, without the prefill; dense and packed caches take turns token by token.
* **Quality** by the protocol of :mod:`nqkv_rs.evaluation`, beside a plain e4m3 cache.

With ``--json``, standard output gets one object per scheme and nothing else. Keys:
``model, scheme, context_tokens, text_dense, text_packed, cache_bytes {codes, scales, tail, sinks,
total}, dense_bytes, ratio, effective_bits, tokens_per_second {dense, packed}, scored_tokens,
text_sha256, packed_read_share, kl_mean, kl_mean_fp8, top1_agreement``. With ``--skip-quality`` the
last four are null and ``scored_tokens`` is 0. ``text_sha256`` is that of the whole long text.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from . import models
from ._extras import require
from .integrations.naming import cache_keyword

if TYPE_CHECKING:
    from rich.console import Console

    from .evaluation import Result

__all__ = ["add_arguments", "run"]

_WINDOW = 2048
_SKIP = 512
# Decoding steps that are timed: some seconds on a small machine.
_TIMED = 32
_BYTES = ("codes", "scales", "tail", "sinks", "total")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "--model",
        default=models.DEFAULT,
        help=f"{', '.join(models.BUILT_IN)}, a hub id, a folder or a GGUF file "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--scheme",
        action="append",
        metavar="NAME",
        help="a preset; may be given several times (default: nqkv4 and nqkv)",
    )
    parser.add_argument("--prompt", default="What is gravity?", help="default: %(default)s")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=128, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--dtype", help="of the model (default: float32 on the CPU, bfloat16 on other devices)"
    )
    parser.add_argument(
        "--context",
        type=_positive,
        default=2048,
        metavar="N",
        help="tokens at which memory and speed are measured (default: %(default)s)",
    )
    parser.add_argument(
        "--scored",
        type=_positive,
        default=3000,
        metavar="N",
        help="tokens that are scored at least (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-quality", action="store_true", help="leave out KL divergence and top-1 agreement"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per scheme")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value


def run(options: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    require("torch", "demo")
    require("transformers", "demo")
    require("rich", "demo")
    from rich.console import Console

    import nqkv_rs

    # Before the minutes that follow, not after.
    schemes = list(dict.fromkeys(options.scheme or ["nqkv4", "nqkv"]))
    known = nqkv_rs.presets()
    for name in schemes:
        if name not in known:
            raise ValueError(f"--scheme: expected one of {', '.join(known)}, got {name!r}")

    console = Console(stderr=options.json, highlight=False)

    def say(line: str) -> None:
        # Not markup: paths may hold [brackets].
        console.print(line, style="dim", markup=False)

    # On CUDA float32 asks for fp32 arithmetic, which no attention kernel takes, nor anybody runs.
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    loaded = models.load(options.model, device=options.device, dtype=dtype, say=say)
    bench = _Bench(loaded, options, console)
    rows = bench.measure(schemes)
    if options.json:
        for row in rows:
            print(json.dumps(row), flush=True)
    else:
        _show(rows, console)
    return 0


class _Bench:
    """One loaded model, measured with a dense and with packed caches."""

    def __init__(self, loaded: models.Loaded, options: argparse.Namespace, console: Console):
        self.loaded, self.options, self.console = loaded, options, console
        self.model = loaded.model

    def measure(self, schemes: list[str]) -> list[dict[str, Any]]:
        """One dictionary per scheme, with the keys of ``--json``."""
        from . import evaluation

        text = evaluation.long_text()
        prompt = self._prompt()
        self.console.print(f"\n{self.options.prompt}", style="bold", markup=False)
        dense_text = self._generate("dense", prompt, self._dense)
        texts = {name: self._generate(name, prompt, self._packed(name)) for name in schemes}

        context = evaluation.windows(
            self.loaded.tokenizer, text, window=self.options.context, count=1
        )
        self.console.print(f"\n[dim]Memory and speed at {context.shape[1]} tokens[/dim]")
        speeds, usages = self._at_context(schemes, context)
        quality: dict[str, Result] = {}
        if not self.options.skip_quality:
            quality = self._quality(schemes, text)
        rows = []
        for name in schemes:
            usage, result = usages[name], quality.get(name)
            rows.append(
                {
                    "model": self.loaded.name,
                    "scheme": name,
                    "context_tokens": context.shape[1],
                    "text_dense": dense_text,
                    "text_packed": texts[name],
                    "cache_bytes": {part: int(usage[part]) for part in _BYTES},
                    "dense_bytes": int(usage["dense"]),
                    "ratio": float(usage["ratio"]),
                    "effective_bits": float(usage["effective_bits"]),
                    "tokens_per_second": {"dense": speeds["dense"], "packed": speeds[name]},
                    "scored_tokens": result.scored_tokens if result else 0,
                    "text_sha256": evaluation.text_sha256(text),
                    "packed_read_share": result.packed_read_share if result else None,
                    "kl_mean": result.kl_mean if result else None,
                    "kl_mean_fp8": quality["fp8"].kl_mean if result else None,
                    "top1_agreement": result.top1_agreement if result else None,
                }
            )
        return rows

    def _dense(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _packed(
        self, scheme: str, prefill: Literal["exact", "quantized"] = "exact"
    ) -> Callable[[], Any]:
        import nqkv_rs

        def make() -> Any:
            return nqkv_rs.NqkvCache(
                self.model.config, scheme=nqkv_rs.Scheme.preset(scheme), prefill=prefill
            )

        return make

    def _prompt(self) -> dict[str, Any]:
        tokenizer, text = self.loaded.tokenizer, self.options.prompt
        if getattr(tokenizer, "chat_template", None):
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        else:
            inputs = tokenizer(text, return_tensors="pt")
        return {
            name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")
        }

    def _generate(self, name: str, prompt: dict[str, Any], make: Callable[[], Any]) -> str:
        """Answer the prompt greedily, streaming to the console; returns the answer."""
        from transformers import TextStreamer

        console = self.console
        shown: list[str] = []

        class ToConsole(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                shown.append(text)
                # Not markup: a model may well write [brackets].
                console.print(text, end="\n" if stream_end else "", markup=False)

        console.print(f"\n[cyan]{name}[/cyan]", markup=True)
        started = time.perf_counter()
        out = self.model.generate(
            **prompt,
            **{cache_keyword(): make()},
            max_new_tokens=self.options.max_new_tokens,
            do_sample=False,
            # Nothing is padded; given only so that transformers does not warn about its absence.
            pad_token_id=0,
            streamer=ToConsole(self.loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        seconds = time.perf_counter() - started
        new = out[0, prompt["input_ids"].shape[1] :]
        console.print(f"[dim]{len(new)} tokens, {len(new) / seconds:.1f} per second[/dim]")
        return str(self.loaded.tokenizer.decode(new, skip_special_tokens=True))

    def _at_context(
        self, schemes: list[str], context: Any
    ) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
        """Prefill the long text; decoded tokens per second of all, memory of the packed ones."""
        import torch

        caches = {"dense": self._dense(), **{name: self._packed(name)() for name in schemes}}
        spent = dict.fromkeys(caches, 0.0)
        last: dict[str, Any] = {}
        with torch.inference_mode(), self.console.status("prefill") as status:
            for name, cache in caches.items():
                status.update(f"{name}: prefill")
                # In pieces, so that a long context needs no quadratic mask.
                for piece in context.to(self.model.device).split(512, dim=1):
                    last[name] = self._step(piece, cache)
            usages = {name: caches[name].memory_usage() for name in schemes}
            # In turns: whatever else the machine does meanwhile hits all of them alike. The first
            # step is not timed; it may allocate or plan.
            for step in range(_TIMED + 1):
                status.update(f"decoding {step} of {_TIMED}")
                for name, cache in caches.items():
                    self._wait()
                    started = time.perf_counter()
                    last[name] = self._step(last[name], cache)
                    self._wait()
                    spent[name] += (time.perf_counter() - started) if step else 0.0
        speeds = {name: _TIMED / seconds for name, seconds in spent.items()}
        for name, speed in speeds.items():
            self.console.print(f"[dim]{name}: {speed:.1f} tokens per second[/dim]")
        return speeds, usages

    def _step(self, tokens: Any, cache: Any) -> Any:
        """Feed tokens; returns the one that the model prefers next."""
        out = self.model(tokens, use_cache=True, logits_to_keep=1, **{cache_keyword(): cache})
        return out.logits[:, -1:].argmax(-1)

    def _wait(self) -> None:
        import torch

        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def _quality(self, schemes: list[str], text: str) -> dict[str, Result]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        from . import evaluation

        count = math.ceil(self.options.scored / (_WINDOW - _SKIP))
        ids = evaluation.windows(self.loaded.tokenizer, text, window=_WINDOW, count=count)
        make: dict[str, Callable[[], Any]] = {
            "fp8": lambda: evaluation.Fp8Cache(config=self.model.config)
        }
        make |= {name: self._packed(name, "quantized") for name in schemes}
        self.console.print(f"\n[dim]Quality over {count} windows of {_WINDOW} tokens[/dim]")
        columns = (BarColumn(), MofNCompleteColumn(), "tokens", TimeRemainingColumn())
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("quality", total=count * _WINDOW)
            return evaluation.divergences(
                self.model,
                make,
                ids,
                window=_WINDOW,
                skip=_SKIP,
                scored=self.options.scored,
                progress=lambda done, total: bar.update(task, completed=done),
            )


def _show(rows: list[dict[str, Any]], console: Console) -> None:
    from rich.table import Table

    first = rows[0]
    table = Table(title=f"{first['model']}, {first['context_tokens']} tokens of context")
    table.add_column("")
    for name in ("dense", *(row["scheme"] for row in rows)):
        table.add_column(name, justify="right")

    def line(what: str, dense: str, cell: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(what, dense, *(cell(row) for row in rows))

    line("cache bytes", f"{first['dense_bytes']:,}", lambda r: f"{r['cache_bytes']['total']:,}")
    for part in _BYTES[:-1]:
        line(f"  {part}", "", lambda r, part=part: f"{r['cache_bytes'][part]:,}")  # type: ignore[misc]
    if any(_unpacked(row) for row in rows):
        line("  layers not packed", "", lambda r: f"{_unpacked(r):,}")
    line("ratio to 16 bits", "1.00", lambda r: f"{r['ratio']:.2f}")
    line("effective bits", "16.00", lambda r: f"{r['effective_bits']:.2f}")
    speed = "tokens_per_second"
    line("tokens per second", f"{first[speed]['dense']:.1f}", lambda r: f"{r[speed]['packed']:.1f}")
    if first["scored_tokens"]:
        line("KL divergence, nats", "0", lambda r: f"{r['kl_mean']:.4f}")
        line("  of a plain fp8 cache", "", lambda r: f"{r['kl_mean_fp8']:.4f}")
        line("top-1 agreement", "100 %", lambda r: f"{r['top1_agreement']:.1%}")
        line("read from pages", "", lambda r: _percent(r["packed_read_share"]))
        table.caption = f"quality over {first['scored_tokens']} tokens"
    console.print()
    console.print(table)


def _unpacked(row: dict[str, Any]) -> int:
    """Bytes of the layers that stay the library's own, for example those with a sliding window."""
    used = row["cache_bytes"]
    return int(used["total"] - sum(used[part] for part in _BYTES[:-1]))


def _percent(share: float | None) -> str:
    return "not counted" if share is None else f"{share:.1%}"
