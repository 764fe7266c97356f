"""What a round costs beside training: assignments down, deltas up, checks, books, the merge.

    overhead of a round = time between two merges − the longest training of its sites

Four sites over loopback, on the machine that also merges: with fewer cores than processes their
work is done in turn, and all of it but one site's training counts as overhead. The peer is the
same run under stock Flower: a SuperLink and four SuperNodes, which start a process a message.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.network.federation import at, carried_out
from benchmarks.network.tasks import wide
from tests.faults.rig import Rig
from tests.runs import write_site
from tests.simulations.superlink import superlink

SIZES = {"1mb": 1_000_000, "15mb": 15_000_000}
RUN_S = 900.0


def overheads(events: Iterable[Mapping[str, Any]]) -> list[float]:
    """Return the seconds of each round after the first that were not its longest training."""
    found: list[float] = []
    before: float | None = None
    longest = 0.0
    for event in events:
        if event["kind"] == "site_trained":
            longest = max(longest, event["seconds"])
        elif event["kind"] == "round_aggregated":
            if before is not None:
                found.append(at(event) - before - longest)
            before, longest = at(event), 0.0
    return found


def ours(rig: Rig, size: str, rounds: int) -> list[float]:
    """Return the overheads of a run with deltas of this size."""
    return overheads(rig.events(carried_out(rig, wide(SIZES[size], rounds), RUN_S)))


def flowers(folder: Path, records: Mapping[str, Path], size: str, rounds: int) -> list[float]:
    """Return the overheads of the same run under a stock SuperLink with stock SuperNodes."""
    folder.mkdir(parents=True)
    toml, output = folder / "run.toml", folder / "runs" / "first"
    toml.write_text(wide(SIZES[size], rounds))
    sites = {name: write_site(folder / name, name, file) for name, file in records.items()}
    with superlink(folder, sites) as link:
        shown = link.run(f"run='{toml}' output='{output}' connect-seconds=120.0", timeout_s=RUN_S)
    if not (output / "summary.json").exists():
        raise SystemExit(f"the run under stock Flower did not end: {shown}")
    lines = (output / "events.jsonl").read_text().splitlines()
    return overheads(json.loads(line) for line in lines)
