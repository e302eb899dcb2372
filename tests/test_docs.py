"""The examples of the docs that need only NumPy run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("page", "start", "end"),
    [
        ("README.md", "**You write kernels or engines**", "**From Rust**"),
        ("docs/quickstart.md", "## You write kernels or engines", "## You write Rust"),
    ],
)
def test_examples(
    page: str, start: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    section = text[text.index(start) : text.index(end)]
    blocks = BLOCK.findall(section)
    assert blocks
    monkeypatch.chdir(tmp_path)
    # Later blocks go on where earlier ones ended.
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
