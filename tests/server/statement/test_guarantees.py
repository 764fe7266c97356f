import json
import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.privacy import Spend, epsilon_of
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.tables import (
    Privacy,
)
from anabranch.server.statement.as_json import as_json
from anabranch.server.statement.guarantees import group_epsilon, guess, state
from anabranch.server.statement.text import (
    GROUP_HEAD,
    SITE_HEAD,
    client_paragraphs,
    group_note,
    group_rows,
    paragraphs,
    site_rows,
)
from tests.privacy_cases import (
    client_config,
    client_plan,
    facts_of,
    open_config,
    private_config,
    site,
)

# -- laws ---------------------------------------------------------------------------------------

NAMES = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4, unique=True)


@given(names=NAMES, extra=st.lists(st.floats(0, 50), min_size=4, max_size=4))
def test_every_site_stands_with_its_own_numbers(names: list[str], extra: list[float]) -> None:
    spent = tuple(site(n, epsilon=3.5 + e) for n, e in zip(names, extra, strict=False))
    statement = state(private_config(), facts_of(*names, privacy=spent))

    assert statement.record is not None
    assert [one.spent for one in statement.record.sites] == sorted(spent, key=lambda s: s.site)
    assert statement.record.epsilon == max(one.epsilon for one in spent)
    written = as_json(statement)["record_level"]["sites"]
    assert {n: one["epsilon"] for n, one in written.items()} == {s.site: s.epsilon for s in spent}
    assert [row[0] for row in site_rows(statement)] == sorted(names)
    assert all(float(row[1]) >= written[row[0]]["epsilon"] for row in site_rows(statement))


@given(
    epsilon=st.floats(0, 50),
    delta=st.floats(0, 0.1),
    odds=st.floats(0, 1),
)
def test_no_test_that_dp_allows_is_right_more_often_than_the_guess(
    epsilon: float, delta: float, odds: float
) -> None:
    """Both conditions of Kairouz et al. 2015 at any false positive rate; even odds before."""
    most = guess(epsilon, delta)
    missed = max(0.0, 1 - delta - math.exp(epsilon) * odds, math.exp(-epsilon) * (1 - delta - odds))
    assert 0.5 <= most <= 1
    assert 1 - (odds + missed) / 2 <= most + 1e-12


@settings(max_examples=15, deadline=None)
@given(
    sigma=st.floats(1.5, 6), rate=st.floats(0.005, 1), steps=st.integers(1, 20),
    delta=st.sampled_from([1e-3, 1e-5]),
)  # fmt: skip
def test_more_records_of_one_patient_cost_more(
    sigma: float, rate: float, steps: int, delta: float
) -> None:
    spent = site("a", noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta)
    one, two = group_epsilon(spent, 1), group_epsilon(spent, 2)
    exact = epsilon_of([Spend(noise_multiplier=sigma, sample_rate=rate, steps=steps)], delta)
    assert one is None or one >= exact - 0.03  # the accountants' stated errors
    assert one is None or two is None or two >= one


# -- literal examples -----------------------------------------------------------------------------


