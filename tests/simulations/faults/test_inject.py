"""What each fault does to a run; that it does so on every engine and in every order."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.flower import (
    pack_assignment,
    pack_refused,
)
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.messages import Assignment, Refused, Trained
from anabranch.protocols.tables import Uplink
from anabranch.simulations.faults.drawing import Rates, draw
from anabranch.simulations.faults.inject import (
    FaultyJourneys,
    FaultyMessages,
    Struck,
)
from anabranch.simulations.faults.plan import (
    ClockSkew,
    Corrupt,
    Crash,
    Duplicate,
    Fault,
    FaultPlan,
    Late,
    LostAnswer,
    LostRequest,
    Scale,
    SignFlip,
)
from anabranch.simulations.virtual_grid import FIRST_NODE, VirtualGrid
from tests.simulations.faults.faulty import (
    Ran,
    Steady,
    executor,
    expected_value,
    run_faulty,
    toys,
)
from tests.simulations.rig import ToySite, adapter, config

ROUND = config(rounds=1, method="fedavg", weighting="uniform", client_evaluation=False)
TWO = config(rounds=2, method="fedavg", weighting="uniform", client_evaluation=False)
STEPS = {site.name: float(site.step or 0) for site in toys()}
MESSAGES = Rates(
    lost_request=0.1,
    lost_answer=0.1,
    duplicate=0.2,
    late=0.2,
    late_s=40.0,
    corrupt=0.2,
    crash=0.1,
    clock_skew=0.3,
    sign_flip=0.2,
    scale=0.2,
)


def story(ran: Ran) -> Any:
    """Return all that a run came to, but for real time."""
    if ran.result is None:
        return str(ran.error)
    return ran.bytes(), [
        (r.asked, dict(r.trained), dict(r.failed), dict(r.evaluated)) for r in ran.result.history
    ]


def value(ran: Ran) -> float:
    return float(ran.done.adapter.arrays["head.weight"][0, 0])


def failures(ran: Ran) -> dict[str, str]:
    return {event["site"]: event["reason"] for event in ran.events.of("site_failed")}


# Laws


@settings(max_examples=25)
@given(seed=st.integers(0, 2**20), ahead=st.sampled_from([None, 1, 3]))
def test_faults_do_not_depend_on_engine_or_order(seed: int, ahead: int | None) -> None:
    run = config(rounds=3, method="fedavg", cohort=3, deadline_s=60.0)
    plan = draw(MESSAGES, seed=seed, clients=4, rounds=3)
    expected = story(run_faulty(plan, run=run, journeys=Steady(4)))

    for kind in ("cohort", "backwards"):
        ran = run_faulty(plan, run=run, journeys=Steady(4), kind=kind, ahead=ahead)
        assert story(ran) == expected


# Each kind, by itself


def test_without_faults_everybody_counts() -> None:
    assert value(run_faulty(run=ROUND)) == pytest.approx(15 / 4)


@pytest.mark.parametrize(
    "fault",
    [
        LostRequest(client=1, round=1),
        LostAnswer(client=1, round=1),
        Crash(client=1, round=1),
        Late(client=1, round=1, seconds=100.0),
    ],
)
def test_an_answer_that_is_not_there_in_time_is_missed(fault: Fault) -> None:
    ran = run_faulty([fault], run=ROUND)

    assert failures(ran) == {"toy-1": "deadline"}
    assert value(ran) == pytest.approx(13 / 3)


@pytest.mark.parametrize(
    ("fault", "trained"),
    [
        (LostRequest(client=1, round=1), 0),
        (LostAnswer(client=1, round=1), 1),
        (Duplicate(client=1, round=1, of="request"), 2),
        (Duplicate(client=1, round=1, of="answer"), 1),
    ],
)
def test_who_is_not_asked_does_not_train_and_who_is_asked_twice_does_so_twice(
    fault: Fault, trained: int
) -> None:
    sites = [Counting(site.name, site.num_examples, site.step) for site in toys()]

    run_faulty([fault], run=ROUND, sites=sites)

    assert [site.rounds for site in sites] == [1, trained, 1, 1]


@pytest.mark.parametrize("of", ["request", "answer"])
def test_a_duplicate_is_counted_once(of: Any) -> None:
    ran = run_faulty([Duplicate(client=3, round=1, of=of)], run=ROUND)

    assert value(ran) == pytest.approx(15 / 4)
    assert ran.done.sites["toy-3"].rounds == 1
    assert failures(ran) == {}


def test_a_late_answer_arrives_later_and_counts_if_it_is_in_time() -> None:
    ran = run_faulty([Late(client=1, round=1, seconds=40.0)], run=ROUND)

    assert value(ran) == pytest.approx(15 / 4)
    assert ran.grid is not None
    assert ran.grid.clock() == 40.0


def test_a_late_answer_is_dropped_and_its_site_asked_again() -> None:
    fault = Late(client=1, round=1, seconds=41.0)

    ran = run_faulty([fault], run=TWO, journeys=Steady(4, 20.0))

    assert [event["site"] for event in ran.events.of("site_late")] == ["toy-1"]
    assert value(ran) == pytest.approx(expected_value(ran.done, STEPS), rel=1e-6)


def test_a_site_whose_message_was_lost_is_asked_again_when_flower_gives_the_message_up() -> None:
    run = config(rounds=5, method="fedavg", deadline_s=30000.0, client_evaluation=False)

    ran = run_faulty([LostRequest(client=1, round=1)], run=run, journeys=Steady(4, 10000.0))

    asked = ["toy-1" in report.asked for report in ran.done.history]
    assert asked[:2] == [True, False]
    assert asked[-1]


def test_a_site_that_never_got_the_first_question_takes_no_part() -> None:
    ran = run_faulty([LostRequest(client=1, round=0, asked="describe")], run=ROUND, connect_s=30.0)

    assert ran.done.history[0].asked == ("toy-0", "toy-2", "toy-3")
    assert value(ran) == pytest.approx(13 / 3)


@pytest.mark.parametrize("part", ["frame", "json"])
@pytest.mark.parametrize("how", ["cut", "garbage"])
@pytest.mark.parametrize(("of", "reason"), [("answer", "rejected"), ("request", "protocol")])
def test_a_corrupt_message_is_rejected(part: Any, how: Any, of: Any, reason: str) -> None:
    ran = run_faulty([Corrupt(client=1, round=1, of=of, part=part, how=how)], run=ROUND)

    assert failures(ran) == {"toy-1": reason}
    assert value(ran) == pytest.approx(13 / 3)


def test_a_corrupt_request_reaches_its_client_alone() -> None:
    ran = run_faulty([Corrupt(client=0, round=1, of="request")], run=ROUND, kind="cohort")

    assert failures(ran) == {"toy-0": "protocol"}
    assert value(ran) == pytest.approx(14 / 3)


def test_a_sign_flip_takes_away_what_the_client_learned() -> None:
    assert value(run_faulty([SignFlip(client=3)], run=ROUND)) == pytest.approx((1 + 2 + 4 - 8) / 4)
    assert value(run_faulty([SignFlip(client=3, factor=2.0)], run=ROUND)) == pytest.approx(-9 / 4)


def test_a_scaled_update_counts_for_more_and_a_liar_may_lie_in_one_round_only() -> None:
    ran = run_faulty([Scale(client=0, round=2, factor=100.0)], run=TWO)

    assert value(ran) == pytest.approx(15 / 4 + 114 / 4)


def test_a_lie_keeps_the_codec_of_the_run() -> None:
    run = config(rounds=1, method="ffa", weighting="uniform", client_evaluation=False)
    run = msgspec.structs.replace(run, uplink=Uplink(codec="fp16"))

    ran = run_faulty([SignFlip(client=3)], run=run)

    assert failures(ran) == {}
    assert value(ran) == pytest.approx(-1 / 4)


def test_a_wrong_clock_changes_what_is_said_of_time_and_nothing_else() -> None:
    plain = run_faulty(run=ROUND)

    ran = run_faulty(
        [ClockSkew(client=1, seconds=300.0), ClockSkew(client=2, seconds=-300.0)], run=ROUND
    )

    assert ran.bytes() == plain.bytes()
    assert [row.seconds for row in ran.done.sites.values()] == [0.5, 300.5, 0.0, 0.5]


def test_a_fault_strikes_its_kind_of_question_alone() -> None:
    run = config(rounds=1, method="fedavg")

    ran = run_faulty([LostAnswer(client=1, round=1, asked="evaluate")], run=run)

    (report,) = ran.done.history
    assert len(report.trained) == 4
    assert sorted(report.evaluated) == ["toy-0", "toy-2", "toy-3"]


def test_messages_of_other_types_are_left_alone() -> None:
    identify_run()
    message = Message(pack_refused(Refused(site="x", reason="data", message="-")), 1001, "query.x")

    assert Struck(FaultPlan(faults=(LostRequest(client=0, round=0),))).at(0, message) == ()


# The Grid: what is lost comes back as Flower's error


def test_a_lost_message_comes_back_when_its_time_to_live_is_over() -> None:
    struck = Struck(FaultPlan(faults=(LostAnswer(client=1, round=1),)))
    grid = VirtualGrid(
        executor(toys()),
        4,
        journeys=FaultyJourneys(None, struck, 4),
        tampering=FaultyMessages(struck),
    )
    messages = [train_message(grid, FIRST_NODE + i) for i in range(4)]

    replies = grid.send_and_receive(messages, timeout=10.0)
    assert len(replies) == 3
    assert grid.clock() == 10.0
    grid.sleep(math.inf)
    (error,) = grid.pull_messages([m.metadata.message_id for m in messages])

    assert error.has_error()
    assert error.metadata.reply_to_message_id == messages[1].metadata.message_id
    assert grid.clock() == messages[1].metadata.ttl


def test_a_wait_without_end_ends_with_the_message() -> None:
    struck = Struck(FaultPlan(faults=(LostRequest(client=0, round=1),)))
    grid = VirtualGrid(executor(toys()), 4, journeys=FaultyJourneys(None, struck, 4))

    (reply,) = grid.send_and_receive([train_message(grid, FIRST_NODE)])

    assert reply.has_error()


class Counting(ToySite):
    """Counts how often it trained."""

    rounds = 0

    def train(self, assignment: Assignment, before: Adapter) -> tuple[Trained, bytes]:
        self.rounds += 1
        return super().train(assignment, before)


def identify_run() -> None:
    VirtualGrid(executor(toys()), 4)  # a Message cannot be made without a run


def train_message(grid: VirtualGrid, node: int) -> Message:
    content = pack_assignment(
        Assignment(run="toy-1", round=1, config=ROUND), wire.encode(adapter())
    )
    return Message(content, node, "train", group_id="1")
