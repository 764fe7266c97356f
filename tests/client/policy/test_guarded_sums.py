"""Secure sums behind a policy: every stage is decided on, counted, and told to the site's owner."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from anabranch.client.flower import NO_LIMITS, SummingSite, peer_key_of
from anabranch.client.policy.guard import GuardedSite
from anabranch.client.policy.rules import NotAllowed
from anabranch.client.policy.usage import UsageBook
from anabranch.protocols import messages
from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.secagg.member import Answer, Limits
from anabranch.protocols.secagg.messages import Delivery, Invite, Masked, Request
from anabranch.protocols.secagg.terms import Roster, Terms
from tests.client.policy.joined_site import Home, make_home, public
from tests.client.policy.policies import HERE, Clock, assignment_of
from tests.simulations.rig import ToySite

MASKED = Answer(Masked(instance="ab" * 32), bytes(1000))


@dataclass
class Answering(ToySite):
    """A site that answers every stage, and notes with which floors it was asked."""

    floors: list[Limits] = field(default_factory=list)

    def peer_key(self, run: str, config: object) -> str | None:
        return "ab" * 32

    def secure(
        self, assignment: Assignment, request: Request, limits: Limits = NO_LIMITS
    ) -> Answer:
        self.floors.append(limits)
        return MASKED


@dataclass
class Ward:
    """A guarded site that has joined, and an approved run of it and two others."""

    home: Home
    site: ToySite

    def __post_init__(self) -> None:
        self.roster = self.home.roster("b", "c")
        signed = self.home.approved(self.roster)
        self.assignment = assignment_of(self.home.config, signed)
        self.guard = GuardedSite(
            self.home.folder, self.site, audit=self.home.log, clock=Clock(), here=HERE
        )

    def invite(self, roster: Roster | None = None) -> Invite:
        roster = roster or self.roster
        terms = Terms(
            run="run-1", round=1, instance="ab" * 32, config="ab" * 32, model="ab" * 32,
            roster=roster.digest, members=("a", "b", "c"), minimum=3, threshold=0.5, colluding=0.0,
            ring=24, limit=4.0, weight=1024, values=4, counters=3, keystream="chacha20",
        )  # fmt: skip
        return Invite(terms=terms, roster=roster)


DELIVERY = Delivery(instance="ab" * 32, sealed={})


@pytest.fixture
def ward(tmp_path: Path) -> Ward:
    return Ward(make_home(tmp_path / "site"), Answering("a"))


def test_a_stage_is_answered_counted_and_told(ward: Ward) -> None:
    assert ward.guard.secure(ward.assignment, ward.invite()) == MASKED
    assert ward.guard.secure(ward.assignment, DELIVERY) == MASKED

    used = UsageBook(ward.home.folder).read("run-1").round(1)
    reply = len(messages.encode(MASKED.reply))
    asked = len(messages.encode(ward.invite())) + len(messages.encode(DELIVERY))
    assert (used.down, used.up) == (asked, 2 * (1000 + reply))
    told = [fields for kind, fields in ward.home.log.lines if kind == "update-masked"]
    assert [one["round"] for one in told] == [1, 1]
    assert ward.home.pins() == {"b": public("b"), "c": public("c")}


def test_the_owners_floors_go_along(ward: Ward) -> None:
    ward.home.policy(cohort={"minimum": 3, "threshold": 0.6})

    ward.guard.secure(ward.assignment, ward.invite())
    ward.guard.secure(ward.assignment, ward.invite(), Limits(minimum=7, threshold=0.5))

    assert isinstance(ward.site, Answering)
    assert ward.site.floors == [
        Limits(minimum=3, threshold=0.6),
        Limits(minimum=7, threshold=0.6),
    ]


def test_a_roster_that_nobody_signed_reaches_no_site(ward: Ward) -> None:
    other = ward.home.roster("b", "d")

    with pytest.raises(NotAllowed):
        ward.guard.secure(ward.assignment, ward.invite(other))

    assert isinstance(ward.site, Answering)
    assert ward.site.floors == []
    assert ward.home.pins() == {}


def test_an_unsigned_stage_is_refused(ward: Ward) -> None:
    bare = msgspec.structs.replace(ward.assignment, signed=None)

    with pytest.raises(NotAllowed, match="no signed proposal"):
        ward.guard.secure(bare, DELIVERY)


def test_a_masked_vector_beyond_the_owners_limit_stays(ward: Ward) -> None:
    ward.home.policy(limits={"max_mb_up_per_round": 0.0005})

    with pytest.raises(NotAllowed) as caught:
        ward.guard.secure(ward.assignment, DELIVERY)

    assert caught.value.code == "bytes"


def test_a_site_that_sums_nothing_says_so(tmp_path: Path) -> None:
    ward = Ward(make_home(tmp_path / "site"), ToySite("a"))

    assert isinstance(ward.guard, SummingSite)
    assert peer_key_of(ward.guard, "run-1", ward.home.config) is None
    with pytest.raises(ProtocolError, match="takes part in no secure sums"):
        ward.guard.secure(ward.assignment, DELIVERY)
