"""`anabranch simulate compare`: from run folders to a page, files and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anabranch.protocols.errors import ConfigError
from anabranch.simulations.experiments.compare_page import write_page
from anabranch.simulations.experiments.comparing import (
    Compared,
    Group,
    Mean,
    final,
    gather,
    mean_of,
)
from anabranch.simulations.experiments.rounds import time_to_accuracy


def compare(
    paths: Sequence[Path], *, output: Path | None = None, targets: Sequence[float] = ()
) -> tuple[Compared, dict[str, Any]]:
    """Compare finished runs; return them, and the numbers of the tables.

    With `output`, FILE.html, the page is written, and FILE.csv and FILE.parquet beside it with
    every metric of every round. Raises ConfigError as comparing.gather does, and for an `output`
    of another name.
    """
    if output is not None and (output.suffix != ".html" or output.is_dir()):
        raise ConfigError(
            f"{output}: expected a file that ends in .html; the page is written to it"
        )
    compared = gather(paths, targets)
    files = [] if output is None else write_page(output, compared)
    return compared, {
        "groups": [_numbers(group, compared.targets) for group in compared.groups],
        "measured_on": compared.source,
        "time": compared.time,
        "missing": list(compared.missing),
        "files": [str(path) for path in files],
    }


def _numbers(group: Group, targets: Sequence[float]) -> dict[str, Any]:
    ends = [final(run) for run in group.runs]
    reached = [time_to_accuracy(run.rounds, targets) for run in group.runs]
    return {
        "name": group.name,
        "changes": group.runs[0].about.changes,
        "runs": [str(run.folder) for run in group.runs],
        "seeds": [run.about.seed for run in group.runs],
        "final": {name: _as_dict(mean_of([end[name] for end in ends])) for name in ends[0]},
        "time_to_accuracy": [
            {
                "accuracy": target,
                "reached": sum(one["round"] is not None for one in found),
                **{
                    name: _as_dict(mean_of([one[name] for one in found]))
                    for name in ("round", "seconds", "bytes")
                },
            }
            for target, found in zip(targets, zip(*reached, strict=True), strict=True)
        ],
    }


def _as_dict(value: Mean | None) -> dict[str, float | int | None] | None:
    if value is None:
        return None
    return {"mean": value.mean, "std": value.std, "count": value.count}
