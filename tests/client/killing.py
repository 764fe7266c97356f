"""A process that dies at its n-th write, as far as the disk can tell; and a run to kill it in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anabranch.client.models import Models
from anabranch.client.privacy import epsilon_of
from anabranch.client.site import Site
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.messages import Assignment, Trained
from anabranch.protocols.part import Part
from anabranch.storage import book
from tests.runs import table_run, write_site, write_table

WRITES = ("replace", "rename", "unlink", "fsync", "mkdir", "rmdir", "link", "chmod")
DELTA = 1 / 400  # of 40 records
MODELS = Models()  # frozen weights are the same in every process
STAYS = ("feedback", "personal", "clipping", "runs")  # what a site keeps of its rounds
FEEDBACK = """
[uplink]
codec = "int8"
error_feedback = true
"""
BESIDE = """
[personal]
rank = 2
"""
PRIVATELY = """
[privacy]
epsilon = 8.0
clipping = "adaptive"
"""
LOCAL_STEPS = ("local_epochs = 2", "local_steps = 4")
RUNS = {  # between them, a site keeps all that it can keep
    "kept": (("fedsa", Part(factors="A", dense=False)), FEEDBACK),
    "beside": (("ffa", Part(factors="B")), FEEDBACK + BESIDE),
    "private": (("ffa", Part(factors="B")), FEEDBACK + BESIDE + PRIVATELY),
    "private-kept": (("fedsa", Part(factors="A", dense=False)), FEEDBACK + PRIVATELY),
}


class Killed(BaseException):
    """The process is gone: nothing catches it, and nothing is written after it."""


@dataclass
class Life:
    """How many writes a process has made, and with which it dies; None: it lives."""

    at: int | None = None
    writes: int = 0
    dead: bool = False
    die: Callable[[], None] | None = None  # None: raise Killed

    def write(self) -> None:
        """Make one write, or die before it."""
        if self.dead:
            raise Killed
        self.writes += 1
        if self.writes == self.at:
            self.dead = True
            if self.die is not None:
                self.die()
            raise Killed

    def watch(self, activity: str, step: int, steps: int) -> None:
        """Count a step of training as a write: it is a moment to die at."""
        self.write()


@contextmanager
def living(life: Life) -> Iterator[None]:
    """Let this process make its writes as `life` has it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            patch.setattr(os, name, _counted(getattr(os, name), life))
        patch.setattr(book, "committed", _counted(book.committed, life))
        yield


def _counted(real: Callable[..., Any], life: Life) -> Callable[..., Any]:
    def write(*arguments: Any, **options: Any) -> Any:
        life.write()
        return real(*arguments, **options)

    return write


def new_site(folder: Path) -> Path:
    """Make a site of 40 records whose ledger has its one witness in its folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = write_table(folder.with_suffix(".csv"))
    site = write_site(folder, "north", data)
    file = site / "site.toml"
    file.write_text(file.read_text() + 'ledger_witness = "folder"\n')
    return site


@dataclass(frozen=True)
class Question:
    """What a coordinator asks."""

    assignment: Assignment
    adapter: Adapter


class Questions:
    """The questions of a run of RUNS; round k has as many as its adapter has variants."""

    def __init__(self, name: str) -> None:
        (method, self.part), extra = RUNS[name]
        rounds = ("rounds = 2", f'rounds = 6\nmethod = "{method}"')
        self.config = table_run(rounds, LOCAL_STEPS, extra=extra)
        self._first = read_adapter(load_classifier(self.config))

    def __call__(self, number: int, variant: int = 0) -> Question:
        """Return the question of a round."""
        rng = np.random.default_rng([number, variant])
        arrays = {
            name: array + rng.normal(0, 0.1, array.shape).astype(np.float32)
            for name, array in self._first.arrays.items()
        }
        assignment = Assignment(run="r1", round=number, config=self.config, part=self.part)
        return Question(assignment, Adapter(self._first.spec, arrays))


def ask(
    folder: Path, question: Question, life: Life | None = None, models: Models | None = None
) -> tuple[Trained, bytes]:
    """Ask a site that was just started; every step of training is kept."""
    life = life or Life()
    with living(life):
        site = Site(folder, models or Models(), watch=life.watch, save_every=0)
        return site.train(question.assignment, question.adapter)


def killed(folder: Path, question: Question, at: int) -> bool:
    """Ask a site that dies at its write number `at`; return whether it came so far."""
    try:
        ask(folder, question, Life(at=at), MODELS)
    except Killed:
        return True
    return False


def spent(folder: Path) -> tuple[int, int, float]:
    """Return how often a site has reserved, how many of these are open, and ε of all."""
    state = Site(folder, MODELS).ledger.state()
    if state is None:
        return 0, 0, 0.0
    return len(state.reserved), len(state.open), epsilon_of(state.spends(), DELTA)


def kept(folder: Path) -> dict[str, bytes]:
    """Return every file that a site keeps of its rounds, and none that it does not."""
    files = (path for name in STAYS for path in (folder / name).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def leftovers(folder: Path) -> list[str]:
    """Return what is half-written or half-done in a site's folder, but for locks."""
    hidden = (path for path in folder.rglob(".*") if not path.name.endswith(".lock"))
    begun = (path for suffix in ("begun", "steps") for path in folder.rglob(f"*.{suffix}"))
    staged = folder.glob("answers/*/change.*")
    return sorted(path.relative_to(folder).as_posix() for path in (*hidden, *begun, *staged))
