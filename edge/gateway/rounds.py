"""A round as its devices see it: tasks handed out, uploads begun, deltas counted, each once.

    task     handed → counted | refused | aborted            one per (round, device), for ever
             handed → trained → counted | refused            in a secure round (summing.py)
    round    open → closing → closed | refused               closing.py

A device that asks again gets the task it has. Over-selection: at most ceil(cohort · over_selection)
tasks are counted or alive at a time; one without a sign of life for lease_s frees its place, and
still counts if it comes before the round ends.

With [client_privacy] every device that calls is drawn once per round with chance q, from a key
that nobody knows, and nobody is turned away for being late: who is fast is no random sample.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import sqlite3
import threading
import time
from pathlib import Path

from anabranch.edge.gateway.asking import require_population
from anabranch.edge.gateway.config import GatewayFile
from anabranch.edge.gateway.refusals import Exhausted, Gap, Malformed, Superseded, Unknown
from anabranch.edge.gateway.secure import may_join, read_plan
from anabranch.edge.gateway.spool import Spool
from anabranch.edge.gateway.store import Row, Store
from anabranch.edge.gateway.tasks import (
    HANDED,
    TRAINED,
    Offer,
    Retry,
    Status,
    Verdict,
    asked_of,
    mechanism_of,
    why_not,
)
from anabranch.protocols.errors import PrivacyError, ProtocolError

SUMMED = "the deltas of this round are added in a secure sum; none is uploaded"


class Rounds:
    """Everything that devices change."""

    def __init__(self, file: GatewayFile, store: Store, spool: Spool) -> None:
        self.file, self.store, self.spool = file, store, spool
        self._decoders = threading.BoundedSemaphore(file.limits.decoders)

    def check_in(self, device: str, *, examples: int, runtime: str, resume: str) -> Offer | Retry:
        """Return the device's task, or when to come back."""
        now = time.time()
        with self.store.writing() as db:
            db.execute(
                "UPDATE devices SET seen = ?, examples = ?, runtime = ? WHERE id = ?",
                (now, examples, runtime, device),
            )
            resumed = _one(db, "SELECT round FROM tasks WHERE id = ?", resume)
            first = None if resumed is None else resumed["round"]
            for row in sorted(_rounds(db, now), key=lambda row: row["id"] != first):
                task = self._task(db, row, device, examples, now)
                if task is not None:
                    return Offer(task, row)
        return self.retry("no round needs this device now")

    def _task(
        self, db: sqlite3.Connection, row: Row, device: str, examples: int, now: float
    ) -> Row | None:
        """Return the device's task in a round: the one it has, a new one, or none."""
        mine = _one(db, "SELECT * FROM tasks WHERE round = ? AND device = ?", row["id"], device)
        if mine is not None:
            if mine["state"] != HANDED:
                return None
            db.execute(
                "UPDATE tasks SET touched = ?, declared = max(declared, ?) WHERE id = ?",
                (now, examples, mine["id"]),
            )
            return mine
        if not self._wants(db, row, device, examples, now):
            return None
        task = secrets.token_hex(16)
        db.execute(
            "INSERT INTO tasks (id, round, device, declared, touched) VALUES (?, ?, ?, ?, ?)",
            (task, row["id"], device, examples, now),
        )
        return _one(db, "SELECT * FROM tasks WHERE id = ?", task)

    def _wants(
        self, db: sqlite3.Connection, row: Row, device: str, examples: int, now: float
    ) -> bool:
        mechanism = mechanism_of(row)
        table = self.file.record_privacy
        if examples < 1 or (mechanism and table and examples < table.records):
            return False
        plan = read_plan(self.store, row)
        if plan is not None and not may_join(plan, device, self.store.peer(device)):
            return False
        if self.file.client_privacy is not None:
            return self._drawn(db, row, device)
        most = math.ceil(self.file.cohort * self.file.over_selection)
        busy = _one(
            db,
            "SELECT count(*) AS n FROM tasks WHERE round = ? AND (state = 'counted' OR "
            "(state IN ('handed', 'trained') AND touched > ?))",
            row["id"],
            now - self.file.limits.lease_s,
        )
        return busy is not None and busy["n"] < most

    def _drawn(self, db: sqlite3.Connection, row: Row, device: str) -> bool:
        """Return whether this device is in this round: drawn once, then remembered."""
        plan = self.file.client_privacy
        if plan is None:
            return True
        try:
            require_population(self.store, plan)
        except PrivacyError:
            return False
        found = _one(
            db, "SELECT drawn FROM draws WHERE round = ? AND device = ?", row["id"], device
        )
        if found is not None:
            return bool(found["drawn"])
        drawn = secrets.randbits(53) * 2.0**-53 < plan.sample_rate
        db.execute("INSERT INTO draws VALUES (?, ?, ?)", (row["id"], device, drawn))
        return drawn

    def begin(self, device: str, task: str, sha: bytes, size: int) -> Status:
        """Announce an upload of a task; idempotent on (task, sha256).

        Another sha256 takes the place of what the task announced before, unless that was
        counted. Raises Unknown, Malformed (size or digest), Exhausted (open uploads), Superseded
        (the task was counted or ended meanwhile).
        """
        mine, row = self._mine(device, task)
        if len(sha) != 32:
            raise Malformed(f"sha256: expected 32 bytes, got {len(sha)}")
        counted = self.store.row("SELECT * FROM counted WHERE task = ?", task)
        if counted is not None:
            same = bytes(counted["sha"]) == sha
            state = "COMPLETE" if same else "NOT_WANTED"
            return Status(counted["upload"], size if same else 0, state, "counted already")
        masked = self.store.row("SELECT * FROM sums WHERE round = ?", row["id"])
        due = HANDED if masked is None else TRAINED
        if row["state"] != "open" or time.time() > row["deadline"]:
            return Status("", 0, "NOT_WANTED", why_not(mine, row))
        if masked is not None and (mine["state"] != due or masked["state"] != "masked"):
            return Status("", 0, "NOT_WANTED", SUMMED)
        if mine["state"] != due:
            return Status("", 0, "NOT_WANTED", why_not(mine, row))
        most = asked_of(row).max_bytes if masked is None else masked["masked_bytes"]
        if not (1 if masked is None else most) <= size <= most:
            raise Malformed(f"size: expected {'1 to ' * (masked is None)}{most} bytes, got {size}")
        upload = hashlib.sha256(f"{task}/{size}/".encode() + sha).hexdigest()[:32]
        self._announce(device, task, upload, sha, size, due)
        found = self.store.row("SELECT * FROM uploads WHERE id = ?", upload)
        if found is None:
            raise Unknown("upload: replaced meanwhile; call BeginUpload again")
        return Status(upload, found["committed"], "COMPLETE" if found["complete"] else "OPEN")

    def _announce(
        self, device: str, task: str, upload: str, sha: bytes, size: int, due: str
    ) -> None:
        with self.store.writing() as db:
            mine = _one(db, "SELECT state FROM tasks WHERE id = ?", task)
            if mine is None or mine["state"] != due:  # its bytes may be counted by now
                raise Superseded("task: its state changed meanwhile; call BeginUpload again")
            old = _one(db, "SELECT * FROM uploads WHERE task = ?", task)
            if old is not None and old["id"] == upload:
                return
            if old is not None:
                db.execute("DELETE FROM uploads WHERE id = ?", (old["id"],))
            others = _one(
                db,
                "SELECT count(*) AS n FROM uploads JOIN tasks ON tasks.id = uploads.task "
                "WHERE device = ? AND state IN ('handed', 'trained')",
                device,
            )
            if others is not None and others["n"] >= self.file.limits.open_uploads:
                raise Exhausted(f"uploads: {others['n']} are open; finish or abort one of them")
            db.execute(
                "INSERT INTO uploads (id, task, sha, size) VALUES (?, ?, ?, ?)",
                (upload, task, sha, size),
            )
        if old is not None:
            self.spool.remove(old["id"])

    def commit(
        self, device: str, task: str, upload: str, sha: bytes, *, examples: int, steps: int
    ) -> Verdict:
        """Count the delta of a task, once; what breaks a rule is refused with that rule.

        Raises Unknown (task, upload) and Gap (bytes are missing).
        """
        mine, row = self._mine(device, task)
        counted = self.store.row("SELECT * FROM counted WHERE task = ?", task)
        if counted is not None:
            same = bytes(counted["sha"]) == sha
            return Verdict(same, "" if same else "another delta of this task was counted")
        if read_plan(self.store, row) is not None:
            return Verdict(False, SUMMED)
        if row["state"] != "open" or time.time() > row["deadline"] or mine["state"] != HANDED:
            return Verdict(False, why_not(mine, row))
        there = self.store.row("SELECT * FROM uploads WHERE id = ? AND task = ?", upload, task)
        if there is None or bytes(there["sha"]) != sha:
            raise Unknown("upload: none of this name and digest; call BeginUpload first")
        if not there["complete"]:
            raise Gap(f"upload: {there['committed']} of {there['size']} bytes are there")
        try:
            with self._decoders:
                self._check(row, mine, self.spool.path(upload), examples, steps)
        except ProtocolError as error:
            self._refuse(task, upload, str(error))
            return Verdict(False, str(error))
        return self._count(task, row, upload, sha, examples, steps)

    def _check(self, row: Row, task: Row, path: Path, examples: int, steps: int) -> None:
        """Raise ProtocolError unless the file is a delta that may be added to the sum."""
        asked = asked_of(row)
        delta = asked.decode(path.read_bytes())
        for what, framed, said in (
            ("examples", delta.num_examples, examples),
            ("steps", delta.steps, steps),
        ):
            if framed != said:
                raise Malformed(f"{what}: {framed} in the frame, {said} in the call")
        most = min(task["declared"], self.file.limits.max_examples)
        if not 1 <= examples <= most:
            raise Malformed(
                f"examples: expected 1 to {most}, as declared at check-in, got {examples}"
            )
        if asked.mechanism is not None and steps != asked.mechanism.steps:
            raise Malformed(f"steps: a private task has {asked.mechanism.steps}, got {steps}")

    def _count(
        self, task: str, row: Row, upload: str, sha: bytes, examples: int, steps: int
    ) -> Verdict:
        with self.store.writing() as db:
            changed = db.execute(
                "UPDATE tasks SET state = 'counted', touched = ? WHERE id = ? AND state = 'handed' "
                "AND EXISTS (SELECT 1 FROM rounds WHERE id = ? AND state = 'open') "
                "AND EXISTS (SELECT 1 FROM uploads WHERE id = ? AND complete)",
                (time.time(), task, row["id"], upload),
            )
            if changed.rowcount:
                db.execute(
                    "INSERT INTO counted VALUES (?, ?, ?, ?, ?, ?)",
                    (task, row["id"], upload, sha, examples, steps),
                )
                return Verdict(True)
        counted = self.store.row("SELECT * FROM counted WHERE task = ? AND sha = ?", task, sha)
        return Verdict(counted is not None, "" if counted else "the round has ended")

    def _refuse(self, task: str, upload: str, reason: str) -> None:
        with self.store.writing() as db:
            changed = db.execute(
                "UPDATE tasks SET state = 'refused', reason = ? WHERE id = ? AND state = 'handed'",
                (reason[:500], task),
            )
            if changed.rowcount:
                db.execute("DELETE FROM uploads WHERE id = ?", (upload,))
        if changed.rowcount:  # else another call has counted these bytes meanwhile
            self.spool.remove(upload)

    def abort(self, device: str, task: str, reason: str) -> None:
        """Take a task back; its place is free for another device. Unknown if it is not there."""
        self._mine(device, task)
        with self.store.writing() as db:
            db.execute(
                "UPDATE tasks SET state = 'aborted', reason = ? WHERE id = ? "
                "AND state IN ('handed', 'trained')",
                (reason, task),
            )
            old = _one(
                db,
                "SELECT uploads.id FROM uploads JOIN tasks ON tasks.id = uploads.task "
                "WHERE tasks.id = ? AND state = 'aborted'",
                task,
            )
            if old is not None:
                db.execute("DELETE FROM uploads WHERE id = ?", (old["id"],))
        if old is not None:
            self.spool.remove(old["id"])

    def retry(self, reason: str) -> Retry:
        """Return when a device without a task is asked to come back."""
        return Retry(self.file.retry_s, 3 * self.file.retry_s, reason)

    def _mine(self, device: str, task: str) -> tuple[Row, Row]:
        mine = self.store.row("SELECT * FROM tasks WHERE id = ? AND device = ?", task, device)
        if mine is None:
            raise Unknown("task: none of this name for this device; check in for one")
        row = self.store.row("SELECT * FROM rounds WHERE id = ?", mine["round"])
        if row is None:
            raise Unknown("task: its round is not there any more; check in for another")
        return mine, row


def _rounds(db: sqlite3.Connection, now: float) -> list[Row]:
    query = "SELECT * FROM rounds WHERE state = 'open' AND deadline > ? ORDER BY id"
    return [dict(row) for row in db.execute(query, (now,))]


def _one(db: sqlite3.Connection, query: str, *values: object) -> Row | None:
    found = db.execute(query, values).fetchone()
    return None if found is None else dict(found)
