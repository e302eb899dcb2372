"""Rows of a bench as they come: JSON, or a table with a progress bar where rich is installed."""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import Any

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table

    RICH = True
except ImportError:
    RICH = False


class Output:
    """Where rows go.

    Args:
        title: of the table.
        as_json: one object per row on standard output.
        total: groups of rows, for the progress bar on standard error.
    """

    def __init__(self, title: str, as_json: bool, total: int) -> None:
        self.title, self.as_json, self.total, self.done = title, as_json, total, 0
        self.rows: list[dict[str, Any]] = []
        self.bar: Any = None

    def __enter__(self) -> Output:
        if RICH:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            # A screen that is none would get every state of the bar as a line.
            console = Console(stderr=True)
            self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
        if not self.as_json and not RICH:
            print(self.title)
        return self

    def begin(self, name: str) -> None:
        """The next group of rows.

        Args:
            name: of the group.
        """
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=name)
        elif sys.stderr.isatty():
            print(f"[{self.done + 1}/{self.total}] {name}", file=sys.stderr, flush=True)
        self.done += 1

    def row(self, row: dict[str, Any]) -> None:
        """A row.

        Args:
            row: its cells by name.
        """
        if self.as_json:
            print(json.dumps(row), flush=True)
        elif RICH:
            self.rows.append(row)
        else:
            print("  ".join(f"{cell}" for cell in self._cells(row)), flush=True)

    @staticmethod
    def _cells(row: dict[str, Any]) -> list[str]:
        error = "" if row["rel_error"] is None else f"{row['rel_error']:.1e}"
        return [
            f"{row['shape']:24}",
            f"{row['scheme']:18}",
            f"{row['bits']:6.3f}",
            f"{row['us']:8.1f}",
            f"{row['tb_per_s']:5.2f}",
            f"{row['percent_of_stream']:5.1f}",
            f"{row['peer']} {row['peer_us']:.1f}",
            f"{row['ratio']:.2f}",
            error,
        ]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
            self.bar.stop()
        if not self.rows:
            return
        table = Table(title=self.title)
        heads = ("shape", "scheme", "bits", "us", "TB/s", "% of stream", "peer, us", "x", "error")
        for i, head in enumerate(heads):
            table.add_column(head, justify="left" if i in (0, 1, 6) else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(cell.strip() for cell in self._cells(row)))
        # Piped into a file, a table is as wide as it needs to be.
        out = Console()
        (out if out.is_terminal else Console(width=160)).print(table)
