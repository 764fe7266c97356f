"""How a round ends: the sum of what was counted, or a reason why there is none.

A secure round ends with its sum (summing.py), and no delta of it is ever read here. Any other
round ends at its deadline, or as soon as `cohort` deltas are counted. With [client_privacy] it
ends early only when every device has had its draw and nobody who was drawn is still at work. When
it ends then depends on who came: the time of an answer is not covered by ε.

Deltas are read back one at a time, in the order of their SHA-256 (then of their tasks): the sum
does not depend on who was fast, and is the same bits after a restart. `closing` is written first,
so nothing is counted any more; if the process dies, closing is done again from the same files.
Noise is drawn anew then; what was drawn before never left.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from anabranch.edge.gateway.aggregate import Total, total_of
from anabranch.edge.gateway.asking import CLIENT
from anabranch.edge.gateway.config import GatewayFile, GatewayFolder
from anabranch.edge.gateway.published import put_frame
from anabranch.edge.gateway.secure import read_plan
from anabranch.edge.gateway.spool import Spool
from anabranch.edge.gateway.store import Row, Store
from anabranch.edge.gateway.summing import Sums
from anabranch.edge.gateway.tasks import Asked, asked_of
from anabranch.protocols import wire
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import AnabranchError, PrivacyError, RunError
from anabranch.protocols.randomness import Randomness

AGAIN_S = 10.0  # before a round that cannot be ended is tried again

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Closer:
    """Ends the rounds of one gateway. One process does it: the gRPC server."""

    folder: GatewayFolder
    file: GatewayFile
    store: Store
    spool: Spool
    sums: Sums
    turn: threading.Lock = field(default_factory=threading.Lock)
    failed: dict[int, float] = field(default_factory=dict)  # round -> not before

    def recover(self) -> int:
        """Remove what a crash left behind, of rounds that have ended; return how many uploads."""
        with self.store.writing() as db:
            db.execute(
                "DELETE FROM uploads WHERE task IN (SELECT tasks.id FROM tasks JOIN rounds "
                "ON rounds.id = tasks.round WHERE rounds.state IN ('closed', 'refused'))"
            )
            needed = {
                row["adapter"]
                for row in db.execute(
                    "SELECT adapter FROM rounds WHERE state IN ('open', 'closing')"
                )
            }
            for path in self.folder.files.glob("[0-9a-f]*"):  # hidden ones are being written
                if path.name not in needed:
                    path.unlink(missing_ok=True)
        return self.spool.sweep()

    def due(self, now: float | None = None) -> list[int]:
        """End every round whose time has come, or that a crash left half ended; return them.

        A round that cannot be ended now (a full disk) is logged and tried again after AGAIN_S; the
        others end.
        """
        now = time.time() if now is None else now
        ended, query = [], "SELECT * FROM rounds WHERE state IN ('open', 'closing')"
        with self.turn:
            for row in self.store.rows(query):
                if 0 < self.failed.get(row["id"], now) - now <= AGAIN_S:
                    continue
                try:
                    if not self._over(row, now):
                        continue
                    self.close(row)
                except (OSError, ValueError, sqlite3.Error, MemoryError):
                    log.exception("round %d cannot be ended now", row["number"])
                    self.failed[row["id"]] = now + AGAIN_S
                    continue
                ended.append(int(row["id"]))
        return ended

    def _over(self, row: Row, now: float) -> bool:
        if read_plan(self.store, row) is not None:
            return self.sums.advance(row, now)
        return row["state"] == "closing" or now >= row["deadline"] or self._enough(row)

    def close(self, row: Row) -> None:
        """End one round."""
        with self.store.writing() as db:
            db.execute(
                "UPDATE rounds SET state = 'closing' WHERE id = ? AND state = 'open'", (row["id"],)
            )
        try:
            self._close(row)
        except AnabranchError as error:
            log.warning("round %d of %s: %s", row["number"], row["run"], error)
            self._end(row, state="refused", reason=str(error))
        self._clean(row)
        self.sums.forget(row)

    def _close(self, row: Row) -> None:
        if read_plan(self.store, row) is not None:
            mean, clients = self.sums.outcome(row)
            asked = asked_of(row)
            examples = min(mean.num_examples, row["described"])
            steps = mean.steps if asked.mechanism is None else asked.mechanism.steps
            delta = Delta(mean.spec, mean.arrays, examples, part=mean.part, steps=steps)
            self._put(row, asked, delta, clients)
            return
        counted = self.store.rows(
            "SELECT * FROM counted WHERE round = ? ORDER BY sha, task", row["id"]
        )
        self._require_plan(row)
        plan, least = self.file.client_privacy, self.file.min_cohort
        if plan is None and len(counted) < least:
            reason = (
                f"{len(counted)} devices sent a delta that counts, min_cohort = {least}: nothing "
                "is sent on"
            )
            self._end(row, state="refused", reason=reason)
            return
        asked = asked_of(row)
        self._put(row, asked, self._delta(row, asked, counted), len(counted))

    def _put(self, row: Row, asked: Asked, delta: Delta, clients: int) -> None:
        """Keep the result for the coordinator, in the run's codec."""
        uplink = asked.uplink
        name = f"{self.file.name}/{row['run']}/{row['number']}"
        rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
        frame = wire.encode(delta, codec=uplink.codec, keep=uplink.keep, rng=rng)
        sha = put_frame(self.folder.results, frame)
        self._end(
            row,
            state="closed",
            result=sha,
            examples=delta.num_examples,
            steps=delta.steps,
            clients=clients,
        )

    def _require_plan(self, row: Row) -> None:
        """Raise PrivacyError unless the plan is the one spent when the round was opened."""
        spent = self.store.row(
            "SELECT * FROM spends WHERE run = ? AND number = ? AND unit = ?",
            row["run"],
            row["number"],
            CLIENT,
        )
        plan = self.file.client_privacy
        now = None if plan is None else (plan.noise_multiplier, plan.sample_rate)
        then = None if spent is None else (spent["noise"], spent["rate"])
        if now != then:
            raise PrivacyError(
                f"gateway {self.file.name}: [client_privacy] of gateway.toml was changed while "
                "the round was open, after its cost was written down: nothing is sent on"
            )

    def _delta(self, row: Row, asked: Asked, counted: list[Row]) -> Delta:
        config, plan = asked.assignment.config, self.file.client_privacy
        norm = self.file.clipping_norm if plan is None else plan.clipping_norm
        total: Total = total_of(
            self._deltas(asked, counted),
            asked.spec,
            asked.assignment.part,
            by_examples=plan is None and config.federation.weighting == "examples",
            norm=norm,
        )
        steps = 0 if asked.mechanism is None else asked.mechanism.steps
        if plan is not None:
            return total.private_mean(plan, Randomness.fresh().normal, steps=steps)
        mean = total.mean()
        examples = min(total.examples, row["described"])  # what was announced is not exceeded
        return Delta(mean.spec, mean.arrays, examples, part=mean.part, steps=steps or mean.steps)

    def _deltas(self, asked: Asked, counted: list[Row]) -> Iterator[Delta]:
        for one in counted:
            try:
                frame = self.spool.path(one["upload"]).read_bytes()
            except OSError as error:
                raise RunError(
                    f"gateway {self.file.name}: a counted delta cannot be read back "
                    f"({error.strerror}): nothing is sent on"
                ) from None
            yield asked.decode(frame)

    def _enough(self, row: Row) -> bool:
        counted = self._tally(row, "counted")
        if self.file.client_privacy is None:
            return counted >= self.file.cohort
        query = "SELECT count(*) AS n FROM devices WHERE revoked IS NULL"
        active = self.store.row(query)
        drawn = self.store.row(
            f"{query} AND id IN (SELECT device FROM draws WHERE round = ?)", row["id"]
        )
        waiting = self._tally(row, "handed")
        return bool(drawn and active and drawn["n"] >= active["n"] > 0 and waiting == 0)

    def _tally(self, row: Row, state: str) -> int:
        found = self.store.row(
            "SELECT count(*) AS n FROM tasks WHERE round = ? AND state = ?", row["id"], state
        )
        return 0 if found is None else int(found["n"])

    def _end(
        self,
        row: Row,
        *,
        state: str,
        reason: str = "",
        result: str | None = None,
        examples: int | None = None,
        steps: int | None = None,
        clients: int | None = None,
    ) -> None:
        with self.store.writing() as db:
            db.execute(
                "UPDATE rounds SET state = ?, reason = ?, result = ?, examples = ?, steps = ?, "
                "clients = ?, closed = ? WHERE id = ? AND state = 'closing'",
                (state, reason, result, examples, steps, clients, time.time(), row["id"]),
            )

    def _clean(self, row: Row) -> None:
        """Remove the bytes of an ended round's uploads, and its adapter if no other needs it."""
        tasks = "SELECT id FROM tasks WHERE round = ?"
        uploads = self.store.rows(f"SELECT id FROM uploads WHERE task IN ({tasks})", row["id"])
        with self.store.writing() as db:
            db.execute(f"DELETE FROM uploads WHERE task IN ({tasks})", (row["id"],))
        for upload in uploads:
            self.spool.remove(upload["id"])
        with self.store.writing() as db:  # no round is opened with this adapter meanwhile
            needed = db.execute(
                "SELECT 1 FROM rounds WHERE adapter = ? AND state IN ('open', 'closing')",
                (row["adapter"],),
            ).fetchone()
            if needed is None:
                (self.folder.files / row["adapter"]).unlink(missing_ok=True)
