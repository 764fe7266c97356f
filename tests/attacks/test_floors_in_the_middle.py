"""Attack: floors are read at the invitation alone, and a sum below what they are now is opened.

An owner who raises `minimum` has the coordinator's sums of fewer in mind, also of the one that is
under way: a coordinator that is slow would have as long as it likes.

(Devices: tests/edge/gateway/test_secure_lies.py.)

Why it fails: every stage is held to the floors as they are when it is asked. Who refuses has
dropped out, and nothing of the stage has been done.
"""

from __future__ import annotations

import pytest

from anabranch.client.flower import NO_LIMITS
from anabranch.client.sums.terms import vector_of
from anabranch.protocols.errors import PolicyError
from anabranch.protocols.secagg.member import Answer, Limits
from anabranch.protocols.secagg.messages import STAGES, Request, Stage
from tests.client.sums.summing_sites import ASSIGNMENT, NAMES, kept, terms_of
from tests.secure_cases import carried

RAISED = {
    "minimum": (Limits(minimum=20), "takes part in sums of 20 or more"),
    "threshold": (Limits(threshold=0.9), "asks for 0.9"),
    "colluding": (Limits(colluding=0.3), "asks for 0.3"),
}


@pytest.mark.parametrize("floor", RAISED)
@pytest.mark.parametrize("stage", STAGES)
def test_a_site_answers_no_stage_of_a_sum_below_its_floors(stage: Stage, floor: str) -> None:
    members = kept()
    limits, words = RAISED[floor]
    refused: dict[str, str] = {}

    def answer(name: str, request: Request) -> Answer | None:
        now = limits if STAGES.index(request.stage) >= STAGES.index(stage) else NO_LIMITS
        try:
            return members[name].answer(ASSIGNMENT, request, now, vector_of)
        except PolicyError as error:
            refused[name] = str(error)
            return None

    aggregation = carried(terms_of(members), answer)

    assert refused.keys() == set(NAMES)
    assert all(words in text for text in refused.values())
    assert (aggregation.stage, aggregation.sums) == ("aborted", ())
    given = all(one._given.read() for one in members.values())
    assert given is (stage in STAGES[3:])  # before that nothing has left


def test_not_even_what_was_answered_is_said_again() -> None:
    members = kept()

    def answering(name: str, request: Request) -> Answer:
        return members[name].answer(ASSIGNMENT, request, NO_LIMITS, vector_of)

    aggregation = carried(terms_of(members), answering, "mask")
    name, request = next(iter(aggregation.requests().items()))
    answer = answering(name, request)

    with pytest.raises(PolicyError, match="takes part in sums of 20 or more"):
        members[name].answer(ASSIGNMENT, request, Limits(minimum=20), vector_of)

    assert answering(name, request) == answer  # lowered again, it goes on


def test_floors_that_are_lowered_count_too() -> None:
    members = kept()
    strict, loose = Limits(minimum=3), Limits(minimum=2)

    def answer(name: str, request: Request) -> Answer | None:
        if request.stage == "mask" and name == NAMES[3]:
            return None
        limits = strict if request.stage == "advertise" else loose
        return members[name].answer(ASSIGNMENT, request, limits, vector_of)

    assert carried(terms_of(members), answer).stage == "done"
