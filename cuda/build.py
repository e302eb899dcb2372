"""Compile ``cuda/*.cu`` to the PTX in ``cuda/ptx/``; ``--check`` proves that it is the sources'.

The compiler comes from the package index (``requirements.txt``) into a folder of its own, on first
use. A source says what it needs in its first lines::

    // target: compute_80          the architecture of the PTX (newer devices run it, too)
    // isa: 8.0                    the lowest PTX version that has its instructions
    // expect: sm_90 HMMA >= 8     what the machine code of an architecture must hold (any number)
    // devices: sm_90              the architectures that run it, if not all from the target on

PTX is relabelled to that version, because a driver refuses text that is newer than itself, whatever
the instructions are. ``--check`` compiles again and compares byte for byte; assembles with the
``ptxas`` of CUDA 12.0 for sm_80 to sm_90 and of 12.8 for sm_100 and sm_120, where a spilled
register or a local array is an error; and counts instructions in the machine code. It needs no GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import difflib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Old assemblers prove that old drivers take the PTX; they hold no compiler.
ASSEMBLERS = {
    "nvidia-cuda-nvcc-cu12==12.0.140": ("sm_80", "sm_86", "sm_89", "sm_90"),
    "nvidia-cuda-nvcc-cu12==12.8.93": ("sm_100", "sm_120"),
}
STRICT = ["-Werror", "--warn-on-spills", "--warn-on-local-memory-usage"]
HEADER = re.compile(r"^// (target|isa|expect|devices): *(.+)$", re.MULTILINE)


def tools() -> Path:
    """Where compilers are installed."""
    return Path(os.environ.get("NQKV_CUDA_TOOLS", HERE.parent / ".cuda"))


def install(name: str, *what: str) -> Path:
    """Packages from the index in a folder of their own; what is there is kept."""
    folder = tools() / name
    stamp = folder / ".installed"
    wanted = "\n".join(what) + "\n" + (HERE / "requirements.txt").read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {' '.join(what)} into {folder}", flush=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--upgrade", "--target", str(folder), *what], check=True)
        stamp.write_text(wanted)
    return folder


def compiler() -> Path:
    """The folder with nvcc, ptxas and cuobjdump."""
    return install("nvcc", "-r", str(HERE / "requirements.txt")) / "nvidia" / "cu13" / "bin"


def run(*command: str | Path) -> str:
    """A command's output; its messages and the end of the program if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def words(source: Path) -> dict[str, list[str]]:
    """What a source says of itself."""
    found: dict[str, list[str]] = {"target": [], "isa": [], "expect": [], "devices": []}
    for key, value in HEADER.findall(source.read_text()):
        found[key].append(value.strip())
    if len(found["target"]) != 1 or len(found["isa"]) != 1:
        raise SystemExit(f"{source.name}: expected one '// target:' and one '// isa:' line")
    return found


def compile_ptx(source: Path) -> str:
    """PTX of a source, relabelled, without the compiler's own comments."""
    said = words(source)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.ptx"
        run(
            compiler() / "nvcc", "-ptx", "-O3", "-std=c++17", f"-arch={said['target'][0]}",
            "-fmad=false", "-Werror=all-warnings", source, "-o", out,
        )  # fmt: skip
        text = out.read_text()
    text = re.sub(r"^\.version .*$", f".version {said['isa'][0]}", text, flags=re.MULTILINE)
    if "_INTERNAL_" in text:
        # Such names hold a hash of the path, so that no other checkout would give the same bytes.
        raise SystemExit(
            f"{source.name}: expected names without internal linkage (no `namespace {{`)"
        )
    # A hint of newer compilers that old assemblers refuse.
    text = re.sub(r'^\s*\.pragma "used_bytes_mask .*\n', "", text, flags=re.MULTILINE)
    return re.sub(
        r"\A(//.*\n|\n)+", f"// Compiled from cuda/{source.name} by cuda/build.py.\n", text
    )


