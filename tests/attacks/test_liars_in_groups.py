"""Attack: one member of one group spoils the sums of all groups, or ends the round.

A robust rule over the means of groups bears groups that are spoilt (Blanchard et al. 2017,
arXiv:1703.02757), as long as a liar is in one group only. Two ways round that: counters that no
members make, for which a whole round was given up; and to say before the sum that one has very
many records, so that the updates of all others are less than a step of the grid.

Why it fails: a group whose sum is no mean of updates is left out as one that fell below its
threshold. With groups all members weigh the same, so nobody's word makes the grid coarser.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.client.sums.terms import vector_of
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.secagg.member import Answer, Limits
from anabranch.protocols.tables import Robust
from tests.secure_cases import SummingToy, secured
from tests.simulations.federation import Federation
from tests.simulations.rig import config

NAMES = [f"site-{i}" for i in range(9)]
NONE = Limits()


class Spoils(SummingToy):
    """Adds the largest number there is to every counter."""

    def secure(self, assignment: Any, request: Any, limits: Limits = NONE) -> Answer:
        def vector(delta: Any, told: Any, terms: Any, advertised: int) -> Any:
            found = vector_of(delta, told, terms, advertised)
            found[terms.values :] = np.iinfo(found.dtype).max
            return found

        participant = self.participant(assignment.run)
        return participant.answer(assignment, request, self.floors, vector)


def grouped(weighting: str = "uniform") -> RunConfig:
    tables = config(rounds=1, method="ffa", weighting=weighting)
    base = msgspec.structs.replace(tables, robust=Robust(rule="median"))
    return secured(base, group=3, minimum=3)


def toys_with(*liars: str) -> list[SummingToy]:
    return [(Spoils if name in liars else SummingToy)(name, 10, step=1.0) for name in NAMES]


def test_counters_that_no_members_make_cost_their_group_alone() -> None:
    federation = Federation(toys_with("site-4"), run=grouped())

    result = federation.run()

    (told,) = federation.events.of("secure_sum")
    (spoilt,) = [one for one in told["groups"] if "site-4" in one]
    (report,) = result.history
    assert sorted(report.trained) == sorted(set(NAMES) - set(spoilt))
    assert set(report.failed) == set(spoilt)
    assert all("no updates add up to that" in one.message for one in report.failed.values())
    assert np.allclose(result.adapter.arrays["head.weight"], 1.0, atol=1e-3)
    assert result.sites["site-4"].rounds == 0


def test_with_no_group_left_the_round_is_given_up_and_says_why() -> None:
    federation = Federation(toys_with(*NAMES), run=grouped())

    with pytest.raises(RunError, match="no updates add up to that"):
        federation.run()

    assert federation.events.of("round_aggregated") == []


def test_a_weight_that_one_member_claims_is_in_no_terms_of_groups() -> None:
    sites = toys_with()
    sites[4].num_examples = 10**7

    result = Federation(sites, run=grouped()).run()

    assert np.allclose(result.adapter.arrays["head.weight"], 1.0, atol=1e-3)


def test_groups_whose_members_weigh_what_they_claim_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'group needs federation\.weighting = "uniform"'):
        grouped("examples")
