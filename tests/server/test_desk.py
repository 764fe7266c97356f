"""Whose node it is, who is waited for and for how long, and what a site's owner still has to do."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.policy.rules import NotAllowed
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError, PolicyError, RunError
from anabranch.protocols.identity.proposal import Proposal, Signed, contract_digest, sign
from anabranch.protocols.messages import Assignment, Trained
from anabranch.server.desk import Asked, Wait
from anabranch.server.flower import Failure
from anabranch.server.roster import MEND_S, awaits_approval, passes
from tests.server.stations import EPOCH, FIRST, Watched
from tests.simulations.rig import ToySite, config


def run_of(**federation: Any) -> RunConfig:
    return config(**{"rounds": 1, "weighting": "uniform", "client_evaluation": False, **federation})


# Names


def test_a_node_that_is_not_on_the_roster_is_asked_nothing() -> None:
    watched = Watched({"a": [], "b": []}, run=run_of())
    del watched.roster[FIRST + 1]
    result = watched.run()

    assert result.history[0].asked == ("a",)
    assert {site for _, site, _ in watched.grid.sent} == {"a"}
    (refused,) = watched.events.of("node_refused")
    assert (refused["node"], refused["reason"]) == (FIRST + 1, "roster")
    assert "is not on the coordinator's roster" in refused["message"]


def test_a_node_cannot_take_another_sites_name() -> None:
    watched = Watched({"a": [], "b": []}, run=run_of())
    watched.roster[FIRST + 1] = "c"
    result = watched.run()

    assert result.history[0].asked == ("a",)
    (refused,) = watched.events.of("node_refused")
    assert refused["message"] == (
        "it calls itself 'b', and its key is that of 'c': a site keeps the name that it was "
        "invited with"
    )


def test_two_nodes_of_one_name_are_one_site_where_there_is_a_roster() -> None:
    """A site that joined anew has another key: the old node is nobody's any more."""
    sites = [ToySite("a", step=1.0), ToySite("a", step=4.0)]
    watched = Watched({}, sites=sites, run=run_of())
    watched.roster.clear()
    watched.roster[FIRST + 1] = "a"

    result = watched.run()

    assert result.history[0].asked == ("a",)
    assert watched.value(result) == 4.0


def test_a_site_that_is_struck_off_the_roster_is_waited_for_no_longer() -> None:
    watched = Watched({"a": [("answer", 9.0)], "b": [("dead", 0.0)]}, run=run_of(rounds=2))
    wake = watched.time.sleep

    def sleep(seconds: float) -> None:
        wake(seconds)
        if watched.time.now >= 20:
            watched.roster.pop(FIRST + 1, None)

    watched.time.sleep = sleep  # type: ignore[method-assign]
    result = watched.run()

    assert result.history[0].failed["b"].reason == "roster"
    assert result.history[1].asked == ("a",)
    assert watched.time.now <= 30


def test_what_a_site_sends_after_it_was_struck_off_is_dropped() -> None:
    watched = Watched({"a": [], "b": [("answer", 20.0)]}, run=run_of())
    listed = watched.roster.get
    watched.engine._exchange.roster._name_of = lambda node: (
        None if node == FIRST + 1 and watched.time.now >= 20.0 else listed(node)
    )
    result = watched.run()

    assert watched.value(result) == 1.0
    assert result.history[0].failed["b"].reason == "roster"


def test_without_a_roster_a_node_is_who_it_says_it_is() -> None:
    watched = Watched({"a": [], "b": []}, run=run_of(), names=False)
    watched.roster.clear()

    assert watched.run().history[0].asked == ("a", "b")


# Approval


class Careful(ToySite):
    """Its owner approves the run at a time."""

    approved_at: float = 0.0
    clock: Any = None
    asked: int = 0
    signed: Signed | None = None

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        self.asked += 1
        self.signed = signed
        if self.clock() < self.approved_at:
            raise NotAllowed(
                "pending", "waiting for the owner: `anabranch site policy approve 0123456789ab`"
            )


def careful(approved_at: float, *others: str, **engine: Any) -> tuple[Watched, Careful]:
    site = Careful("b", 10, step=4.0)
    site.approved_at = approved_at
    sites = [*(ToySite(name, 10, step=1.0) for name in others), site]
    watched = Watched({}, sites=sites, connect_s=100.0, **engine)
    site.clock = watched.time.clock
    return watched, site


