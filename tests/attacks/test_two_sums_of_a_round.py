"""Attack: a coordinator that everybody but one helps gets one update into two sums of its round.

The victim is asked in any order: of several attempts at once, with its round trained again in
between, from the same adapter or another one, and its process killed at any time. All others
answer whatever they are asked, and can open any sum that the victim's masked vector is in. Two of
one round would show its update by a difference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.flower import NO_LIMITS
from anabranch.client.sums.given import InFile
from anabranch.client.sums.participant import Participant
from anabranch.client.sums.terms import digest_of, vector_of
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.member import Member
from anabranch.protocols.secagg.messages import STAGES, Invite
from tests.client.sums.summing_sites import RUN, a_delta, participants, terms_of
from tests.secure_cases import Disk
from tests.simulations.rig import adapter

VICTIM, MODELS = "cork", (adapter(0.5), adapter(0.25))
TOLD = Assignment(run="toy-1", round=1, config=RUN)


class Attempt:
    """One sum of the round, whose other members do as the coordinator likes."""

    def __init__(self, world: World, number: int, model: Adapter) -> None:
        base = terms_of(world.everybody, f"{number:064x}")
        terms = msgspec.structs.replace(base.terms, model=digest_of(model))
        self.world, self.invite = world, Invite(terms=terms, roster=base.roster)
        self.aggregation = Aggregation(terms, base.roster)
        self.helpers = {
            name: Member(name, one._key, self.invite)
            for name, one in world.everybody.items()
            if name != VICTIM
        }

    def go_on(self) -> bool:
        """Ask everybody the present stage; return whether the victim's masked vector has left."""
        stage = self.aggregation.stage
        if stage not in STAGES:
            return False
        requests = self.aggregation.requests()
        try:
            got = self.world.victim.answer(TOLD, requests[VICTIM], NO_LIMITS, vector_of)
        except ProtocolError:
            return False
        self.aggregation.take(VICTIM, got.reply, got.data)
        for name, one in self.helpers.items():
            answered = one.answer(requests[name], lambda: self.world.vector(self.invite))
            self.aggregation.take(name, answered.reply, answered.data)
        self.aggregation.close()
        return stage == "mask"


class World:
    def __init__(self, folder: Path) -> None:
        self.everybody = participants()
        self.path, self.disk = folder / "toy-1", Disk()
        self.restart()
        self.keep(0)

    def restart(self) -> None:
        key = self.everybody[VICTIM]._key
        self.victim = Participant(VICTIM, key, InFile(self.path), None, self.disk)

    def keep(self, model: int) -> None:
        self.victim.keep(TOLD, MODELS[model], a_delta(0.25 * model))
        kept = self.victim.kept
        if kept is not None:
            self.disk.held = kept

    def vector(self, invite: Invite) -> Any:
        return vector_of(a_delta(), TOLD, invite.terms, 4)


ACTIONS = st.one_of(
    st.tuples(st.just("go on"), st.integers(0, 3), st.sampled_from([1, 2, 4, 5, 5])),
    st.tuples(st.just("keep"), st.integers(0, 1), st.just(1)),
    st.tuples(st.sampled_from(["restart", "drop"]), st.just(0), st.just(1)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, min_size=8, max_size=30))
def test_one_sum_of_a_round_has_the_update_in_whatever_order(
    actions: list[tuple[str, int, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        attempts = [Attempt(world, number, MODELS[number % 2]) for number in range(4)]
        given: set[int] = set()
        do: dict[str, Callable[[int], object]] = {
            "keep": world.keep,
            "restart": lambda _: world.restart(),
            "drop": lambda _: world.victim.drop(),
        }
        for what, number, times in actions:
            if what != "go on":
                do[what](number)
            elif any(attempts[number].go_on() for _ in range(times)):
                given.add(number)
        assert len(given) <= 1


def test_left_alone_a_sum_comes_to_its_end() -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        first, second = Attempt(world, 0, MODELS[0]), Attempt(world, 2, MODELS[0])
        assert [first.go_on() for _ in STAGES] == [False, False, True, False, False]
        world.keep(0)
        assert not any(second.go_on() for _ in STAGES)
        assert first.aggregation.stage == "done"
        assert second.aggregation.stage == "advertise"
