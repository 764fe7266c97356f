"""Secure sums at the gateway: between the tasks of a round and its end.

    sums.state   collecting ─► running ─► masked ─► done
                     ▲            │  the process ends: a new attempt, while there is time
                     └────────────┘  after "masked": the round is refused, nothing is asked again

A device that has trained says so with its first Stage call, and keeps its delta. A sum begins when
`cohort` of them are there, or when only the time for its five stages is left; who has not called
within stage_s is away, and is not asked. Each stage ends when all have answered, or after stage_s
(protocols/secagg/coordinator.py says what follows). `masked` is on the disk before any device is
asked for its masked vector: each gives it once per round.

A running sum is in memory alone; RPCs answer for its members, one thread ends its stages.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec

from anabranch.edge.gateway.config import GatewayFile
from anabranch.edge.gateway.offers import task_of
from anabranch.edge.gateway.published import Shelf
from anabranch.edge.gateway.refusals import Malformed, Unknown
from anabranch.edge.gateway.secure import Plan, may_join, read_plan, terms_of
from anabranch.edge.gateway.spool import Spool
from anabranch.edge.gateway.store import Row, Store
from anabranch.edge.gateway.tasks import COUNTED, HANDED, TRAINED, Offer, Retry, asked_of
from anabranch.edge.runtime.secure_task import sum_config
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import AnabranchError, RunError
from anabranch.protocols.secagg.contribution import mean_of
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.messages import REPLIES, Request
from anabranch.protocols.secagg.plan import length
from anabranch.protocols.secagg.ring import Ring

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A request to a member."""

    stage: str
    content: bytes


@dataclass(frozen=True)
class Ended:
    """The last word on a task's delta."""

    counted: bool
    reason: str = ""


@dataclass
class _Running:
    """One sum under way. `busy`: its stage is being ended, and nobody's answer is taken."""

    aggregation: Aggregation
    tasks: dict[str, str]  # device -> task
    until: float
    failed: str = ""
    busy: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    asked: dict[str, Request] = field(default_factory=dict)
    encoded: dict[int, bytes] = field(default_factory=dict)  # of requests that are the same object

    @property
    def over(self) -> bool:
        """Whether it has an outcome."""
        return bool(self.failed) or self.aggregation.stage in ("done", "aborted")

    def request(self, device: str) -> Asked | None:
        """Return what a device is asked and has not answered."""
        if self.busy or self.over or device not in self.aggregation.waiting():
            return None
        one = self.asked[device]
        if id(one) not in self.encoded:
            self.encoded[id(one)] = msgspec.json.encode(one)
        return Asked(one.stage, self.encoded[id(one)])


