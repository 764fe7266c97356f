"""Members of secure sums of one round, with deltas that they keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.flower import NO_LIMITS
from anabranch.client.sums.participant import InMemory, Participant
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


def a_delta(value: float = 0.5, num_examples: int = 10) -> Delta:
    return Delta(SPEC, adapter(value).arrays, num_examples, steps=3)


def participants(opened: Callable[[], Any] = InMemory) -> dict[str, Participant]:
    return {name: Participant(name, Ed25519PrivateKey.generate(), opened()) for name in NAMES}


def terms_of(members: dict[str, Participant], instance: str = "ab" * 32, **changes: Any) -> Invite:
    return invite_of(ASSIGNMENT, members, MODEL, instance, **changes)


def summed_up(members: dict[str, Participant], invite: Invite, until: str = "done") -> Aggregation:
    """Carry a sum as far as the stage `until`."""

    def answer(name: str, request: Request) -> Answer:
        return members[name].answer(ASSIGNMENT, request, NO_LIMITS, vector_of)

    return carried(invite, answer, until)


def kept(opened: Callable[[], Any] = InMemory) -> dict[str, Participant]:
    members = participants(opened)
    for i, one in enumerate(members.values()):
        one.keep(ASSIGNMENT, MODEL, a_delta(0.25 * i))
    return members
