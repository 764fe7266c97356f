"""A site's last answers: asked again, it gives the same bytes, and nothing is done twice.

    answers/<key>.begun        Attempt: the question was taken up
    answers/<key>.<fit>.steps  where its training stands (tuning/checkpoint.py)
    answers/<key>/             its answer:
        result.json            Result: what the round came to. The folder appears in one rename,
                               and with it the round is done
        frame                  what is sent
        change.0, change.1, …  files of the site that change with the round, until they are moved
        report.json            Trained: written last; only now may report and frame leave

Every write is a step from one of these states to the next, so that a process can be killed
between any two of them:

    nothing ─► begun ─► reserved ─► (steps) ─► folder ─► settled ─► files moved ─► report
               └──────────── not done: trained again ┘   └── done: completed, not trained ──┘

Whatever a round changes on disk (memory of error feedback, tensors that stay, private adapter,
clipping norm, the ledger's settle) follows from the folder, in this order, by steps that may be
repeated: an event is settled if it is not settled, a file is moved if it is not moved. `alone`
completes what a crash left behind before anything else is asked. So a round begins from the files
as they were before it, however often it is begun, and one that is done is never trained again.

Privacy. The reservation of a private round is made once for a question. Asked again after a crash,
the question gets the reserve that it has: the attempt names the event behind which it was made, and
Ledger.reserve takes one that is still open, of the same rows, run, round and spend. That costs
nothing more, because

  1. an update leaves only with its report, the report is written after the settle, and a reserve
     that is settled is never taken again: at most one result of it is ever released;
  2. the result that is released is one chain of noisy steps, as many as were reserved
     (tuning/private.py). What was trained before it and lost has been read by nobody;
  3. training that fails drops the attempt: that it failed is sent, and may depend on what was
     trained. Asked again, the round reserves anew, as it does for every other question of the same
     run and round: another adapter, configuration, or set of rows. A run's budget may then refuse
     it. To stop a round by the watch is no failure: that looks at no record.

Fails closed: an answer that cannot be read is not made again, as its round is done; without an
attempt nothing is taken up; a result whose reserve the ledger does not know (it was restored from a
backup) is thrown away. Limits: the last MOST answers are kept, in MOST_BYTES; a question that is
older, or that another version of the software writes in other words, is a new one. flock keeps two
processes of one site apart: where the system has none (Windows), no more than one may run.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from anabranch.client.ledger import Ledger
from anabranch.client.question import (
    FOLDER,
    Attempt,
    Outcome,
    Result,
    contents,
    damaged,
    read,
    settled,
    writing,
)
from anabranch.protocols.errors import PrivacyError, RunError
from anabranch.protocols.messages import Assignment, Trained
from anabranch.storage.files import PARTIAL, locked, staged, sweep, sync_folder, write_atomic

MOST = 8  # answers, the newest
MOST_BYTES = 256 << 20  # of their frames; the newest answer is kept whatever its size
MOST_BEGUN = 4  # questions that were taken up and not answered
OTHERS = (  # folders with whole files
    "feedback", "personal", "clipping", "runs", "secure/given", "secure/masked", "secure/kept",
)  # fmt: skip

log = logging.getLogger(__name__)


class Lost(PrivacyError):
    """The ledger does not have a result's reserve any more: the result is thrown away."""