def test_a_site_whose_owner_is_to_approve_is_asked_again_until_the_deadline() -> None:
    watched, site = careful(40.0, run=run_of())
    result = watched.run()

    assert result.history[0].asked == ("b",)
    assert 40.0 <= watched.time.now <= 40.0 + 6.0
    assert site.asked == 9  # every 5 s
    assert len(watched.events.of("node_refused")) == 1  # it says the same every time


def test_the_wait_names_whose_approval_is_missing() -> None:
    watched, _ = careful(40.0, "a", run=run_of(quorum=2))
    watched.run()

    assert watched.waits[0] == Wait(
        why="2 sites for round 1, 0 are there",
        who=("a", "b"),
        since=EPOCH,
        until=EPOCH + 100.0,
        then="round 1 begins with those that are there, if they are 2 or more; else the run fails",
    )
    assert watched.waits[1] is not None
    assert watched.waits[1].why == (
        "2 sites for round 1, 1 are there; b: the owner is to approve the run"
    )
    assert watched.waits[1].who == ("b",)


def test_enough_others_do_not_wait_for_an_approval() -> None:
    watched, _ = careful(40.0, "a", run=run_of(rounds=2))
    result = watched.run()

    assert [r.asked for r in result.history] == [("a",), ("a",)]
    assert watched.time.now < 10.0


def test_an_approval_that_does_not_come_ends_the_run_with_its_reason() -> None:
    watched, _ = careful(400.0, run=run_of())

    with pytest.raises(RunError, match="b: policy: waiting for the owner: `anabranch site policy"):
        watched.run()
    assert watched.time.now == 100.0


def test_owners_may_take_longer_than_sites_that_are_not_there() -> None:
    watched, _ = careful(400.0, "a", run=run_of(quorum=2), later_s=1000.0)
    result = watched.run()

    assert result.history[0].asked == ("a", "b")
    assert 400.0 <= watched.time.now <= 420.0
    untils = [wait.until for wait in watched.waits if wait is not None]
    assert untils[0] == EPOCH + 100.0
    assert EPOCH + 1000.0 in untils


def test_owners_do_not_take_for_ever() -> None:
    watched, _ = careful(4000.0, run=run_of(), later_s=1000.0)

    with pytest.raises(RunError, match=r"after 1000 s there are 0(.|\n)*waiting for the owner"):
        watched.run()
    assert watched.time.now == 1000.0


def test_what_somebody_may_mend_is_asked_again_after_a_minute() -> None:
    class Mended(ToySite):
        asked = 0

        def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
            type(self).asked += 1
            if self.asked == 1:
                raise PolicyError("policy.toml: no such file; nothing is allowed")

    watched = Watched({}, sites=[Mended("a", 10)], run=run_of(), connect_s=100.0)

    assert watched.run().history[0].asked == ("a",)
    assert Mended.asked == 2
    assert watched.time.now >= MEND_S


def test_a_rejection_is_final_for_the_round() -> None:
    class Strict(ToySite):
        asked = 0

        def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
            type(self).asked += 1
            raise PolicyError("the owner of this site rejected this run (0123456789ab)")

    watched = Watched({}, sites=[Strict("a")], run=run_of(), connect_s=100.0)

    with pytest.raises(RunError, match="a: policy: the owner of this site rejected this run"):
        watched.run()
    assert Strict.asked == 1


def test_the_words_that_may_pass_are_those_of_the_policy() -> None:
    hours = "outside the hours of this site; they begin Mon 2026-01-05 20:00 (UTC)"
    assert awaits_approval(Failure("policy", "waiting for the owner: `anabranch site policy …`"))
    assert passes(Failure("policy", hours))
    assert not awaits_approval(Failure("policy", hours))
    assert not passes(Failure("data", "waiting for the owner"))
    assert not passes(Failure("policy", "the owner of this site rejected this run (0123)"))


def test_the_proposal_goes_with_every_message() -> None:
    run = run_of(holdout=0.2, client_evaluation=True)
    proposal = Proposal(
        federation="heart", run="toy-1", author="ada", version="1", code="0" * 64,
        config=run.digest(), base=run.model.base, contract=contract_digest(run),
    )  # fmt: skip
    signed = sign(proposal, Ed25519PrivateKey.generate())
    seen: list[Signed | None] = []

    class Noting(ToySite):
        def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
            seen.append(signed)

        def train(self, assignment: Assignment, before: Adapter) -> tuple[Trained, bytes]:
            seen.append(assignment.signed)
            return super().train(assignment, before)

        def evaluate(self, assignment: Assignment, adapter: Adapter) -> Any:
            seen.append(assignment.signed)
            return super().evaluate(assignment, adapter)

    Watched({}, sites=[Noting("a")], run=run, signed=signed).run()

    assert seen == [signed] * 3


