"""`make bench`: run every benchmark in full and write its table into docs/benchmarks/.

Nothing between the markers of those pages is typed by hand. A figure that fell short stays
in the table with its value.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ROOT, write_between_markers


def names() -> list[str]:
    """Return the benchmarks: the folders here that hold a run.py."""
    return sorted(path.parent.name for path in (ROOT / "benchmarks").glob("*/run.py"))


def table(content: Mapping[str, Any]) -> str:
    """Return header and figures as Markdown."""
    head = content["header"]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    lines = [
        "| figure | value | target | reached | spread | peer | note |",
        "|---|---|---|---|---|---|---|",
        *(_row(figure) for figure in content["figures"]),
        "",
        f"{head['machine']}, {head['cores']} cores, {head['threads']} threads, seed "
        f"{head['seed']}, commit {head['commit'] or 'unknown'}; {versions}.",
    ]
    return "\n".join(lines)


def _row(figure: Mapping[str, Any]) -> str:
    target = figure["target"] or ""
    spread = figure["spread"]
    cells = [
        f"`{figure['figure']}`",
        f"{figure['value']:.4g} {figure['unit']}",
        target,
        _reached(figure["value"], target),
        f"{spread[0]:.4g} … {spread[1]:.4g}" if spread else "",
        figure["peer"] or "",
        figure["note"],
    ]
    return "| " + " | ".join(cells) + " |"


def _reached(value: float, target: str) -> str:
    if not target:
        return ""
    sign, _, limit = target.partition(" ")
    reached = value <= float(limit) if sign == "<=" else value >= float(limit)
    return "yes" if reached else "**no**"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmarks named on the command line, or all of them."""
    for name in (list(argv) if argv else sys.argv[1:]) or names():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "figures.json"
            script = ROOT / "benchmarks" / name / "run.py"
            subprocess.run([sys.executable, str(script), "--json", str(file)], check=True)
            content = json.loads(file.read_text())
        write_between_markers(
            ROOT / "docs" / "benchmarks" / f"{name}.md", "figures", table(content)
        )


if __name__ == "__main__":
    main()