class Answers:
    """The answers of the site in `site`.

    Every method but `pending`, and `held` of an answer that has been given, is for inside `alone`.
    """

    def __init__(self, site: Path, *, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._site = site
        self._folder = site / FOLDER
        self._most, self._most_bytes = most, most_bytes

    @contextmanager
    def alone(self, ledger: Ledger) -> Iterator[None]:
        """Keep other processes and threads out, and complete what a crash left behind.

        Waits for its turn. Raises PrivacyError if the ledger cannot be used, RunError if a file
        cannot be read.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self._folder / "site"):
            with writing():
                self._sweep()
            for key in self._pending():
                try:
                    self.complete(key, ledger)
                except Lost as error:
                    log.warning("%s", error)
            yield

    @property
    def pending(self) -> bool:
        """Return whether a round is done whose files may not all be in their places."""
        return bool(self._pending())

    def held(self, key: str) -> tuple[Trained, bytes] | None:
        """Return the answer to a question, byte for byte as it was; None if there is none.

        Raises RunError if it is there and damaged: its round is done and cannot be done again.
        """
        file = self._folder / key / "report.json"
        if not file.exists():
            return None
        report, result = read(file, Trained), self._result(key)
        frame = contents(self._folder / key / "frame")
        if hashlib.sha256(frame).hexdigest() != result.frame:
            raise damaged(self._folder / key / "frame", "not what was written")
        return report, frame

    def begin(self, key: str, assignment: Assignment, ledger: Ledger) -> Attempt:
        """Return the attempt of a question, written down before anything is reserved for it.

        Any other question of the same run and round is given up: what it reserved stays spent.
        """
        before = self._attempts()
        if key in before:
            return before[key]
        state = ledger.state() if assignment.config.privacy is not None else None
        attempt = Attempt(
            number=self._next(),
            run=assignment.run,
            round=assignment.round,
            after=0 if state is None else state.count,
        )
        others = sorted(before.items(), key=lambda item: -item[1].number)
        with writing():
            for place, (other, one) in enumerate(others, 1):
                if place >= MOST_BEGUN or (one.run, one.round) == (attempt.run, attempt.round):
                    self.forget(other)
            write_atomic(self._attempt(key), msgspec.json.encode(attempt), 0o600)
        return attempt

    def steps(self, key: str, fit: str) -> Path:
        """Return where the state of one of a question's fits is kept."""
        return self._folder / f"{key}.{fit}.steps"

    def forget(self, key: str) -> None:
        """Drop the attempt of a question: asked again it begins anew, and reserves anew."""
        self._attempt(key).unlink(missing_ok=True)  # first: without it no reserve is used again
        for path in self._folder.glob(f"{key}.*.steps"):
            path.unlink(missing_ok=True)

    def commit(self, key: str, outcome: Outcome) -> None:
        """Write down what a round came to. When this returns it is done, whatever happens.

        Raises RunError if it is done already, or cannot be written.
        """
        if (self._folder / key / "result.json").exists():
            raise RunError("the round was answered by another process: ask again")
        attempt = read(self._attempt(key), Attempt)
        result = Result(
            number=self._next(),
            run=attempt.run,
            round=attempt.round,
            report=outcome.report,
            frame=hashlib.sha256(outcome.frame).hexdigest(),
            changes=tuple(outcome.changes),
            cost=outcome.cost,
        )
        with writing(), staged(self._folder / key) as folder:
            (folder / "result.json").write_bytes(msgspec.json.encode(result))
            (folder / "frame").write_bytes(outcome.frame)
            for i, data in enumerate(outcome.changes.values()):
                (folder / f"change.{i}").write_bytes(data)

    def complete(self, key: str, ledger: Ledger) -> tuple[Trained, bytes]:
        """Settle, move and report a round that is done; return its answer.

        Raises PrivacyError if it cannot be settled, RunError if a file cannot be written: nothing
        leaves, and the next call tries again. Lost: see there.
        """
        folder, result = self._folder / key, self._result(key)
        report = settled(result, ledger)
        with writing():
            if report is None:
                self._remove(folder)
                self.forget(key)
                raise Lost(
                    f"round {result.round} of {result.run} was trained, but the ledger does not "
                    "have its reserve any more: the result is thrown away. Asked again, the site "
                    "reserves and trains anew"
                )
            for i, name in enumerate(result.changes):
                self._move(folder / f"change.{i}", self._site / name)
            write_atomic(folder / "report.json", msgspec.json.encode(report), 0o600)
            self.forget(key)
            self._evict()
        answer = self.held(key)
        assert answer is not None  # its report was just written
        return answer

    def _move(self, change: Path, target: Path) -> None:
        if change.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            change.replace(target)
            sync_folder(target.parent)

    def _evict(self) -> None:
        """Drop the oldest answers beyond the limits."""
        numbers, size = self._numbers(), 0
        for place, key in enumerate(sorted(numbers, key=lambda key: -numbers[key])):
            size += sum(path.stat().st_size for path in (self._folder / key).iterdir())
            if place and (place >= self._most or size > self._most_bytes):
                self._remove(self._folder / key)

    def _remove(self, folder: Path) -> None:
        """Remove a folder; after a crash all of it is there, or nothing that has its name."""
        aside = Path(tempfile.mkdtemp(prefix=".gone.", suffix=PARTIAL, dir=self._folder))
        folder.rename(aside / "gone")
        shutil.rmtree(aside)

    def _sweep(self) -> None:
        """Remove what a crash left half-written where nobody else writes."""
        for name in (FOLDER, *OTHERS):
            sweep(self._site / name)
        for key in self._pending():
            sweep(self._folder / key)
        begun = self._attempts()
        for key in begun:
            if (self._folder / key / "report.json").exists():
                self.forget(key)
        for path in self._folder.glob("*.steps"):
            if path.name.partition(".")[0] not in begun:
                path.unlink()
        for made in self._site.glob(".ledger.*"):  # a ledger or a witness that was being made
            if made.is_dir():
                shutil.rmtree(made)
            else:
                made.unlink()

    def _keys(self) -> list[str]:
        return [path.parent.name for path in self._folder.glob("[!.]*/result.json")]

    def _pending(self) -> list[str]:
        return [k for k in self._keys() if not (self._folder / k / "report.json").exists()]

    def _attempts(self) -> dict[str, Attempt]:
        """Return every attempt; one that cannot be read is none, and reserves anew."""
        found = {}
        for path in self._folder.glob("*.begun"):
            try:
                found[path.name.removesuffix(".begun")] = read(path, Attempt)
            except RunError as error:
                log.warning("%s", error)
        return found

    def _next(self) -> int:
        begun = [one.number for one in self._attempts().values()]
        return 1 + max([*begun, *self._numbers().values()], default=0)

    def _numbers(self) -> dict[str, int]:
        """Return the number of every answer; one that cannot be read is the oldest."""
        found = {}
        for key in self._keys():
            try:
                found[key] = self._result(key).number
            except RunError:
                found[key] = 0
        return found

    def _attempt(self, key: str) -> Path:
        return self._folder / f"{key}.begun"

    def _result(self, key: str) -> Result:
        return read(self._folder / key / "result.json", Result)