def test_a_site_that_was_started_anew_says_again_who_it_is() -> None:
    """Its records may be others: what it described before does not hold."""
    watched = Watched({"a": [("restart", 5.0)]}, run=run_of(rounds=2))
    site = watched.stations["a"].site
    watched.engine._checkpoint = lambda number, adapter: setattr(site, "num_examples", 99)

    result = watched.run()

    assert [r.trained["a"].num_examples for r in result.history] == [10, 99]


# Waits


def test_every_wait_of_a_run_is_told_once_with_its_times() -> None:
    run = run_of(client_evaluation=True, quorum=2)
    watched = Watched(
        {"a": [("answer", 3.0)], "b": [("answer", 8.0)], "c": [("dead", 0.0)]}, run=run
    )
    watched.run()

    told = [wait for wait in watched.waits if wait is not None]
    assert [(wait.why, wait.who) for wait in told] == [
        ("2 sites for round 1, 0 are there", ("a", "b", "c")),
        ("sites train round 1", ("a", "b", "c")),
        ("sites train round 1", ("b", "c")),
        ("sites train round 1", ("c",)),
    ]
    training = told[-1]
    assert training.until - training.since == 60.0
    assert training.then == "the round is merged from those that answered, if they are 2 or more"
    assert watched.waits[-1] is None


def test_a_buffer_says_how_many_deltas_are_here() -> None:
    run = run_of(buffer=2, holdout=0.0)
    watched = Watched({"a": [("answer", 3.0)], "b": [("answer", 8.0)]}, run=run)
    watched.run()

    told = [(wait.why, wait.who) for wait in watched.waits if wait is not None]
    assert told[-2:] == [
        ("2 deltas for round 1, 0 are here", ("a", "b")),
        ("2 deltas for round 1, 1 are here", ("b",)),
    ]


def test_every_question_to_a_site_is_shown_with_what_became_of_it() -> None:
    watched = Watched(
        {"a": [("answer", 3.0)], "b": [("error", 2.0)], "c": [("dead", 0.0)]}, run=run_of()
    )
    watched.run()

    last = dict(watched.asked)
    assert {site: (one.kind, one.round, one.state) for site, one in last.items()} == {
        "a": ("train", 1, "answered"),
        "b": ("train", 1, "failed"),
        "c": ("train", 1, "late"),
    }
    assert last["c"].reason == "no answer within 60 s"
    assert last["c"].until - last["c"].since == 60.0
    of_a = [one for site, one in watched.asked if site == "a"]
    assert [(one.kind, one.state) for one in of_a] == [
        ("describe", "sent"),
        ("describe", "answered"),
        ("train", "sent"),
        ("train", "answered"),
    ]
    assert isinstance(of_a[0], Asked)


def test_a_wall_clock_that_is_set_anew_moves_what_is_shown_and_nothing_else() -> None:
    watched = Watched({"a": [("answer", 40.0)]}, run=run_of())
    shift = [0.0]
    object.__setattr__(watched.desk, "now", lambda: EPOCH + watched.time.now + shift[0])
    wake = watched.time.sleep

    def sleep(seconds: float) -> None:
        wake(seconds)
        shift[0] = 7200.0 if watched.time.now > 20 else 0.0

    watched.time.sleep = sleep  # type: ignore[method-assign]
    result = watched.run()

    training = [w for w in watched.waits if w is not None and w.why == "sites train round 1"]
    assert training[-1].until - training[0].until == pytest.approx(7200.0)
    assert watched.value(result) == 1.0
    assert watched.time.now == pytest.approx(41.0, abs=1.0)


# Errors


def test_the_error_of_a_round_names_ten_sites_and_counts_the_others() -> None:
    class Broken(ToySite):
        def train(self, assignment: Assignment, before: Adapter) -> tuple[Trained, bytes]:
            raise DataError("records.csv: gone")

    sites = [Broken(f"site-{i:02}") for i in range(25)]
    watched = Watched({}, sites=sites, run=run_of())

    with pytest.raises(RunError) as raised:
        watched.run()

    lines = str(raised.value).splitlines()
    assert len(lines) == 1 + 10 + 1
    assert lines[1] == "  site-00: data: records.csv: gone"
    assert lines[-1] == "  and 15 more"
