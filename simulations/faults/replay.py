"""A run that failed says how to see it fail again: the seed, the plan, and the command.

The plan is written into the run folder as faults.toml before anybody is asked, drawn faults and
all. `anabranch simulate EXPERIMENT --faults RUN/faults.toml` replays it: the same faults strike
the same messages, whatever rates the experiment names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anabranch.protocols.errors import AnabranchError
from anabranch.simulations.faults.plan import FaultPlan, write_plan

FILE = "faults.toml"


def replay_hint(plan: FaultPlan, seed: int, path: Path, error: Exception | None = None) -> str:
    """Return the sentence that says how to replay a run of `seed` with the plan in `path`.

    With `error`, its own text comes first.
    """
    counts = ", ".join(f"{count} {kind}" for kind, count in plan.counts().items())
    says = (
        f"this run had seed {seed} and the faults of seed {plan.seed}: {counts or 'none'}. To "
        f"replay it: anabranch simulate EXPERIMENT --faults {path} --seed {seed}"
    )
    return says if error is None else f"{error}\n{says}"


@contextmanager
def replayable(plan: FaultPlan, seed: int, folder: Path) -> Iterator[Path]:
    """Write the plan into a run's folder, and yield its path; a failure inside says how to replay.

    The error that leaves is of the class that came, with the hint after its text.
    """
    path = folder / FILE
    write_plan(path, plan)
    try:
        yield path
    except AnabranchError as error:
        raise type(error)(replay_hint(plan, seed, path, error)) from error
