"""Toy sites in secure sums: they send exactly what they are told to, and keep it as sites do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.flower import NO_LIMITS
from anabranch.client.sums.given import InMemory
from anabranch.client.sums.participant import Participant
from anabranch.client.sums.terms import (
    Kept,
    agreement_of,
    digest_of,
    grid_of_sum,
    hidden,
    summed,
    vector_of,
)
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.messages import Assignment, Trained
from anabranch.protocols.secagg import contribution
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.member import Answer, Limits
from anabranch.protocols.secagg.messages import Invite, Request
from anabranch.protocols.secagg.terms import Peer, Roster, Terms
from anabranch.protocols.tables import SecureAggregation
from anabranch.server.result import Result
from tests.simulations.federation import Federation
from tests.simulations.rig import ToySite, config

RANGE = 4.0
MANY = {f"site-{i}": 5 + 3 * i for i in range(8)}  # name -> records


@dataclass
class Disk:
    """What a toy finds again when it is started anew."""

    held: Kept | None = None

    def write(self, kept: Kept, adapter: Adapter) -> None:
        self.held = kept

    def read(self) -> Kept | None:
        return self.held

    def clear(self) -> None:
        self.held = None


@dataclass
class SummingToy(ToySite):
    """A toy site that keeps its delta; `floors` are its owner's."""

    floors: Limits = NO_LIMITS
    refuses: frozenset[str] = frozenset()  # stages that it answers with an error
    participants: dict[str, Participant] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # stages, in order

    def participant(self, run: str) -> Participant:
        if run not in self.participants:
            key = Ed25519PrivateKey.generate()
            self.participants[run] = Participant(self.name, key, InMemory(), None, Disk())
        return self.participants[run]

    def peer_key(self, run: str, config: RunConfig) -> str | None:
        return self.participant(run).public_key

    def train(self, assignment: Assignment, before: Adapter) -> tuple[Trained, bytes]:
        report, frame = super().train(assignment, before)
        if assignment.config.secure_aggregation is None:
            return report, frame
        delta = wire.decode_delta(frame, before.spec, assignment.part)
        self.participant(assignment.run).keep(assignment, before, delta)
        return hidden(report, assignment.config), b""

    def secure(
        self, assignment: Assignment, request: Request, limits: Limits = NO_LIMITS
    ) -> Answer:
        self.asked.append(request.stage)
        if request.stage in self.refuses:
            raise RuntimeError("records.csv, line 7: Jane Doe")
        participant = self.participant(assignment.run)
        return participant.answer(assignment, request, self.floors, vector_of)

    def restart(self) -> None:
        """Lose what is in memory, but not what was written down."""
        for run, one in self.participants.items():
            self.participants[run] = Participant(
                self.name, one._key, one._given, one.masked, one._saved
            )


def invite_of(
    assignment: Assignment,
    members: Mapping[str, Participant],
    model: Adapter,
    instance: str = "ab" * 32,
    /,
    **changes: Any,
) -> Invite:
    """Return what an honest coordinator asks members of a sum first, changed by `changes`."""
    run, part = assignment.config, summed(assignment.part)
    secure = run.secure_aggregation
    assert secure is not None
    ring, limit = grid_of_sum(run, secure, model.spec, len(members))
    by_rank = run.federation.mixed_ranks
    values, counters = contribution.sizes(model.spec, part, by_rank=by_rank)
    roster = Roster.of(Peer(name=name, key=one.public_key) for name, one in members.items())
    terms = Terms(
        run=assignment.run,
        round=assignment.round,
        instance=instance,
        config=agreement_of(run, part),
        model=digest_of(model),
        roster=roster.digest,
        members=tuple(members),
        minimum=secure.minimum,
        threshold=secure.threshold,
        colluding=secure.colluding,
        ring=ring,
        limit=limit,
        weight=40 * contribution.WEIGHT_UNIT,
        values=values,
        counters=counters,
        keystream="chacha20",
    )
    return Invite(terms=msgspec.structs.replace(terms, **changes), roster=roster)


def carried(
    invite: Invite, answer: Callable[[str, Request], Answer | None], until: str = "done"
) -> Aggregation:
    """Carry a sum as far as a stage; `answer` is of one member, None of who is lost there."""
    aggregation = Aggregation(invite.terms, invite.roster)
    while aggregation.stage not in ("done", "aborted", until):
        for name, request in aggregation.requests().items():
            got = answer(name, request)
            if got is not None:
                aggregation.take(name, got.reply, got.data)
        aggregation.close()
    return aggregation


def toys(sizes: Mapping[str, int], **fields: Any) -> list[SummingToy]:
    return [SummingToy(name, size, **fields) for name, size in sizes.items()]


def secured(run: RunConfig | None = None, **secure: Any) -> RunConfig:
    """Return the run with [secure_aggregation]."""
    table = SecureAggregation(**{"deadline_s": 20.0, "range": RANGE, **secure})
    return msgspec.structs.replace(run or config(), secure_aggregation=table)


def step_of(run: RunConfig, members: int, weights: list[float]) -> float:
    """Return how far a secure mean may be off the plain one, per value.

    Each member is off by less than one step of the grid in units of the heaviest weight W; the
    mean divides by Σ w. Two float32 roundings of values within the range come on top.
    """
    from anabranch.protocols.secagg.fixed_point import Grid, ring_for

    secure = run.secure_aggregation
    assert secure is not None
    grid = Grid(ring_for(members, secure.value_bits, secure.ring), members, secure.range)
    return members * grid.step * max(weights) / sum(weights) + 4e-7 * secure.range


def plain_of(sites: list[SummingToy], run: RunConfig) -> Result:
    """Return the result of the same run in the clear."""
    clear = msgspec.structs.replace(run, secure_aggregation=None)
    names = [ToySite(s.name, s.num_examples, s.step, s.held_out, s.max_rank) for s in sites]
    return Federation(names, run=clear).run()


def furthest(one: Adapter, other: Adapter) -> float:
    return max(float(np.max(np.abs(one.arrays[name] - other.arrays[name]))) for name in one.arrays)
