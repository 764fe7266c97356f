"""Attack: a sum is asked for under one question, and its later stages under another.

The coordinator words every message of a sum, each with the assignment that it is about. A site
that took the words of the last one would make its vector without noise, or of another round.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.flower import NO_LIMITS
from anabranch.client.sums.given import InMemory
from anabranch.client.sums.participant import Participant
from anabranch.client.sums.terms import digest_of, vector_of
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.part import Part
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.messages import STAGES, Request
from anabranch.protocols.secagg.terms import Peer, Roster
from tests.noise_cases import RECORD, assignment, config, terms
from tests.simulations.rig import SPEC, adapter

NAMES = ("aarhus", "bergen", "cork", "delft", "esbjerg")
NOISED, PLAIN = config(RECORD), config(RECORD, privacy__noise="local")
TOLD = assignment(NOISED)
MODEL = adapter(0.5)


class Sums:
    """Five sites that keep an update each, and a coordinator that words its questions freely."""

    def __init__(self, told: Assignment = TOLD) -> None:
        self.sites = {
            name: Participant(name, Ed25519PrivateKey.generate(), InMemory()) for name in NAMES
        }
        for one in self.sites.values():
            arrays = {n: np.full(shape, 0.01, np.float32) for n, shape in SPEC.tensors}
            one.keep(told, MODEL, Delta(SPEC, arrays, 300, steps=1))
        roster = Roster.of(Peer(name=n, key=one.public_key) for n, one in self.sites.items())
        agreed = terms(told.config, members=5, roster=roster.digest, model=digest_of(MODEL))
        self.terms = msgspec.structs.replace(agreed, members=NAMES)
        self.aggregation = Aggregation(self.terms, roster)

    def until(self, stage: str) -> dict[str, Request]:
        """Carry the sum honestly up to a stage, and return what is asked there."""
        while self.aggregation.stage != stage:
            for name, request in self.aggregation.requests().items():
                got = self.answer(name, TOLD, request)
                self.aggregation.take(name, got.reply, got.data)
            self.aggregation.close()
        return self.aggregation.requests()

    def answer(self, name: str, told: Assignment, request: Request) -> Any:
        return self.sites[name].answer(told, request, NO_LIMITS, vector_of)


OTHERS = {
    "without the noise": msgspec.structs.replace(TOLD, config=PLAIN),
    "another part": msgspec.structs.replace(TOLD, part=Part(factors="B")),
    "another run": msgspec.structs.replace(TOLD, run="sums-2"),
    "another round": msgspec.structs.replace(TOLD, round=2),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("other", OTHERS)
def test_no_stage_is_answered_under_another_question(stage: str, other: str) -> None:
    sums = Sums()
    request = sums.until(stage)["cork"]

    with pytest.raises(ProtocolError):
        sums.answer("cork", OTHERS[other], request)

    assert sums.answer("cork", TOLD, request)  # nothing has changed
