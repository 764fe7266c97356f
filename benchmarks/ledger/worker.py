"""A site that trains one private round after another, until somebody kills it.

It runs in a child process and leaves behind what an outsider can check afterwards:

    <folder>/started     one line per training that began: run, round, σ, q, steps; on disk first
    <folder>/outbox/     the updates that were released: <run>-<round>.frame

`stage` is a byte of shared memory that says what the child was doing when it died.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anabranch.client import local
from anabranch.client.answers import Answers
from anabranch.client.ledger import Ledger
from anabranch.client.privacy import DpPlan, Spend
from anabranch.client.site import Site
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.messages import Assignment
from anabranch.storage.files import write_atomic
from anabranch.storage.witness import Witnesses

STAGES = ("start", "reserve", "witness", "train", "commit", "settle", "release", "between")
RUN_ROUNDS = 1000

Stage = Callable[[str], None]


def work(
    folder: Path,
    run: str,
    config: RunConfig,
    adapter: Adapter,
    stage: Stage,
    *,
    die: tuple[str, str] | None = None,
) -> None:
    """Train and release rounds 1, 2, …; with `die` = (stage, "before" | "after") no further.

    Never returns: the process is killed, by itself or by its parent. It changes functions of
    the product to see where it is, so it belongs in a process of its own.
    """
    _watch(Ledger, "reserve", "reserve", stage, die)
    _watch(Ledger, "confirm", "settle", stage, die)
    _watch(Witnesses, "write", "witness", stage, die)
    _watch(Answers, "commit", "commit", stage, die)
    _watch(local, "fit_private", "train", stage, die, first=_note(folder, run))
    release = _watched(_release, "release", stage, die)
    site = Site(folder)
    for number in range(1, RUN_ROUNDS + 1):
        _, frame = site.train(Assignment(run=run, round=number, config=config), adapter)
        release(folder / "outbox" / f"{run}-{number}.frame", frame)
        stage("between")


def started(folder: Path) -> list[tuple[str, int, Spend]]:
    """Return (run, round, spend) of every training that began."""
    file = folder / "started"
    lines = file.read_text().splitlines() if file.exists() else []
    found = []
    for line in lines:
        run, number, sigma, q, steps = line.split()
        spend = Spend(noise_multiplier=float(sigma), sample_rate=float(q), steps=int(steps))
        found.append((run, int(number), spend))
    return found


def released(folder: Path) -> list[tuple[str, int]]:
    """Return (run, round) of every update that left."""
    names = (path.stem.rpartition("-") for path in (folder / "outbox").glob("*.frame"))
    return sorted((run, int(number)) for run, _, number in names)


def _release(path: Path, frame: bytes) -> None:
    write_atomic(path, frame)


def _note(folder: Path, run: str) -> Callable[..., None]:
    """Return a function that puts on disk, in one line, that a training begins."""

    def note(
        classifier: object, examples: object, plan: DpPlan, config: object, **options: Any
    ) -> None:
        steps, offset = options["steps"], options["step_offset"]
        number = offset // steps + 1
        line = f"{run} {number} {plan.noise_multiplier!r} {plan.sample_rate!r} {steps}\n"
        handle = os.open(folder / "started", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line.encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    return note


def _watch(
    owner: Any,
    name: str,
    label: str,
    stage: Stage,
    die: tuple[str, str] | None,
    first: Callable[..., None] | None = None,
) -> None:
    setattr(owner, name, _watched(getattr(owner, name), label, stage, die, first))


def _watched(
    function: Callable[..., Any],
    label: str,
    stage: Stage,
    die: tuple[str, str] | None,
    first: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Return `function` that says when it runs, and dies before or after it if asked to."""

    def inner(*arguments: Any, **options: Any) -> Any:
        stage(label)
        if die == (label, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        if first is not None:
            first(*arguments, **options)
        result = function(*arguments, **options)
        if die == (label, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return inner
