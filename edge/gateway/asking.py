"""How a round begins: what the coordinator asks, checked, and written down once.

A round is (run, number). Asked again with the same adapter and configuration it is the same
round; with others it is refused. Privacy is spent when a round is opened, before any device hears
of it, whatever becomes of it: a crash counts as spent.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
import time
from dataclasses import dataclass
from typing import Annotated

import msgspec

from anabranch.edge.gateway.aggregate import require_linear
from anabranch.edge.gateway.config import ClientPrivacy, GatewayFile, GatewayFolder
from anabranch.edge.gateway.published import Shelf, put_frame
from anabranch.edge.gateway.secure import plan_of
from anabranch.edge.gateway.store import Row, Store
from anabranch.protocols import rdp, wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError, PrivacyError, ProtocolError
from anabranch.protocols.messages import Assignment, decode, encode
from anabranch.protocols.spend import Spend

MARGIN = 0.1  # share of the coordinator's deadline that is left for ending a round and sending
LEAST_MARGIN_S, MOST_MARGIN_S = 10.0, 60.0  # the least: Flower starts a process before it asks
RECORD, CLIENT = "record", "client"  # units of privacy in the table of spends
SEEN_DAYS = 30  # devices that have not called for so long are not counted on


class Mechanism(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Record-level DP-SGD that every device of a round keeps."""

    noise_multiplier: Annotated[float, msgspec.Meta(gt=0)]
    sample_rate: Annotated[float, msgspec.Meta(gt=0, le=1)]
    clipping_norm: Annotated[float, msgspec.Meta(gt=0)]
    delta: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    steps: Annotated[int, msgspec.Meta(ge=1)]  # of one round
    epsilon: float  # that a device in every private round of this gateway has spent, this one too


