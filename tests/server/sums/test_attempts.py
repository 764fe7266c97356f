"""What is asked again for a sum that was not opened, or whose coordinator died."""

from __future__ import annotations

from typing import Any

import pytest

from anabranch.protocols.errors import PolicyError, RunError
from anabranch.protocols.secagg.member import Limits
from anabranch.server.progress import Progress
from anabranch.server.sums.rounds import SecureSums
from tests import noise_cases
from tests.secure_cases import MANY, SummingToy, furthest, plain_of, secured, toys
from tests.simulations.federation import Federation
from tests.simulations.rig import NEVER, SIZES, adapter, config

# Another attempt


class Restarted(SummingToy):
    """A toy that is started anew when it is asked its first request of a stage."""

    at: str = "share"
    stages_done: int = 0

    def secure(self, assignment: Any, request: Any, limits: Any = Limits()) -> Any:  # noqa: B008
        if request.stage == self.at and not self.stages_done:
            self.stages_done = 1
            self.restart()
        return super().secure(assignment, request, limits)


def test_sites_that_were_started_anew_are_in_the_next_attempt() -> None:
    sites, stage = toys(MANY), "share"
    for i in (1, 4, 7):
        sites[i] = Restarted(f"site-{i}", MANY[f"site-{i}"])
    run = secured(config(rounds=1, client_evaluation=False))
    federation = Federation(sites, run=run)

    result = federation.run()

    assert list(result.history[0].trained) == sorted(MANY)
    assert result.history[0].failed == {}
    assert furthest(result.adapter, plain_of(toys(MANY), config(rounds=1)).adapter) < 1e-4
    first, second = federation.events.of("secure_sum")
    assert (first["attempt"], first["opened"], second["attempt"], second["opened"]) == (
        1, False, 2, True,
    )  # fmt: skip
    assert first["dropped"] == {stage: ["site-1", "site-4", "site-7"]}
    assert "5 of 8 members" in first["reason"]
    one, other = federation.events.of("secure_sum_started")
    assert one["instance"] != other["instance"]
    assert sites[1].asked.count("advertise") == 2
    assert result.bytes_up == sum(row.bytes_up for row in result.sites.values())


class Idle(SummingToy):
    """A toy that does not train."""

    def train(self, assignment: Any, before: Any) -> Any:
        raise RuntimeError("the disk is full")


def low_and_high(*lost: str, at: str = "share") -> list[SummingToy]:
    """Return ten toys, three of which have a low rank, and three do not train.

    `lost` are started anew once, when they are asked `at`.
    """
    sites: list[SummingToy] = []
    for i in range(10):
        site = (Idle if i > 6 else SummingToy)(f"site-{i}", 10)
        if site.name in lost:
            site = Restarted(site.name, 10)
            site.at = at
        site.max_rank = 1 if i < 3 else None
        sites.append(site)
    return sites


MIXED = secured(
    config(rounds=1, method="ffa", mixed_ranks=True, client_evaluation=False), minimum=3
)


def test_a_rank_that_too_few_are_left_of_before_anybody_masks_is_tried_again() -> None:
    """Five are enough for a sum, but two of these trained a rank that three must have trained."""
    sites = low_and_high("site-5", "site-6")
    federation = Federation(sites, run=MIXED)

    result = federation.run()

    first, second = federation.events.of("secure_sum")
    assert "2 members trained rank" in first["reason"]
    assert first["dropped"] == {"share": ["site-5", "site-6"]}
    assert (first["opened"], second["opened"]) == (False, True)
    assert sorted(result.history[0].trained) == [f"site-{i}" for i in range(7)]
    assert [site.asked.count("mask") for site in sites[:7]] == [1] * 7  # none in the first attempt


def test_a_rank_that_too_few_are_left_of_in_every_attempt_is_said_with_who_was_lost() -> None:
    federation = Federation(
        low_and_high(), run=MIXED, delays=dict.fromkeys(["site-5", "site-6"], NEVER),
        slow="query.share",
    )  # fmt: skip

    text = r"in 2 attempts: 2 members trained rank \d, 3 are needed(.|\n)*site-5: lost at 'share'"
    with pytest.raises(RunError, match=text):
        federation.run()

    assert not any("mask" in one["stage_seconds"] for one in federation.events.of("secure_sum"))


def test_a_rank_that_too_few_who_mask_are_left_of_ends_the_sum_at_once() -> None:
    sites = low_and_high("site-5", "site-6", at="mask")
    federation = Federation(sites, run=MIXED)

    with pytest.raises(RunError, match=r"not opened: 2 members trained rank \d, 3 are needed"):
        federation.run()

    assert not any("agree" in site.asked for site in sites)


