"""What no sum of so many sites can do is refused before anybody trains."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.secagg.graph import groups_of
from anabranch.protocols.tables import Robust
from anabranch.server.aggregation.robust import least, require_enough
from anabranch.server.sums.terms import require_possible
from tests.secure_cases import SummingToy, secured
from tests.simulations.federation import Federation
from tests.simulations.rig import SPEC, config


def grouped(rule: Robust, **secure: Any) -> RunConfig:
    tables = config(rounds=1, method="ffa", weighting="uniform")
    return secured(msgspec.structs.replace(tables, robust=rule), **{"minimum": 2, **secure})


def require(run: RunConfig, members: int) -> None:
    assert run.secure_aggregation is not None
    require_possible(run, run.secure_aggregation, SPEC, members)


@pytest.mark.parametrize(
    ("run", "sites", "text"),
    [
        (secured(config(rounds=1), ring=16, value_bits=12), 40, "ring"),
        (
            grouped(Robust(rule="median"), group=5),
            40,
            "4 of 40 members may collude, all of them in one group, and "
            "secure_aggregation.minimum = 2 who do not must be in it: a group of 5 is too small. "
            "Set group to 6 or more",
        ),
        (grouped(Robust(rule="median"), group=7), 12, "12 sites make 1 groups of 7"),
        (
            grouped(Robust(rule="krum", byzantine=2), group=3),
            12,
            '12 sites make 4 groups of 3, and robust.rule = "krum" compares 7 or more: 7 groups '
            "are 21 sites",
        ),
    ],
)
def test_it_is_said_before_anybody_trains(run: RunConfig, sites: int, text: str) -> None:
    toys = [SummingToy(f"site-{i:02}", 10) for i in range(sites)]
    federation = Federation(toys, run=run)

    with pytest.raises(ConfigError, match=text):
        federation.run()

    assert federation.events.of("round_started") == []
    assert federation.events.of("site_trained") == []


@pytest.mark.parametrize("robust", [Robust(rule="median"), Robust(rule="krum", byzantine=1)])
@given(members=st.integers(2, 60), size=st.integers(2, 8))
def test_what_is_let_through_has_groups_enough(robust: Robust, members: int, size: int) -> None:
    run = grouped(robust, group=size, colluding=0.0)
    groups = groups_of([f"{i:02}" for i in range(members)], bytes(32), size)
    try:
        require(run, members)
    except ConfigError:
        assert len(groups) < max(least(robust), 2)
    else:
        require_enough(robust, len(groups))
        assert len(groups) >= 2


@pytest.mark.parametrize("rule", ["median", "krum"])
@given(byzantine=st.integers(0, 5), clients=st.integers(1, 20))
def test_as_many_as_a_rule_needs_are_enough(rule: Any, byzantine: int, clients: int) -> None:
    robust = Robust(rule=rule, byzantine=byzantine)
    if clients >= least(robust):
        require_enough(robust, clients)
    else:
        with pytest.raises(RunError, match=f"needs {least(robust)} deltas"):
            require_enough(robust, clients)


def test_fewer_than_the_minimum_may_still_come() -> None:
    require(secured(config(rounds=1), minimum=5, ring=16, value_bits=12), 4)


def test_who_is_asked_beyond_the_cohort_is_in_no_sum() -> None:
    """Of 19 one may collude, and groups of four are enough; 29 are asked, the first 19 count."""
    run = grouped(Robust(rule="median"), group=4, minimum=3)
    more = msgspec.structs.replace(run.federation, cohort=19, over_selection=0.5)
    run = msgspec.structs.replace(run, federation=more)
    toys = [SummingToy(f"site-{i:02}", 10) for i in range(30)]

    federation = Federation(toys, run=run)
    federation.run()

    assert len(federation.events.of("round_started")[0]["sites"]) == 29
    (summed,) = federation.events.of("secure_sum")
    assert (summed["opened"], len(summed["members"])) == (True, 19)


def test_a_sum_that_is_possible_has_terms() -> None:
    run = grouped(Robust(rule="median"), group=3, minimum=3)
    toys = [SummingToy(f"site-{i}", 10, step=1.0) for i in range(9)]

    federation = Federation(toys, run=run)
    federation.run()

    assert federation.events.of("secure_sum")[0]["opened"]