def test_a_record_level_statement_word_for_word() -> None:
    statement = state(private_config(), facts_of("north", "south"))

    assert paragraphs(statement) == [
        "Record level: one record of a site. For every site k, the sequence of all messages that "
        "it sent in rounds 1 to 6 is (ε_k, δ_k)-differentially private with respect to adding or "
        "removing one record of its training set, against the coordinator and everyone who sees "
        "what it publishes. What a message holds beside the trained values is marked below as "
        "charged, fixed in advance or not covered.",
        "In words: somebody who sees all of that and guesses whether one record was in a training "
        "set, with even odds before, is right at most 97.1 % of the time (a coin is right 50 %).",
        "Target of this run: ε = 3 per site. Largest over all sites, all runs: ε = 3.500, "
        "δ = 0.0005. It holds for every record that is at one site alone (parallel composition); "
        "for a record at several sites, their ε add up. A site whose deltas never counted is not "
        "listed; its ledger has what it spent.",
        "One patient: the unit is one record (g = 1). Whoever has g records at a site is "
        "protected less: (ε, δ) for one record is (g·ε, g·e^((g−1)·ε)·δ) for g. For 2 and 5 "
        "records and this run alone, the table has closer bounds at the same δ.",
        "Mechanism: DP-SGD. Each step draws a Poisson sample of the records, clips each record's "
        "gradient to ℓ2 norm C = 1 (flat), and adds Gaussian noise of standard deviation σ·C to "
        "the sum. Accountant: PRV (Gopi, Lee, Wutschitz 2021), its upper bound.",
        "Client level: none. That a site took part, and what its records have in common, is not "
        "hidden.",
    ]
    north = ["north", "3.500", "3.003", "0.0005", "2.3200", "0.160000", "150", "fast", "ab12"]
    assert dict(zip(SITE_HEAD, site_rows(statement)[0], strict=True)) == dict(
        zip(SITE_HEAD, north, strict=True)
    )
    assert GROUP_HEAD == ("site", "2 records", "5 records")
    assert group_rows(statement)[1] == ["south", "ε = 7.12", "ε = 24.65"]


def test_a_client_level_statement_word_for_word() -> None:
    statement = state(client_config(), facts_of(client=client_plan()))

    assert paragraphs(statement) == [
        "Record level: none. Sites sent what they learned without noise, and the coordinator saw "
        "each update as it is.",
        "Client level: one client with all its records. The sequence of models that the "
        "coordinator publishes in rounds 1 to 100 is (ε_u, δ_u)-differentially private with "
        "ε_u = 2.900 and δ_u = 0.0001, with respect to adding or removing one client with all its "
        "records, against everyone who sees the published models, other clients included. It does "
        "not hold against the coordinator, which sees each client's update and draws the noise, "
        "nor against whoever sees which clients are drawn.",
        "In words: somebody who sees all of that and guesses whether one client took part, with "
        "even odds before, is right at most 94.8 % of the time (a coin is right 50 %).",
        "Mechanism: in each round, each of N = 1000 clients is drawn with chance q = 0.1, "
        "independently (Poisson sampling). Its whole update is clipped to ℓ2 norm S = 0.75 and "
        "all weigh the same. Gaussian noise of standard deviation z·S, z = 1.5500, is added to "
        "the sum. T = 100 rounds. Accountant: PRV (Gopi, Lee, Wutschitz 2021), its upper bound.",
        "Target of this run: ε_u = 3 for the whole run.",
    ]
    assert site_rows(statement) == []


def test_adaptive_clipping_and_a_weight_cap_are_part_of_the_mechanism() -> None:
    plan = client_plan(adaptive=True, target_quantile=0.6, max_examples=50)
    text = " ".join(client_paragraphs(state(client_config(), facts_of(client=plan))))

    assert "S, which starts at 0.75 and follows the 0.6-quantile of the updates' norms" in text
    assert "it weighs min(n / 50, 1) for n records, at most 1" in text
    assert plan.share_noise is not None
    assert f"deviation {plan.update_noise:.4f}·S is added to the sum" in text
    assert f"deviation {plan.share_noise:.4f} to the count of norms within S" in text
    assert "cost what z = 1.5500 costs alone" in text


@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        (Privacy(epsilon=3, clipping="flat", clipping_norm=2), "to ℓ2 norm C = 2 (flat)"),
        (Privacy(epsilon=3, clipping="automatic"), "below C = 1 (automatic, AUTO-S)"),
        (Privacy(epsilon=3, clipping="per-layer"), "C/√L for L tensors, C = 1 in all (per-layer)"),
        (
            Privacy(epsilon=3, clipping="adaptive", target_quantile=0.7),
            "C, which starts at C = 1 and follows the 0.7-quantile of the norms (adaptive)",
        ),
    ],
)
def test_how_gradients_are_clipped_is_said(privacy: Privacy, said: str) -> None:
    statement = state(private_config(privacy=privacy), facts_of("north"))
    assert said in " ".join(paragraphs(statement))