class Sums:
    """All secure sums of one gateway's process."""

    def __init__(self, file: GatewayFile, store: Store, spool: Spool, shelf: Shelf) -> None:
        self.file, self.store, self.spool, self.shelf = file, store, spool, shelf
        self._began = time.time()
        self._running: dict[int, _Running] = {}
        self._refused: dict[int, str] = {}  # rounds without a sum -> why

    # What devices call

    def stage(
        self, device: str, task: str, *, stage: str, reply: bytes, sha: bytes
    ) -> Asked | Retry | Ended:
        """Take a device's answer, if it is due, and return what comes next for it.

        Raises Unknown (task, masked vector), Malformed (no secure task, an answer that breaks a
        rule): then nothing has changed.
        """
        mine = self.store.row("SELECT * FROM tasks WHERE id = ? AND device = ?", task, device)
        row = mine and self.store.row("SELECT * FROM rounds WHERE id = ?", mine["round"])
        if not mine or not row:
            raise Unknown("task: none of this name for this device; check in for one")
        plan = read_plan(self.store, row)
        if plan is None:
            raise Malformed("task: its delta is uploaded, it goes into no secure sum")
        if row["state"] in ("closed", "refused"):
            counted = mine["state"] == COUNTED and row["state"] == "closed"
            return Ended(counted, "" if counted else _why(mine, row))
        if mine["state"] not in (HANDED, TRAINED, COUNTED):
            return Ended(False, _why(mine, row))
        if mine["state"] == HANDED or mine["touched"] < time.time() - plan.table.stage_s / 4:
            self._here(mine["id"])
        running = self._running.get(row["id"])
        if running is None:
            return _before(plan)
        with running.lock:
            if stage and not running.busy and stage == running.aggregation.stage:
                self._take(running, device, mine, reply, sha)
            return running.request(device) or _between(plan)

    def _here(self, task: str) -> None:
        with self.store.writing() as db:
            db.execute(
                "UPDATE tasks SET touched = ?, state = CASE state WHEN 'handed' THEN 'trained' "
                "ELSE state END WHERE id = ?",
                (time.time(), task),
            )

    def _take(self, running: _Running, device: str, task: Row, reply: bytes, sha: bytes) -> None:
        """Take an answer; once more is the same as once."""
        aggregation = running.aggregation
        if device not in aggregation.waiting():
            return
        kind: Any = REPLIES[aggregation.stage]  # type: ignore[index]
        try:
            said = msgspec.json.decode(reply, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Malformed(f"reply: {error}") from None
        if aggregation.stage != "mask":
            aggregation.take(device, said)
            return
        upload = self.store.row(
            "SELECT * FROM uploads WHERE task = ? AND sha = ? AND complete", task["id"], sha
        )
        if upload is None:
            raise Unknown("sha256: no masked vector of this digest is there; upload it first")
        aggregation.take(device, said, self.spool.path(upload["id"]).read_bytes())
        with self.store.writing() as db:
            db.execute("DELETE FROM uploads WHERE id = ?", (upload["id"],))
        self.spool.remove(upload["id"])

    # What the thread that ends rounds calls

    def advance(self, row: Row, now: float) -> bool:
        """Begin, or go on with, the sum of a round; return whether the round is to be ended."""
        running = self._running.get(row["id"])
        if running is not None:
            return self._push(row, running, now)
        plan = read_plan(self.store, row)
        found = self.store.row("SELECT state FROM sums WHERE round = ?", row["id"])
        if plan is None or found is None or row["id"] in self._refused:
            return True
        if found["state"] == "masked" or row["state"] == "closing":
            self._refused[row["id"]] = (
                "the gateway was started anew after devices had been asked for masked vectors: "
                "they give one a round"
            )
            return True
        ready = self._ready(row, plan, now)
        if len(ready) < self.file.cohort and now < self._collect_until(row, plan):
            return False
        try:
            self._begin(row, plan, ready, now)
        except AnabranchError as error:
            self._refused[row["id"]] = str(error)
            return True
        return False

    def outcome(self, row: Row) -> tuple[Delta, int]:
        """Return the mean of the opened sum, and of how many devices it is.

        Raises RunError, with the reason, if there is no sum. Marks who is in it.
        """
        running = self._running.get(row["id"])
        if running is None:
            raise RunError(self._refused.get(row["id"], "there was no secure sum"))
        aggregation = running.aggregation
        if running.failed or aggregation.stage != "done":
            reason = running.failed or aggregation.reason
            raise RunError(f"secure sum: {reason}{_lost(aggregation)}: nothing was opened")
        (opened,) = aggregation.sums
        asked = asked_of(row)
        mean = mean_of(
            opened.total,
            aggregation.terms,
            asked.spec,
            asked.assignment.part,
            normalize_steps=False,
            by_rank=False,
        )
        self._mark(running, opened.members)
        return mean, len(opened.members)

    def forget(self, row: Row) -> None:
        """Drop what is known of a round that has ended."""
        self._running.pop(row["id"], None)
        self._refused.pop(row["id"], None)
        with self.store.writing() as db:
            db.execute("UPDATE sums SET state = 'done' WHERE round = ?", (row["id"],))

    def _mark(self, running: _Running, members: tuple[str, ...]) -> None:
        with self.store.writing() as db:
            for device, task in running.tasks.items():
                if device in members:
                    db.execute("UPDATE tasks SET state = 'counted' WHERE id = ?", (task,))
                    continue
                stage = running.aggregation.dropped.get(device, "advertise")
                db.execute(
                    "UPDATE tasks SET reason = ? WHERE id = ?", (f"lost at stage {stage}", task)
                )

    def _ready(self, row: Row, plan: Plan, now: float) -> dict[str, Row]:
        """Return the tasks of the devices that have trained and are there, by device."""
        peers = self.store.peers()
        found = self.store.rows(
            "SELECT * FROM tasks WHERE round = ? AND state = 'trained' AND touched > ?",
            row["id"],
            now - plan.table.stage_s,
        )
        return {
            one["device"]: one
            for one in found
            if may_join(plan, one["device"], peers.get(one["device"]))
        }

    def _collect_until(self, row: Row, plan: Plan) -> float:
        """Return when a sum begins at the latest; after a restart devices may call again first."""
        until = float(row["deadline"] - plan.sum_s)
        again = self._began + plan.table.stage_s
        return max(until, again) if self._began > row["opened"] else until

    def _begin(self, row: Row, plan: Plan, ready: dict[str, Row], now: float) -> None:
        if len(ready) < plan.minimum:
            raise RunError(
                f"{len(ready)} devices have trained and are there, and a secure sum takes "
                f"{plan.minimum}: nothing was opened"
            )
        known = self.store.peers()
        peers = {device: known[device] for device in ready if device in known}
        one = task_of(self.file, self.shelf, Offer(next(iter(ready.values())), row), plan)
        terms, roster = terms_of(
            plan,
            row,
            asked_of(row),
            sum_config(one),
            peers,
            secrets.token_hex(32),
            max(task["declared"] for task in ready.values()),
        )
        running = _Running(
            Aggregation(terms, roster),
            {device: task["id"] for device, task in ready.items()},
            self._stage_until(row, plan, now),
        )
        running.asked = running.aggregation.requests()
        with self.store.writing() as db:
            db.execute(
                "UPDATE sums SET state = 'running', attempts = attempts + 1, masked_bytes = ? "
                "WHERE round = ?",
                (Ring(terms.ring).width * length(terms), row["id"]),
            )
        self._running[row["id"]] = running
        log.info("round %d of %s: a sum of %d devices", row["number"], row["run"], len(ready))

    def _push(self, row: Row, running: _Running, now: float) -> bool:
        """End the present stage if it is time; return whether the sum is over."""
        with running.lock:
            if running.over:
                return True
            if not running.busy:
                if running.aggregation.waiting() and now < running.until:
                    return False
                running.busy = True
                closing = True
            else:  # a disk failed after the stage was ended
                closing = False
        if closing:
            try:
                running.aggregation.close()
            except AnabranchError as error:
                running.failed = str(error)
        plan = read_plan(self.store, row)
        if running.aggregation.stage == "mask":
            with self.store.writing() as db:
                db.execute("UPDATE sums SET state = 'masked' WHERE round = ?", (row["id"],))
        with running.lock:
            running.asked, running.encoded = running.aggregation.requests(), {}
            running.until = now if plan is None else self._stage_until(row, plan, now)
            running.busy = False
        return running.over

    @staticmethod
    def _stage_until(row: Row, plan: Plan, now: float) -> float:
        return min(now + plan.table.stage_s, float(row["deadline"]))


def _before(plan: Plan) -> Retry:
    """Return when a device that has trained calls again: often enough to hear of the sum."""
    least = max(1, int(plan.table.stage_s / 8))
    return Retry(least, max(2, 2 * least), "the sum has not begun")


def _between(plan: Plan) -> Retry:
    least = max(1, int(plan.table.stage_s / 30))
    return Retry(least, 2 * least, "the others are not there yet")


def _why(task: Row, row: Row) -> str:
    """Return why a delta is in no sum."""
    return task["reason"] or row["reason"] or "it was not there when the sum was made"


def _lost(aggregation: Aggregation) -> str:
    counts = Counter(aggregation.dropped.values())
    found = ", ".join(f"{count} at {stage}" for stage, count in counts.items())
    return f" (lost: {found})" if found else ""