def target(source: Path) -> Path:
    """Where a source's PTX is committed."""
    return HERE / "ptx" / f"{source.stem}.ptx"


def assemble(ptx: Path, wheel: str, arch: str) -> str:
    """What the assembler of a wheel says of each kernel."""
    home = install(wheel.replace("==", "-"), wheel)
    ptxas = home / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        return run(ptxas, "-v", *STRICT, f"-arch={arch}", ptx, "-o", Path(folder) / "x.cubin")


def assemblers(source: Path) -> list[tuple[str, str]]:
    """Wheels and architectures that take a source's PTX."""
    said = words(source)
    least = int(said["target"][0].removeprefix("compute_"))
    pairs = [(wheel, arch) for wheel, archs in ASSEMBLERS.items() for arch in archs]
    if said["devices"]:
        return [(wheel, arch) for wheel, arch in pairs if arch in said["devices"]]
    return [(wheel, arch) for wheel, arch in pairs if int(arch.removeprefix("sm_")) >= least]


def check_sass(source: Path, expectations: list[str]) -> list[str]:
    """Instructions that the machine code must hold."""
    wrong = []
    for line in expectations:
        match = re.fullmatch(r"(sm_\w+) ([\w.]+) (>=|==|<=) (\d+)", line)
        if not match:
            raise SystemExit(f"{source.name}: expected 'sm_90 HMMA >= 8', got {line!r}")
        arch, instruction, relation, number = match.groups()
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "x.cubin"
            run(compiler() / "ptxas", f"-arch={arch}", target(source), "-o", cubin)
            sass = run(compiler() / "cuobjdump", "-sass", cubin)
        count = len(re.findall(rf"\b{re.escape(instruction)}\b", sass))
        holds = {">=": count >= int(number), "==": count == int(number), "<=": count <= int(number)}
        if not holds[relation]:
            wrong.append(f"{source.name}: expected {line}, counted {count}")
    return wrong


def check(source: Path, verbose: bool) -> list[str]:
    """What is wrong with the committed PTX of a source."""
    committed = target(source).read_text() if target(source).exists() else ""
    fresh = compile_ptx(source)
    if fresh != committed:
        diff = difflib.unified_diff(
            committed.splitlines(), fresh.splitlines(), "committed", "rebuilt", "", "", 2
        )
        return [f"{target(source).name} is not what {source.name} compiles to", *list(diff)[:40]]
    for wheel, arch in assemblers(source):
        said = assemble(target(source), wheel, arch)
        if verbose:
            print(f"{source.name} {arch}\n{said}")
    return check_sass(source, words(source)["expect"])


def main() -> int:
    """Build, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="compare, assemble, count; change nothing"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="registers and memory of each kernel"
    )
    parser.add_argument("source", nargs="*", type=Path, help="default: all")
    options = parser.parse_args()
    sources = [HERE / s.name for s in options.source] or sorted(HERE.glob("*.cu"))
    # Installs first: the jobs below share the folders.
    compiler()
    for wheel in ASSEMBLERS:
        install(wheel.replace("==", "-"), wheel)
    wrong: list[str] = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        if options.check:
            known = {target(s).name for s in sorted(HERE.glob("*.cu"))}
            wrong += [
                f"{p.name} has no source"
                for p in sorted((HERE / "ptx").glob("*.ptx"))
                if p.name not in known
            ]
            for said in pool.map(lambda s: check(s, options.verbose), sources):
                wrong += said
        else:
            for source, text in zip(sources, pool.map(compile_ptx, sources), strict=True):
                target(source).parent.mkdir(exist_ok=True)
                target(source).write_text(text)
                print(f"{target(source).relative_to(HERE.parent)}: {len(text)} bytes")
                if options.verbose:
                    for wheel, arch in assemblers(source):
                        print(f"{arch}\n{assemble(target(source), wheel, arch)}")
    print(
        "\n".join(wrong)
        or f"{len(sources)} files {'are' if options.check else 'were'} compiled from their sources"
    )
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