def test_without_privacy_that_is_all_that_is_said() -> None:
    statement = state(open_config(), facts_of("north"))

    assert as_json(statement) == {
        "record_level": None,
        "client_level": None,
        "secure_aggregation": None,
        "releases": [],
        "limits": [],
        "statement": "There is no differential privacy: this model was trained on the records as "
        "they are. It may have memorised some of them; treat it as you treat the records.",
    }


def test_with_both_the_guarantees_stand_apart_and_no_client_is_named() -> None:
    config = client_config(privacy=Privacy(epsilon=8.0, delta=1e-5))
    statement = state(config, facts_of("north", client=client_plan()))
    written = as_json(statement)

    assert paragraphs(statement)[-1] == (
        "Both guarantees hold at once. They are two statements about the same run: each has its "
        "own ε and δ, and they are not to be added or compared."
    )
    assert (written["record_level"]["epsilon"], written["client_level"]["epsilon"]) == (8.0, 2.9)
    assert (written["record_level"]["delta"], written["record_level"]["sites"]) == (1e-5, {})
    assert "In this run ε_k is at most 8 at δ = 1e-05" in written["statement"]
    assert "north" not in json.dumps(written)


def test_the_summary_has_every_number_of_both_guarantees() -> None:
    record = as_json(state(private_config(), facts_of("north")))["record_level"]
    client = as_json(state(client_config(), facts_of(client=client_plan())))["client_level"]

    assert record["sites"]["north"] == {
        "epsilon": 3.5,
        "epsilon_this_run": pytest.approx(3.0022, abs=1e-3),
        "delta": 5e-4,
        "noise_multiplier": 2.32,
        "sample_rate": 0.16,
        "steps": 150,
        "engine": "fast",
        "ledger": "ab12",
        "rounds_not_in_epsilon": 0,
        "groups": {"2": pytest.approx(7.12, abs=0.05), "5": pytest.approx(24.64, abs=0.05)},
    }
    assert {k: record[k] for k in ("target_epsilon", "epsilon", "delta", "rounds")} == {
        "target_epsilon": 3.0, "epsilon": 3.5, "delta": 5e-4, "rounds": 6,
    }  # fmt: skip
    assert {k: client[k] for k in ("epsilon", "delta", "noise_multiplier", "sample_rate")} == {
        "epsilon": 2.9, "delta": 1e-4, "noise_multiplier": 1.55, "sample_rate": 0.1,
    }  # fmt: skip
    assert (client["population"], client["rounds"], client["clipping_norm"]) == (1000, 100, 0.75)
    for name in ("unit", "neighbours", "against", "accountant", "sampling"):
        assert record[name]
        assert client[name]


def test_a_bound_is_rounded_up_and_a_guess_of_epsilon_zero_is_a_coin() -> None:
    one = site("north", epsilon=3.50001, delta=0.00052301)
    row = site_rows(state(private_config(), facts_of("north", privacy=(one,))))[0]

    assert row[1:4] == ["3.501", row[2], "0.000524"]
    assert guess(0, 0) == 0.5
    assert guess(2, 0) == pytest.approx(math.exp(2) / (1 + math.exp(2)))
    assert guess(1e4, 0) == 1


@pytest.mark.parametrize(("size", "least"), [(2, 2.23), (5, 6.93)])
def test_the_cost_of_a_group_is_that_of_its_mixture_of_gaussians(size: int, least: float) -> None:
    """Computed with loss intervals of 1e-3: 2.2396 and 6.9382."""
    epsilon = group_epsilon(site("north", noise_multiplier=5.6), size)
    assert epsilon is not None
    assert least <= epsilon <= least + 0.04


def test_full_batches_make_a_group_a_gaussian_of_less_noise() -> None:
    spent = site("north", noise_multiplier=30.0, sample_rate=1.0, steps=50, delta=1e-3)
    group = group_epsilon(spent, 5)
    alone = epsilon_of([Spend(noise_multiplier=6, sample_rate=1.0, steps=50)], 1e-3)
    assert group == pytest.approx(alone, abs=0.03)


