"""What a run says of noise that the members of its sums made together."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from anabranch.client.privacy import epsilon_of
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.secagg.noise import honest_members
from anabranch.protocols.tables import SecureAggregation
from anabranch.server.aggregation.choose import rule_for
from anabranch.server.card import privacy_section
from anabranch.server.client_privacy import LEAST_POPULATION, plan_of, summed_noise
from anabranch.server.statement.as_json import as_json
from anabranch.server.statement.guarantees import PrivacyStatement, RunFacts, SitePrivacy, state
from anabranch.server.statement.text import (
    APART,
    NO_CLIENT_LEVEL,
    NO_RECORD_LEVEL_IN_SUMS,
    group_rows,
    limits,
    paragraphs,
)
from tests.noise_cases import CLIENT, RECORD, config, noise
from tests.privacy_cases import facts_of, site
from tests.simulations.rig import SPEC


def spent(run: RunConfig, name: str, steps: int = 10, **changes: Any) -> SitePrivacy:
    """Return what a site of 400 records spent in a run of RECORD, and nothing before."""
    one = noise(run).spend(steps, 20 / 400)
    fields: dict[str, Any] = {
        "epsilon": epsilon_of([one], 1e-5),
        "delta": 1e-5,
        "noise_multiplier": one.noise_multiplier,
        "sample_rate": one.sample_rate,
        "steps": steps,
    }
    return site(name, **fields | changes)


def facts(run: RunConfig, *sites: SitePrivacy, **changes: Any) -> RunFacts:
    fields: dict[str, Any] = {"privacy": sites, "noise": noise(run), "rounds": 10} | changes
    return facts_of(*(one.site for one in sites), **fields)


def of_records() -> PrivacyStatement:
    run = config(RECORD)
    return state(run, facts(run, spent(run, "north"), spent(run, "south")))


def of_clients(**changes: Any) -> PrivacyStatement:
    run = config(CLIENT, **changes)
    sites = [spent(config(RECORD), "north")] if run.privacy is None else [site("north")]
    return state(run, facts(run, *sites))


def test_the_record_level_in_words() -> None:
    told = paragraphs(of_records())
    text = "\n".join(told)
    assert told[0].startswith("Record level: one record of a site. For every honest site k")
    assert "against the coordinator, any c = ⌊0.1·M⌋ of the M invited" in told[0]
    assert "t the largest of ⌊0.6667·n⌋ + 1, ⌊(n + c)/2⌋ + 1 and 3. Each member" in text
    assert f"σ = {noise(config(RECORD)).noise_multiplier:.4f}" in text
    assert "T = 10 rounds" in text
    assert "one step of DP-SGD" in text
    assert "PRV" not in text
    assert told[-3] == NO_CLIENT_LEVEL


@pytest.mark.parametrize("colluding", [0.0, 0.1, 0.3])
def test_as_many_are_honest_as_the_words_say(colluding: float) -> None:
    secure = SecureAggregation(minimum=3, threshold=2 / 3, colluding=colluding)
    for invited in range(5, 129):
        c = int(Fraction(str(colluding)) * invited)
        for n in range(max(c + 2, 3), invited + 1):
            t = max(2 * n // 3 + 1, (n + c) // 2 + 1, 3)
            assert honest_members(n, invited, secure) == min(t, n) - c


def test_the_client_level_in_words() -> None:
    told = paragraphs(of_clients())
    text = "\n".join(told)
    found = noise(config(CLIENT))
    assert told[0] == NO_RECORD_LEVEL_IN_SUMS
    assert "replacing the updates of one honest client" in told[1]
    assert "the coordinator knows who is drawn (q = 1)" in told[1]
    assert "That a client took part is not hidden" in told[1]
    assert "clipped to ℓ2 norm S = 0.8" in told[1]
    assert (
        f"V / a before it masks, with a = t − c, V = (σ·D2)², σ = {found.noise_multiplier:.4f}"
        in text
    )
    assert "charges its ledger for every attempt" in text
    assert "does not hold against the coordinator" not in text


def test_the_log_has_what_each_round_of_sums_has_cost_a_client() -> None:
    run, found = config(CLIENT), noise(config(CLIENT))
    costs = [summed_noise(run, SPEC, rounds) for rounds in range(1, 11)]
    epsilons = [one["epsilon"] for one in costs if one is not None]
    assert epsilons == sorted(epsilons)
    assert (len(epsilons), epsilons[-1]) == (10, found.epsilon)
    assert summed_noise(config(RECORD), SPEC, 1) is None
    assert summed_noise(config(RECORD, privacy=None), SPEC, 1) is None


def test_both_levels_are_said_apart() -> None:
    statement = of_clients(privacy={"epsilon": 3.0}, training={"local_steps": 25})
    told = paragraphs(statement)
    assert statement.both
    assert told[-1] == APART
    assert as_json(statement)["record_level"]["accountant"] == "PRV"
    assert as_json(statement)["client_level"]["accountant"] == "RDP"


def test_the_summary_has_every_number() -> None:
    run = config(RECORD)
    found, written = noise(run), as_json(of_records())["record_level"]
    assert written["accountant"] == "RDP"
    assert written["mechanism"] == "distributed Skellam"
    assert (written["l1"], written["l2"]) == (found.sensitivities.l1, found.sensitivities.l2)
    assert written["variance"] == found.variance
    assert written["epsilon"] == max(s["epsilon"] for s in written["sites"].values())
    client = as_json(of_clients())["client_level"]
    assert client["neighbours"] == "updates replaced by zeros"
    assert client["epsilon"] == noise(config(CLIENT)).epsilon <= 6.0
    assert limits(of_clients())


def test_groups_of_records_are_bounded_by_the_generic_rule_alone() -> None:
    statement = of_records()
    assert group_rows(statement) == []
    assert "Several records of one patient" not in privacy_section(statement)
    assert "(g·ε, g·e^((g−1)·ε)·δ)" in privacy_section(statement)


# Refusals


@pytest.mark.parametrize("base", [RECORD, CLIENT])
def test_without_its_plan_nothing_is_released(base: dict[str, Any]) -> None:
    run = config(base)
    one = spent(config(RECORD), "north")
    with pytest.raises(PrivacyError, match="there is no plan of it"):
        state(run, facts(run, one, noise=None))
    with pytest.raises(PrivacyError, match="for its 11 rounds"):
        state(run, facts(run, one, rounds=11))


def test_a_site_that_states_less_than_its_steps_cost_is_refused() -> None:
    run = config(RECORD)
    small = spent(run, "north", epsilon=0.1)
    with pytest.raises(PrivacyError, match="its ledger has lost steps"):
        state(run, facts(run, small))


def test_the_coordinator_adds_no_noise_of_its_own() -> None:
    run = config(CLIENT)
    assert plan_of(run) is None
    assert "client-privacy" not in rule_for(run).name
    assert LEAST_POPULATION == 100  # as secagg/agreed_noise.py has it