def test_who_was_lost_twice_is_not_asked_a_third_time() -> None:
    federation = Federation(
        toys(MANY),
        run=secured(config(rounds=1)),
        delays=dict.fromkeys(["site-1", "site-4", "site-7"], NEVER),
        slow="query.share",
    )

    (report,) = federation.run().history

    lost = {"site-1", "site-4", "site-7"}
    assert (set(report.trained), set(report.failed)) == (MANY.keys() - lost, lost)
    assert [len(one["members"]) for one in federation.events.of("secure_sum")] == [8, 8, 5]


def test_who_refuses_for_a_reason_that_stays_is_in_no_other_attempt() -> None:
    sites = toys(MANY)
    for i in (0, 3, 5):
        sites[i] = Unwilling(f"site-{i}", MANY[f"site-{i}"])
    federation = Federation(sites, run=secured(config(rounds=1)))

    (report,) = federation.run().history

    assert {name: one.reason for name, one in report.failed.items()} == {
        "site-0": "policy", "site-3": "policy", "site-5": "policy",
    }  # fmt: skip
    assert [len(one["members"]) for one in federation.events.of("secure_sum")] == [8, 5]


class Unwilling(SummingToy):
    """A toy whose owner does not allow it to share."""

    def secure(self, assignment: Any, request: Any, limits: Any = Limits()) -> Any:  # noqa: B008
        if request.stage == "share":
            raise PolicyError("the owner says no")
        return super().secure(assignment, request, limits)


def test_an_answer_to_an_earlier_attempt_is_late_and_nothing_else() -> None:
    """25 s: the first attempt is over after 20; at 30 s comes the answer to the second."""
    slow = ["site-1", "site-4", "site-7"]
    delays: dict[str, float | list[float]] = {name: [25.0, 10.0] for name in slow}
    federation = Federation(
        toys(MANY), run=secured(config(rounds=1)), delays=delays, slow="query.share"
    )

    (report,) = federation.run().history

    assert list(report.trained) == sorted(MANY)
    assert [one["opened"] for one in federation.events.of("secure_sum")] == [False, True]
    late = federation.events.of("site_late")
    assert [(one["site"], one["asked"]) for one in late] == [(name, "query.share") for name in slow]


@pytest.mark.parametrize(("stage", "attempts"), [("share", 2), ("mask", 1), ("agree", 1)])
def test_masked_vectors_that_were_charged_for_are_not_asked_for_again(
    stage: str, attempts: int
) -> None:
    tables = {"federation__rounds": 1, "secure_aggregation__deadline_s": 20.0}
    run = noise_cases.config(noise_cases.RECORD, secure_aggregation__minimum=6, **tables)
    federation = Federation(
        toys(MANY),
        run=run,
        delays=dict.fromkeys(["site-1", "site-4", "site-7"], NEVER),
        slow=f"query.{stage}",
    )

    with pytest.raises(RunError, match="not opened"):
        federation.run()

    assert len(federation.events.of("secure_sum")) == attempts


# A coordinator that dies


def test_a_coordinator_that_died_before_updates_were_masked_sums_the_round_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, sites = secured(config(rounds=2, client_evaluation=False)), toys(SIZES)
    kept: list[Progress] = []

    with monkeypatch.context() as died:
        died.setattr(SecureSums, "_stage", _dies_at("share"))
        with pytest.raises(KeyboardInterrupt):
            Federation(sites, run=run, progress=kept.append).run()
    assert [one.masked for one in kept] == []

    result = Federation(sites, run=run).run()

    assert [report.round for report in result.history] == [1, 2]
    assert furthest(result.adapter, plain_of(toys(SIZES), run).adapter) < 1e-4


def test_a_round_whose_updates_were_being_masked_is_lost_and_the_run_goes_on() -> None:
    run, sites = secured(config(rounds=3, client_evaluation=False)), toys(SIZES)
    kept: list[Progress] = []

    def keep(progress: Progress) -> None:
        kept.append(progress)
        if progress.masked == 2 and progress.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Federation(sites, run=run, progress=keep).run()
    died = kept[-1]

    again = Federation(sites, run=run, progress=kept.append)
    with again.grid:
        result = again.engine.run(adapter(), died)

    assert again.events.of("round_lost")[0]["round"] == 2
    assert [report.round for report in result.history] == [1, 3]
    assert kept[len(kept) - 3].round == 2
    assert furthest(kept[-3].adapter, died.adapter) == 0


def test_sites_give_their_updates_to_no_second_sum_of_a_round() -> None:
    run, sites = secured(config(rounds=1, client_evaluation=False)), toys(SIZES)
    Federation(sites, run=run).run()

    federation = Federation(sites, run=run)  # a coordinator that has forgotten, or lies
    with pytest.raises(RunError, match="not opened"):
        federation.run()

    assert all(
        "has given its update to a sum already" in one["message"] and one["stage"] == "advertise"
        for one in federation.events.of("secure_dropout")
    )


def _dies_at(stage: str) -> Any:
    asks = SecureSums._stage

    def asked(self: SecureSums, under: Any, present: Any) -> None:
        if present == stage:
            raise KeyboardInterrupt
        asks(self, under, present)

    return asked