def test_full_batches_have_group_costs_whatever_the_noise() -> None:
    spent = site("a", noise_multiplier=3.533472972912776, sample_rate=1.0, steps=2, delta=1e-3)
    alone = epsilon_of([Spend(noise_multiplier=3.533472972912776, sample_rate=1, steps=2)], 1e-3)

    assert group_epsilon(spent, 1) == pytest.approx(alone, abs=0.03)


def test_the_delta_over_all_sites_is_the_largest() -> None:
    facts = facts_of(privacy=(site("north", delta=5e-4), site("south", delta=1e-4, epsilon=9.0)))
    record = state(private_config(), facts).record

    assert record is not None
    assert (record.epsilon, record.delta) == (9.0, 5e-4)


def test_what_has_no_useful_bound_says_so() -> None:
    weak = site("north", epsilon=90.0, noise_multiplier=0.4, steps=150)
    statement = state(private_config(), facts_of("north", privacy=(weak,)))

    assert group_rows(statement) == [["north", "no useful bound", "no useful bound"]]


def test_many_sites_have_group_costs_of_those_with_the_largest_epsilon() -> None:
    names = [f"site-{i:02d}" for i in range(10)]
    statement = state(private_config(), facts_of(*names))

    assert len(site_rows(statement)) == 10
    assert len(group_rows(statement)) == 8
    assert group_note(statement) == "For the 8 of 10 sites with the largest ε of this run."


def test_a_ledger_head_that_is_no_hash_is_not_repeated() -> None:
    heads = {"a": "<b>", "b": "0" * 64, "c": None}
    spent = tuple(site(name, ledger=head) for name, head in heads.items())
    rows = site_rows(state(private_config(), facts_of(*heads, privacy=spent)))

    assert [row[-1] for row in rows] == ["no hash", "0" * 16 + "…", "\u2013"]


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": math.inf}, r"site 'north' states \(epsilon, delta\) = \(inf, 0.0005\)"),
        ({"epsilon": math.nan}, "expected a finite epsilon"),
        ({"epsilon": -1.0}, "expected a finite epsilon"),
        ({"delta": 0.0}, r"delta in \(0, 1\)"),
        ({"noise_multiplier": 0.0}, "impossible mechanism: expected noise_multiplier > 0"),
        ({"sample_rate": 1.5}, "impossible mechanism: expected sample_rate"),
        ({"steps": 0}, "impossible mechanism: expected steps >= 1"),
        (
            {"epsilon": 2.5},
            "150 steps of this run alone cost 3.0022: its ledger has lost steps, or its records",
        ),
    ],
)
def test_no_statement_stands_on_a_number_that_cannot_be_true(
    changes: dict[str, Any], message: str
) -> None:
    facts = facts_of("north", "south")
    spent = tuple(replace(one, **changes) if one.site == "north" else one for one in facts.privacy)

    with pytest.raises(PrivacyError, match=message):
        state(private_config(), replace(facts, privacy=spent))


def test_a_site_without_its_numbers_stops_the_statement() -> None:
    with pytest.raises(PrivacyError, match="no privacy facts of site 'south'"):
        state(private_config(), facts_of("north", "south", privacy=(site("north"),)))
    with pytest.raises(PrivacyError, match="no privacy facts of any site"):
        state(private_config(), facts_of())


def test_a_client_private_run_without_a_plan_has_no_statement() -> None:
    with pytest.raises(PrivacyError, match="there is no plan of its noise"):
        state(client_config(), facts_of("north"))


def test_a_plan_whose_epsilon_is_infinite_is_no_guarantee() -> None:
    with pytest.raises(PrivacyError, match=r"plan has \(epsilon, delta\) = \(inf, 0.0001\)"):
        state(client_config(), facts_of(client=client_plan(epsilon=math.inf)))


def test_a_plan_does_not_make_a_run_private_that_was_not() -> None:
    statement = state(open_config(), facts_of("north", client=client_plan()))
    assert (statement.record, statement.client) == (None, None)


def test_the_statement_is_json() -> None:
    statement = state(private_config(), facts_of("north"))
    assert msgspec.json.decode(msgspec.json.encode(as_json(statement))) == as_json(statement)
