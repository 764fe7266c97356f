"""What the verbs print: one JSON object with --json, else text; progress on a terminal only."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def emit(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print the result for a machine or for a person."""
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else text)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an aligned text table; every column but the first is right-aligned."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for number, row in enumerate(cells):
        first, *rest = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join([first, *rest]).rstrip())
        if number == 0:
            lines.append("  ".join("─" * width for width in widths))
    return "\n".join(lines)


class Progress:
    """Where a long verb reports its stages; shows nothing unless stderr is a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )

    @property
    def staged(self) -> bool:
        """Whether a stage has begun that is shown."""
        return self._task is not None

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of `total` steps."""
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total)

    def advance(self) -> None:
        """Finish one step of the present stage."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
