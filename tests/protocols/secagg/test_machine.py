"""Any order, loss, duplication and replay of messages: an exact sum or none, and nothing opened.

Hypothesis plays the network, and the stages' deadlines. After every message to a member or to the
coordinator it holds that

- what was refused has changed nothing (all state is compared, all the way down);
- the same request again gets the same answer, byte for byte;
- of nobody the shares of both secrets were ever sent by as many as are needed to combine them;
- no share of a survivor's masking key was sent, and none of a dropped member's seed.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.secagg.member import Answer, Member
from anabranch.protocols.secagg.messages import STAGES, Invite, Request, Reveal
from tests.protocols.secagg.rig import Cohort, integers, key_of, plain_sum, random_of, snapshot

Letter = tuple[str, Any]  # to whom or from whom, and what


class Network(RuleBasedStateMachine):
    """Letters to members and to the coordinator, of this sum and of another one."""

    @initialize(
        n=st.sampled_from([5, 6, 7, 3, 2]), share=st.sampled_from([0.5, 0.6]), grouped=st.booleans()
    )
    def begin(self, n: int, share: float, grouped: bool) -> None:
        group = 3 if grouped and n == 6 else None
        self.cohort = Cohort.of(n, threshold=share, values=2, group=group)
        other = Cohort.of(n, threshold=share, values=2, group=group, instance="f1" * 32)
        other.random = lambda name: random_of(f"other {name}")
        self.strange: list[Letter] = []
        self.strange_answers: list[tuple[str, Answer]] = []
        other.asking = lambda name, one: self.strange.append((name, one)) or one  # type: ignore[func-returns-value]
        other.answering = lambda name, one: self.strange_answers.append((name, one)) or one  # type: ignore[func-returns-value]
        other.run()
        self.requests: list[tuple[str, Request]] = []
        self.answers: list[tuple[str, Answer]] = []
        self.first: dict[tuple[str, int], Answer] = {}
        self.survivors: set[str] = set()
        self._send_all()

    def _send_all(self) -> None:
        self.requests += self.cohort.aggregation.requests().items()

    def _ask(self, name: str, request: Request) -> None:
        """Deliver a request; check that a refusal changes nothing, a repetition likewise."""
        members, place = self.cohort.members, (name, hash(msgspec.json.encode(request)))
        if isinstance(request, Invite):
            if name not in members and request.terms == self.cohort.terms:
                members[name] = Member(name, key_of(name), request, random=random_of(name))
                self.answers.append((name, Answer(members[name].advert)))
            return
        if name not in members:
            return
        before = snapshot(members[name])
        try:
            answer = members[name].answer(request, self.cohort.vectors[name].copy)
        except ProtocolError:
            assert snapshot(members[name]) == before
            return
        if place in self.first:
            assert answer == self.first[place]
            assert snapshot(members[name]) == before
        else:
            self.first[place] = answer
            self.cohort.seen.note(name, answer)
        self.answers.append((name, answer))

    def _take(self, name: str, answer: Answer) -> None:
        aggregation = self.cohort.aggregation
        before = snapshot(aggregation)
        waiting = aggregation.waiting()
        try:
            aggregation.take(name, answer.reply, answer.data)
        except ProtocolError:
            assert snapshot(aggregation) == before
            assert aggregation.waiting() == waiting
        else:
            assert aggregation.waiting() == waiting - {name}

    @rule(data=st.data())
    def deliver_a_request(self, data: st.DataObject) -> None:
        """Any that was ever made: in any order, late, twice."""
        self._ask(*data.draw(st.sampled_from(self.requests)))

    @rule()
    def deliver_all_requests(self) -> None:
        for name, request in self.cohort.aggregation.requests().items():
            self._ask(name, request)

    @rule(data=st.data())
    def deliver_a_request_to_somebody_else(self, data: st.DataObject) -> None:
        _, request = data.draw(st.sampled_from(self.requests))
        self._ask(data.draw(st.sampled_from(self.cohort.terms.members)), request)

    @rule(data=st.data())
    def deliver_a_request_of_another_sum(self, data: st.DataObject) -> None:
        name, request = data.draw(st.sampled_from(self.strange))
        known = self.cohort.members.get(name)
        before = None if known is None else snapshot(known)
        self._ask(name, request)
        if known is not None:
            assert snapshot(known) == before

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def deliver_an_answer(self, data: st.DataObject) -> None:
        """Any that was ever given; those of earlier stages, and second ones, are refused."""
        self._take(*data.draw(st.sampled_from(self.answers)))

    @rule()
    def deliver_all_answers(self) -> None:
        for name, answer in list(self.answers):
            self._take(name, answer)

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def deliver_an_answer_in_somebody_elses_name(self, data: st.DataObject) -> None:
        name, answer = data.draw(st.sampled_from(self.answers))
        names = [one for one in (*self.cohort.terms.members, "eve") if one != name]
        other = data.draw(st.sampled_from(names))
        if type(answer.reply).__name__ in ("Masked", "Shares", "Reveal"):
            return  # the channel says whose they are: what it says is true
        before = snapshot(self.cohort.aggregation)
        self._take(other, answer)
        assert snapshot(self.cohort.aggregation) == before

    @rule(data=st.data())
    def deliver_an_answer_of_another_sum(self, data: st.DataObject) -> None:
        before = snapshot(self.cohort.aggregation)
        self._take(*data.draw(st.sampled_from(self.strange_answers)))
        assert snapshot(self.cohort.aggregation) == before

    @rule(data=st.data())
    def play_a_stage(self, data: st.DataObject) -> None:
        """All but one get their requests, and all but one of the answers arrive, or all do."""
        names = (*(["nobody"] * 20), *self.cohort.terms.members)
        unasked, unheard = (data.draw(st.sampled_from(names)) for _ in range(2))
        for name, request in self.cohort.aggregation.requests().items():
            if name != unasked:
                self._ask(name, request)
        for name, answer in list(self.answers):
            if name != unheard:
                self._take(name, answer)
        self.close_the_stage()

    @rule(data=st.data())
    def time_runs_out(self, data: st.DataObject) -> None:
        """Mostly when few are missing: else every sum would be given up early."""
        aggregation = self.cohort.aggregation
        late = len(aggregation.waiting()) > len(aggregation.terms.members) / 3
        if not late or data.draw(st.integers(0, 39)) == 39:
            self.close_the_stage()

    def close_the_stage(self) -> None:
        aggregation = self.cohort.aggregation
        if aggregation.stage not in STAGES:
            before = snapshot(aggregation)
            with pytest.raises(ProtocolError, match="the sum is over"):
                aggregation.close()
            assert snapshot(aggregation) == before
            return
        aggregation.close()
        self._send_all()
        if aggregation.stage == "agree":
            self.survivors = {name for part in aggregation._parts for name in part.survivors}

    @invariant()
    def nothing_can_be_opened_that_should_not(self) -> None:
        if not hasattr(self, "cohort"):
            return
        seen = self.cohort.seen
        if seen.reveals:
            plan = self.cohort.aggregation._planned
            seen.require_apart(
                {name: group.shape.threshold for group in plan.groups for name in group.names}
            )
        for _, reveal in seen.reveals:
            assert isinstance(reveal, Reveal)
            assert reveal.seeds.keys() <= self.survivors
            assert not reveal.keys.keys() & self.survivors

    @invariant()
    def a_sum_is_exact_and_an_aborted_one_says_why(self) -> None:
        if not hasattr(self, "cohort"):
            return
        aggregation, bits = self.cohort.aggregation, self.cohort.terms.ring
        assert (aggregation.stage == "done") == bool(aggregation.sums)
        assert (aggregation.stage == "aborted") == bool(aggregation.reason)
        for one in aggregation.sums:
            expected = plain_sum(self.cohort.vectors, one.members, bits)
            assert integers(one.total, bits) == expected


TestNetwork = Network.TestCase
TestNetwork.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_a_snapshot_tells_any_change_of_state() -> None:
    """What compares equal after a refusal is all there is, arrays and secrets too."""
    cohort = Cohort.of(3)
    cohort.until("agree")
    member, aggregation = cohort.members["site-0000"], cohort.aggregation
    for machine, change in (
        (member, lambda: member._own.held.pop("site-0001")),
        (member, lambda: setattr(member._own, "seed", bytes(32))),
        (member, lambda: setattr(member, "_next", "mask")),
        (aggregation, lambda: aggregation._parts[0].total.__setitem__(0, 7)),
        (aggregation, lambda: aggregation._signed.update({"site-0001": "00"})),
    ):
        before = snapshot(machine)
        assert snapshot(machine) == before
        change()
        assert snapshot(machine) != before
