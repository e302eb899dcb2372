"""Run the transformers tests on releases across the supported window, one venv each.

    python tests/compat.py [--write docs/compat.md] [RELEASE ...]

Run it with the Python of a venv that has nqkv-rs[test]. The venvs stand in `compat/` in that venv;
each has a transformers of its own with what that pins (hub, tokenizers), and everything else, torch
above all, from the venv that made it. Nothing is downloaded twice.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import venv
import xml.etree.ElementTree as ElementTree
from pathlib import Path

RELEASES = ("5.5.0", "5.16.1", "5.24.0")
"""The oldest one supported, the one that renamed half of the cache's methods, the newest one."""

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "test_transformers.py",
    "test_transformers_models.py",
    "test_cache_operations_transformers.py",
    "test_generate.py",
    "test_saved_transformers.py",
    "test_demo.py",
)
TABLE = "<!-- written by tests/compat.py -->\n"
"""Stands before and after what is replaced in the page."""
HEAD = """
| transformers | huggingface_hub | tokenizers | passed | failed | skipped |
|---|---|---|---|---|---|
"""


def made(release: str) -> Path:
    """The Python of the venv with this release; made on first use."""
    home = Path(sys.prefix) / "compat" / release
    python = home / "bin" / "python"
    stamp = home / ".made"
    if not stamp.exists():
        print(f"== venv for transformers {release}", flush=True)
        venv.create(home, clear=True, with_pip=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        # Before the shared packages come into sight: pip must not count on them, nor touch them.
        subprocess.run([*pip, f"transformers=={release}"], check=True)
        here = sysconfig.get_path("purelib")
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = home / "lib" / version / "site-packages"
        # `addsitedir` appends, so that this venv's own packages win; and it reads .pth files.
        (packages / "shared.pth").write_text(f"import site; site.addsitedir({here!r})\n")
        stamp.touch()
    return python


def tested(python: Path) -> dict[str, int]:
    """Run the tests; counts by outcome."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [str(ROOT / "tests" / name) for name in TESTS]
        options = ["-q", "-m", "not model", "-p", "no:cacheprovider", f"--junitxml={report}"]
        # The models are tiny: more threads would only wait for each other.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            [python, "-m", "pytest", *options, *files], cwd=ROOT, env=environment, check=False
        )
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return {"passed": passed, "failed": failed, "skipped": counts["skipped"]}


def versions(python: Path, *packages: str) -> list[str]:
    """Versions of packages as that Python sees them."""
    code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    done = subprocess.run(
        [python, "-c", code, *packages], check=True, capture_output=True, text=True
    )
    return done.stdout.split()


def main() -> int:
    """Test all releases; 1 if anything failed."""
    parser = argparse.ArgumentParser(description="Run the transformers tests on several releases.")
    parser.add_argument("releases", nargs="*", default=RELEASES, metavar="RELEASE")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    given = parser.parse_args()
    rows, bad = [], 0
    for release in given.releases:
        python = made(release)
        print(f"== transformers {release}", flush=True)
        found, *pinned = versions(python, "transformers", "huggingface_hub", "tokenizers")
        assert found == release, f"expected transformers {release}, got {found}"
        counts = tested(python)
        bad += counts["failed"] + (counts["passed"] == 0)
        rows.append(f"| {' | '.join([release, *pinned, *map(str, counts.values())])} |")
    print("\n".join(rows))
    if given.write is not None:
        (torch,) = versions(Path(sys.executable), "torch")
        last = f"torch {torch.split('+')[0]}, Python {platform.python_version()}"
        before, _, after = given.write.read_text().split(TABLE)
        table = HEAD + "\n".join(rows) + f"\n\nLast run: {last}.\n\n"
        given.write.write_text(TABLE.join((before, table, after)))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
