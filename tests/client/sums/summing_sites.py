"""Members of secure sums of one round, with deltas that they keep."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.flower import NO_LIMITS
from anabranch.client.sums.between import InMemoryFile
from anabranch.client.sums.given import InFile, InMemory
from anabranch.client.sums.kept import InFrame
from anabranch.client.sums.participant import Participant
from anabranch.client.sums.terms import vector_of
from anabranch.protocols.adapter import Delta
from anabranch.protocols.messages import Assignment
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.member import Answer
from anabranch.protocols.secagg.messages import Invite, Request
from tests.secure_cases import carried, invite_of, secured
from tests.simulations.rig import SPEC, adapter, config

NAMES = ("aarhus", "bergen", "cork", "delft")
RUN = secured(config())
ASSIGNMENT = Assignment(run="toy-1", round=1, config=RUN)
MODEL = adapter(0.5)
VALUES = {name: 0.25 * i for i, name in enumerate(NAMES)}  # what each of them has learned

Clock = Callable[[], float]


def a_delta(value: float = 0.5, num_examples: int = 10) -> Delta:
    return Delta(SPEC, adapter(value).arrays, num_examples, steps=3)


def participants(
    opened: Callable[[], Any] = InMemory, clock: Clock = time.monotonic
) -> dict[str, Participant]:
    return {
        name: Participant(name, Ed25519PrivateKey.generate(), opened(), clock=clock)
        for name in NAMES
    }


def terms_of(members: dict[str, Participant], instance: str = "ab" * 32, **changes: Any) -> Invite:
    return invite_of(ASSIGNMENT, members, MODEL, instance, **changes)


def summed_up(members: dict[str, Participant], invite: Invite, until: str = "done") -> Aggregation:
    """Carry a sum as far as the stage `until`."""

    def answer(name: str, request: Request) -> Answer:
        return members[name].answer(ASSIGNMENT, request, NO_LIMITS, vector_of)

    return carried(invite, answer, until)


def kept(
    opened: Callable[[], Any] = InMemory, clock: Clock = time.monotonic
) -> dict[str, Participant]:
    members = participants(opened, clock)
    for name, one in members.items():
        one.keep(ASSIGNMENT, MODEL, a_delta(VALUES[name]))
    return members


class Sites:
    """The members, each in a process of its own that ends with every message.

    What one process leaves to the next lies in `memory`, or in a folder beside the sites'.
    """

    def __init__(
        self, folder: Path, memory: Path | None = None, clock: Clock = time.monotonic
    ) -> None:
        self.folder, self.memory, self.clock = folder, memory or folder / "memory", clock
        self.keys = {name: Ed25519PrivateKey.generate() for name in NAMES}
        for name, value in VALUES.items():
            self.process(name).keep(ASSIGNMENT, MODEL, a_delta(value))

    def file(self, name: str) -> Path:
        return self.memory / name

    def process(self, name: str) -> Participant:
        at = self.folder / name
        return Participant(
            name,
            self.keys[name],
            InFile(at / "given" / "toy-1"),
            saved=InFrame(at / "kept" / "toy-1"),
            between=InMemoryFile(self.file(name)),
            clock=self.clock,
        )

    def invite(self, instance: str = "ab" * 32) -> Invite:
        return invite_of(ASSIGNMENT, {n: self.process(n) for n in NAMES}, MODEL, instance)

    def answer(self, name: str, request: Request) -> Answer:
        return self.process(name).answer(ASSIGNMENT, request, NO_LIMITS, vector_of)
