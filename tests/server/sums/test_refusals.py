"""Sites that refuse, or are refused, and what is told of them."""

from __future__ import annotations

from typing import Any

import pytest

from anabranch.protocols.errors import RunError
from anabranch.protocols.secagg.member import Limits
from tests.secure_cases import MANY, SummingToy, secured, toys
from tests.simulations.federation import Federation
from tests.simulations.rig import NEVER, SIZES, ToySite, config


def test_a_site_that_refuses_a_stage_is_a_dropout_and_its_text_stays() -> None:
    sites = toys(MANY)
    sites[3].refuses = frozenset({"mask"})
    federation = Federation(sites, run=secured(config(rounds=1)))

    result = federation.run()

    assert "site-3" not in result.history[0].trained
    (lost,) = federation.events.of("secure_dropout")
    assert (lost["site"], lost["stage"], lost["reason"]) == ("site-3", "mask", "internal")
    assert "Jane" not in lost["message"]


def test_a_site_with_higher_floors_stays_out() -> None:
    sites = toys(MANY)
    sites[0].floors = Limits(minimum=6)
    federation = Federation(sites, run=secured(config(rounds=1), minimum=5))

    federation.run()

    (lost,) = federation.events.of("secure_dropout")
    assert (lost["site"], lost["stage"], lost["reason"]) == ("site-0", "advertise", "policy")


def test_a_site_without_a_key_takes_no_part() -> None:
    sites = [*toys(SIZES), ToySite("essen", 5)]

    federation = Federation(sites, run=secured(config(rounds=1)))
    result = federation.run()

    assert "essen" not in result.sites
    (refused,) = federation.events.of("node_refused")
    assert "no peer key" in refused["message"]


def test_a_round_waits_for_as_many_sites_as_a_sum_needs() -> None:
    federation = Federation(toys({"aarhus": 5, "cork": 9}), run=secured(config(rounds=1)))

    with pytest.raises(RunError, match=r"3 sites are needed, after 60 s there are 2"):
        federation.run()

    assert federation.events.of("site_trained") == []


def test_a_round_of_fewer_than_the_minimum_is_refused_before_anything_is_summed() -> None:
    federation = Federation(
        toys(SIZES), run=secured(config(rounds=1)), delays=dict.fromkeys(["cork", "delft"], NEVER)
    )

    with pytest.raises(RunError, match=r"2 of 4 sites sent a delta that counts .*, 3 are needed"):
        federation.run()

    assert federation.events.of("secure_sum_started") == []


def test_a_site_that_sends_its_delta_is_rejected() -> None:
    liar = ToySite("essen", 5)

    class Sends(SummingToy):
        def train(self, assignment: Any, before: Any) -> Any:
            return liar.train(assignment, before)

    federation = Federation([*toys(SIZES), Sends("essen", 5)], run=secured(config(rounds=1)))

    result = federation.run()

    assert result.history[0].failed["essen"].reason == "rejected"


@pytest.mark.parametrize("canary", [7.53125, -7.53125])
def test_a_value_beyond_the_range_is_a_dropout_and_no_digit_of_it_leaves(
    canary: float, caplog: pytest.LogCaptureFixture
) -> None:
    sites = [SummingToy(name, 10, step=1.0) for name in MANY]
    sites[5].step = canary
    federation = Federation(sites, run=secured(config(rounds=1)))

    federation.run()

    (lost,) = federation.events.of("secure_dropout")
    assert (lost["site"], lost["reason"]) == ("site-5", "data")
    assert lost["message"] == (
        "round 1: the update has values beyond secure_aggregation.range = ±4, and is not sent: "
        "raise secure_aggregation.range, or lower the learning rate; the site's log says more"
    )
    assert "53125" not in str(federation.events.all)
    assert f"number 0 is {canary}, the largest 7.53125" in caplog.text


def test_a_weight_above_what_was_said_is_a_dropout_and_is_not_told() -> None:
    sites = [*toys({"aarhus": 5, "bergen": 6, "cork": 7, "essen": 4}), Heavier("delft", 8)]
    federation = Federation(sites, run=secured(config(rounds=1)))

    federation.run()

    (lost,) = federation.events.of("secure_dropout")
    assert (lost["site"], lost["reason"]) == ("delft", "protocol")
    assert "the heaviest weight is 8192 units of 1/1024" in lost["message"]
    assert "4321" not in str(federation.events.all)
    assert str(4321 * 1024) not in str(federation.events.all)


class Heavier(SummingToy):
    """A toy that has more records when it trains than it said."""

    def train(self, assignment: Any, before: Any) -> Any:
        said, self.num_examples = self.num_examples, 4321
        try:
            return super().train(assignment, before)
        finally:
            self.num_examples = said


def test_a_site_started_anew_in_the_middle_is_a_dropout() -> None:
    sites = toys(MANY)

    class Forgets(SummingToy):
        def secure(self, assignment: Any, request: Any, limits: Any = Limits()) -> Any:  # noqa: B008
            if request.stage == "mask":
                self.restart()
            return super().secure(assignment, request, limits)

    sites[2] = Forgets("site-2", MANY["site-2"])
    federation = Federation(sites, run=secured(config(rounds=1)))

    federation.run()

    (lost,) = federation.events.of("secure_dropout")
    assert (lost["site"], lost["stage"]) == ("site-2", "mask")
    assert "started anew" in lost["message"]
