"""What a site's privacy ledger says after kill -9, at every step and at random moments.

A site trains private rounds (logistic regression, records drawn here from a seed) and releases
its updates into a folder, as in a federation. It is killed once before and once after every
step of a round (reserve, witness, train, commit, settle, release), then at random moments, and
started again every time, on the same ledger, in a new run. The killed process has written down,
synced, every training that began, and every update that was released. After every kill:

    updates_without_row     released updates that the ledger has no settled event for
    epsilon_undercounted    kills after which ε by the ledger is below ε of the trainings that began
    unusable                kills after which the ledger refused to go on, though nothing was lost
    kills                   how many processes were killed

--quick: 20 random kills instead of 200.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

import numpy as np
import torch

from anabranch.client.chain import Reserve
from anabranch.client.ledger import Ledger
from anabranch.client.privacy import epsilon_of
from anabranch.client.site import Site
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.tables import (
    Column,
    Contract,
    Federation,
    Model,
    Privacy,
    Task,
    Training,
)
from anabranch.storage.chain import Settle
from benchmarks.harness import Figure, header, options, report
from benchmarks.ledger.worker import RUN_ROUNDS, STAGES, released, started, work

SEED = 0
RANDOM_KILLS, QUICK_KILLS = 200, 20
DELTA = 1e-5  # at which ε is compared
LONGEST_S = 0.5  # between start and kill: several rounds
WAIT_S = 60.0  # for a process that kills itself
RECORDS = 400
POINTS = [
    (stage, when)
    for stage in ("reserve", "witness", "train", "commit", "settle", "release")
    for when in ("before", "after")
]
CONFIG = RunConfig(
    name="kills",
    task=Task(kind="tabular-classification", labels=("no", "yes")),
    data=Contract(
        columns={
            "a": Column(type="number"),
            "b": Column(type="number"),
            "y": Column(type="label"),
        }
    ),
    model=Model(base="logistic"),
    training=Training(
        optimizer="sgd", learning_rate=0.1, momentum=0.0, batch_size=40, local_steps=2
    ),
    federation=Federation(rounds=RUN_ROUNDS),
    privacy=Privacy(epsilon=50.0),
)


@dataclass
class Found:
    """What was seen after the kills."""

    kills: int = 0
    updates_without_row: int = 0
    epsilon_undercounted: int = 0
    unusable: int = 0
    updates: int = 0
    trainings: int = 0
    epsilon: float = 0.0
    exact: float = 0.0


def main() -> None:
    chosen = options(__doc__)
    torch.set_num_threads(1)
    count = QUICK_KILLS if chosen.quick else RANDOM_KILLS
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_site(Path(temporary) / "site")
        found, stages = kill_all(folder, count, np.random.default_rng(SEED))
    head = header("ledger", packages=("opacus", "torch"), threads=1, seed=SEED, quick=chosen.quick)
    hits = ", ".join(f"{name} {stages[name]}" for name in STAGES if stages[name])
    figures = [
        Figure(
            figure="kills",
            value=found.kills,
            unit="kills",
            target=f">= {count}",
            note=f"{len(POINTS)} at fixed points, the others during: {hits}",
        ),
        Figure(
            figure="updates_without_row",
            value=found.updates_without_row,
            unit="updates",
            target="<= 0",
            note=f"of {found.updates} released",
        ),
        Figure(
            figure="epsilon_undercounted",
            value=found.epsilon_undercounted,
            unit="kills",
            target="<= 0",
            note=f"at the end ε = {found.epsilon:.3f} by the ledger, {found.exact:.3f} of the "
            f"{found.trainings} trainings that began, δ = {DELTA:g}",
        ),
        Figure(figure="unusable", value=found.unusable, unit="kills", target="<= 0"),
    ]
    report(head, figures, chosen.json)


def make_site(folder: Path) -> Path:
    """Write a site's folder with records drawn from SEED; its witness stays in the folder."""
    rng = np.random.default_rng(SEED)
    (folder / "outbox").mkdir(parents=True)
    values = rng.normal(size=(RECORDS, 2))
    labels = values.sum(1) + rng.normal(size=RECORDS) > 0
    rows = [
        f"{a:.6f},{b:.6f},{'yes' if y else 'no'}" for (a, b), y in zip(values, labels, strict=True)
    ]
    (folder / "records.csv").write_text("\n".join(["a,b,y", *rows, ""]))
    (folder / "site.toml").write_text(
        'name = "north"\ndata = "records.csv"\nledger_witness = "folder"\n'
    )
    return folder


def kill_all(folder: Path, count: int, rng: np.random.Generator) -> tuple[Found, Counter[str]]:
    """Kill once at every fixed point and `count` times at random; return what was seen."""
    adapter = read_adapter(load_classifier(CONFIG))
    found, stages = Found(), Counter[str]()
    for stage, when in POINTS:
        one_kill(folder, f"{stage}-{when}", adapter, die=(stage, when))
        check(folder, found)
    for number in range(count):
        delay = rng.uniform(0, LONGEST_S)
        stages[one_kill(folder, f"random-{number}", adapter, delay=delay)] += 1
        check(folder, found)
    return found, stages


def one_kill(
    folder: Path,
    run: str,
    adapter: Adapter,
    *,
    die: tuple[str, str] | None = None,
    delay: float = WAIT_S,
) -> str:
    """Start the site in a child process, kill it, and return the stage in which it died."""
    shared = mmap.mmap(-1, 1)
    child = os.fork()
    if child == 0:
        try:
            work(folder, run, CONFIG, adapter, lambda s: mark(shared, s), die=die)
        except BaseException:
            traceback.print_exc()
            raise
        finally:  # it ended by itself, which it must not: the parent sees the exit code
            os._exit(3)
    deadline = time.monotonic() + delay
    ended, status = 0, 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or (die is not None and not ended):
        raise SystemExit(f"{run}: the site was not killed but ended by itself: {status}")
    return STAGES[shared[0]]


def mark(shared: mmap.mmap, stage: str) -> None:
    shared[0] = STAGES.index(stage)


def check(folder: Path, found: Found) -> None:
    """Compare the ledger with what the killed process left behind."""
    found.kills += 1
    begun, updates = started(folder), released(folder)
    found.updates, found.trainings = len(updates), len(begun)
    found.exact = epsilon_of((spend for _, _, spend in begun), DELTA)
    ledger: Ledger = Site(folder).ledger
    try:
        found.epsilon = ledger.epsilon(DELTA)
        events = ledger.events()
    except PrivacyError as error:
        found.unusable += 1
        print(error)
        return
    reserved = {e.id: e.body for e in events if isinstance(e.body, Reserve)}
    settled = [reserved[e.body.reserve] for e in events if isinstance(e.body, Settle)]
    rows = {(event.run, event.round) for event in settled}
    found.updates_without_row = sum(update not in rows for update in updates)
    found.epsilon_undercounted += found.epsilon < found.exact


if __name__ == "__main__":
    main()