@dataclass(frozen=True)
class Opener:
    """What opening a round needs."""

    folder: GatewayFolder
    file: GatewayFile
    store: Store
    shelf: Shelf

    def described(self) -> int:
        """Return how many records the devices have, each capped; DataError if too few devices.

        With client-level privacy it is a constant.
        """
        since = time.time() - SEEN_DAYS * 86400
        rows = self.store.rows(
            "SELECT examples FROM devices WHERE revoked IS NULL AND examples > 0 AND seen > ?",
            since,
        )
        plan, least = self.file.client_privacy, self.file.min_cohort
        if plan is not None:
            return max(1, round(plan.expected_cohort))
        if len(rows) < least:
            raise DataError(
                f"gateway {self.file.name}: {len(rows)} devices with records have called in the "
                f"last {SEEN_DAYS} days, min_cohort = {least}: enrol more of them"
            )
        total: int = sum(min(row["examples"], self.file.limits.max_examples) for row in rows)
        return min(total, wire.MAX_EXAMPLES)

    def open(self, assignment: Assignment, adapter: Adapter) -> Row:
        """Return the row of the round, opened now if it is new.

        Raises ConfigError (not linear, no bundle for it), PrivacyError (budget, or a mechanism
        that devices do not have), DataError (too few devices), ProtocolError (the round is
        there with another content, or its run with another configuration).
        """
        text = encode(assignment)
        assignment = decode(text, Assignment)  # 600 and 600.0 are one configuration
        config = assignment.config
        require_linear(config)
        frame = wire.encode(adapter)
        digest = hashlib.sha256(text + hashlib.sha256(frame).digest()).digest()
        found = self._found(assignment, digest)
        if found is not None:
            return found
        assignment.part.shapes(adapter.spec)  # refuses ranks that are not there
        described = self.described()
        bundle = self.shelf.fitting(adapter.spec, config.task.labels)
        mechanism = self._mechanism(assignment)
        collecting = collecting_s(config.federation.deadline_s)
        plan = plan_of(self.file, self.folder, assignment, collecting)
        spends = self._spends(mechanism)
        sha = put_frame(self.folder.files, frame)
        now = time.time()
        with self.store.writing() as db:
            fresh = db.execute(
                "INSERT INTO rounds (run, number, digest, assignment, spec, adapter, "
                "adapter_bytes, bundle, mechanism, described, opened, deadline) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (
                    assignment.run,
                    assignment.round,
                    digest,
                    text,
                    msgspec.json.encode(adapter.spec),
                    sha,
                    len(frame),
                    bundle.key,
                    None if mechanism is None else msgspec.json.encode(mechanism),
                    described,
                    now,
                    now + collecting,
                ),
            )
            if fresh.rowcount:
                if plan is not None:
                    db.execute(
                        "INSERT INTO sums (round, plan) VALUES (?, ?)",
                        (fresh.lastrowid, msgspec.json.encode(plan)),
                    )
                for unit, spend in spends.items():
                    self._spend(db, assignment, unit, spend)
        put_frame(self.folder.files, frame)  # a round that ended just now may have removed it
        opened = self._found(assignment, digest)
        if opened is None:
            raise ProtocolError(f"round {assignment.round} of {assignment.run}: cannot be opened")
        return opened

    def _found(self, assignment: Assignment, digest: bytes) -> Row | None:
        """Return the round if it is there; refuse another content, or another configuration."""
        for row in self.store.rows(
            "SELECT * FROM rounds WHERE run = ? AND (number = ? OR number = "
            "(SELECT min(number) FROM rounds WHERE run = ?)) ORDER BY number",
            assignment.run,
            assignment.round,
            assignment.run,
        ):
            if row["number"] == assignment.round:
                if bytes(row["digest"]) != digest:
                    raise ProtocolError(
                        f"round {assignment.round} of this run was asked before with another "
                        "adapter or configuration: a new configuration is a new run"
                    )
                return row
            began = decode(bytes(row["assignment"]), Assignment).config
            if began.digest() != assignment.config.digest():
                raise ProtocolError(
                    "this run began with another configuration than it is asked to go on with "
                    "here: a new configuration is a new run"
                )
        return None

    def _mechanism(self, assignment: Assignment) -> Mechanism | None:
        """Return what all devices keep in a run with [privacy]: one mechanism, so one ε."""
        config, table = assignment.config, self.file.record_privacy
        privacy, steps = config.privacy, config.training.local_steps
        sums = config.secure_aggregation is not None and config.client_privacy is not None
        if sums or (privacy is not None and privacy.noise == "distributed"):
            raise PrivacyError(
                f"gateway {self.file.name}: the members of this run's secure sums make its noise, "
                "and a gateway has no ledger to charge its part to; nothing is trained"
            )
        if privacy is None:
            return None
        if table is None or steps is None:
            raise PrivacyError(
                f"gateway {self.file.name}: a run with [privacy] needs [record_privacy] in "
                "gateway.toml, so that all devices keep one mechanism; nothing is trained"
            )
        if privacy.clipping != "flat":
            raise PrivacyError(
                f'privacy.clipping = "{privacy.clipping}": devices clip flat; nothing is trained'
            )
        if assignment.round > config.federation.rounds:
            raise PrivacyError(
                f"round {assignment.round} is beyond the {config.federation.rounds} of the run's "
                "plan: nothing is trained"
            )
        default = 1 / (10 * self.file.limits.max_examples)
        delta = privacy.delta or table.delta or default
        rate = min(1.0, config.training.batch_size / table.records)
        noise = rdp.least_noise(privacy.epsilon, delta, rate, steps * config.federation.rounds)
        spend = Spend(noise_multiplier=noise, sample_rate=rate, steps=steps)
        epsilon = rdp.epsilon_of([*spends_of(self.store, RECORD), spend], delta)
        if not math.isfinite(epsilon):
            raise PrivacyError(
                f"gateway {self.file.name}: its private rounds so far and this one cost more than "
                "can be stated; nothing is trained"
            )
        return Mechanism(
            noise_multiplier=noise,
            sample_rate=rate,
            clipping_norm=privacy.clipping_norm,
            delta=delta,
            steps=steps,
            epsilon=epsilon,
        )

    def _spends(self, mechanism: Mechanism | None) -> dict[str, Spend]:
        """Return what this round spends, by unit."""
        spends = {}
        if mechanism is not None:
            spends[RECORD] = Spend(
                noise_multiplier=mechanism.noise_multiplier,
                sample_rate=mechanism.sample_rate,
                steps=mechanism.steps,
            )
        if self.file.client_privacy is not None:
            spends[CLIENT] = client_spend(self.file.client_privacy)
        return spends

    def _spend(
        self, db: sqlite3.Connection, assignment: Assignment, unit: str, spend: Spend
    ) -> None:
        """Write a spend down, inside the transaction that opens the round."""
        plan = self.file.client_privacy
        if unit == CLIENT and plan is not None:
            require_population(self.store, plan)
            rdp.require_budget(
                spends_of(self.store, CLIENT),
                spend,
                epsilon=plan.epsilon,
                delta=plan.target_delta,
                budget="the [client_privacy] budget of gateway.toml",
            )
        db.execute(
            "INSERT INTO spends VALUES (?, ?, ?, ?, ?, ?)",
            (
                assignment.run,
                assignment.round,
                unit,
                spend.noise_multiplier,
                spend.sample_rate,
                spend.steps,
            ),
        )


def collecting_s(deadline_s: float) -> float:
    """Return how long a round collects, of the coordinator's deadline."""
    margin = min(max(MARGIN * deadline_s, LEAST_MARGIN_S), MOST_MARGIN_S)
    return deadline_s - min(margin, deadline_s / 2)


def client_spend(plan: ClientPrivacy) -> Spend:
    """Return what one round costs a device."""
    return Spend(noise_multiplier=plan.noise_multiplier, sample_rate=plan.sample_rate, steps=1)


def spends_of(store: Store, unit: str) -> list[Spend]:
    """Return all that was spent of a unit, over all runs."""
    return [
        Spend(noise_multiplier=row["noise"], sample_rate=row["rate"], steps=row["steps"])
        for row in store.rows("SELECT * FROM spends WHERE unit = ?", unit)
    ]


def require_population(store: Store, plan: ClientPrivacy) -> None:
    """Raise PrivacyError if more devices were ever enrolled than the plan accounts for."""
    found = store.row("SELECT count(*) AS n FROM devices")
    count = 0 if found is None else found["n"]
    if count > plan.population:
        raise PrivacyError(
            f"{count} devices have been enrolled, and client_privacy.population = "
            f"{plan.population} fixed how many may be drawn: nothing is trained"
        )


def config_of(row: Row) -> RunConfig:
    """Return a round's configuration."""
    return decode(bytes(row["assignment"]), Assignment).config
