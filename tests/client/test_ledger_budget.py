"""Budgets are kept before a round starts, and the published ways to undercount are not ours."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant

from anabranch.client.ledger import Ledger, Limit
from anabranch.client.pld import Compared, compare, pld_bounds
from anabranch.client.privacy import (
    Spend,
    epsilon_bounds,
    epsilon_of,
    plan_for,
    repeats_within,
)
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.tables import Privacy, Training
from tests.ledgers import SPEND, rows, spend

ROOT = Path(__file__).parents[2]
DELTA = 1e-4
ROWS = rows(*range(5))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def limit(epsilon: float, over: Any = "row") -> Limit:
    return Limit(epsilon=epsilon, delta=DELTA, over=over, name="the budget of the test")


# Laws


@settings(max_examples=10, deadline=None)
@given(
    spent=st.lists(st.sampled_from([SPEND, spend(2.0, 0.1, 4)]), max_size=3),
    budget=st.floats(0.5, 5),
    most=st.sampled_from([1, 3, 200]),
)
def test_as_many_rounds_fit_as_are_said_and_not_one_more(
    spent: list[Spend], budget: float, most: int
) -> None:
    count = repeats_within(spent, SPEND, epsilon=budget, delta=DELTA, most=most)

    if count:
        assert epsilon_of([*spent, *[SPEND] * count], DELTA) <= budget
    if count < most:
        assert epsilon_of([*spent, *[SPEND] * (count + 1)], DELTA) > budget


@settings(max_examples=5, deadline=None)
@given(
    st.lists(
        st.builds(
            spend,
            st.sampled_from([1.3, 2.5]),
            st.sampled_from([0.01, 0.1, 1.0]),
            st.integers(1, 20),
        ),
        min_size=1,
        max_size=2,
    )
)
def test_both_accountants_agree_within_their_stated_error(spends: list[Spend]) -> None:
    found = compare(spends, DELTA)

    assert found.agree
    if math.isfinite(found.prv[1]):
        assert found.prv[0] <= found.prv[1]
        assert found.pld[0] <= found.pld[1]
        assert found.prv[1] - found.pld[1] < 0.03


# Examples


def test_the_ledger_gives_what_opacus_and_dp_accounting_give(ledger: Ledger) -> None:
    spends = [SPEND, spend(0.9, 0.1, 5), spend(3.0, 0.5, 2)]
    for number, one in enumerate(spends, 1):
        ledger.settle(ledger.reserve(ROWS, "run", number, one), one)
    opacus = PRVAccountant()
    opacus.history = [(s.noise_multiplier, s.sample_rate, s.steps) for s in ledger.history()]

    epsilon = ledger.spent(ROWS, DELTA)

    assert epsilon == pytest.approx(opacus.get_epsilon(DELTA), abs=0.01)
    low, high = pld_bounds(ledger.history(), DELTA)
    assert low <= epsilon <= high + 0.02
    assert epsilon_bounds(ledger.history(), DELTA)[1] == epsilon


def test_accountants_that_disagree_are_told_apart() -> None:
    assert not Compared(delta=DELTA, prv=(1.0, 1.1), pld=(1.2, 1.3)).agree
    assert not Compared(delta=DELTA, prv=(1.4, 1.5), pld=(1.2, 1.3)).agree
    assert Compared(delta=DELTA, prv=(1.0, 1.2), pld=(1.2, 1.3)).agree


def test_nothing_spent_is_zero_for_both() -> None:
    assert compare([], DELTA) == Compared(delta=DELTA, prv=(0.0, 0.0), pld=(0.0, 0.0))


def test_a_budget_of_rows_holds_whatever_the_run(ledger: Ledger) -> None:
    for number in range(1, 21):
        ledger.reserve(ROWS, f"run-{number}", 1, SPEND, [limit(3.76)])
    before = ledger.events()

    with pytest.raises(
        PrivacyError,
        match=r"from 3\.755 to 3\.852 at delta = 0\.0001, above the budget of the test of 3\.76: "
        r"200 steps are spent.* No such round would still fit, 0 of its \d+ steps would",
    ):
        ledger.reserve(ROWS, "another", 1, SPEND, [limit(3.76)])

    assert ledger.events() == before


def test_the_refusal_counts_the_steps_that_would_fit(ledger: Ledger) -> None:
    ledger.reserve(ROWS, "run", 1, SPEND)
    fit = repeats_within([SPEND], spend(steps=1), epsilon=1.5, delta=DELTA, most=100)
    assert 0 < fit < 50

    with pytest.raises(PrivacyError, match=rf"No such round would still fit, {fit} of its"):
        ledger.reserve(ROWS, "run", 2, spend(steps=50), [limit(1.5)])


def test_a_budget_is_that_of_the_row_that_has_spent_most(ledger: Ledger) -> None:
    budget = limit(epsilon_of([SPEND, SPEND], DELTA))
    ledger.reserve(rows("old"), "run", 1, SPEND)
    ledger.reserve(rows("old", "new"), "run", 2, SPEND, [budget])

    ledger.reserve(rows("new"), "run", 3, SPEND, [budget])
    ledger.reserve(rows("unseen"), "run", 4, SPEND, [budget])

    for spent in (["old"], ["new"], ["unseen", "old"]):
        with pytest.raises(PrivacyError, match="above the budget"):
            ledger.reserve(rows(*spent), "run", 5, SPEND, [budget])


def test_a_budget_over_the_site_counts_every_event(ledger: Ledger) -> None:
    budget = limit(epsilon_of([SPEND, SPEND], DELTA), over="site")
    for name in ("a", "b"):
        ledger.reserve(rows(name), name, 1, SPEND, [budget])

    with pytest.raises(PrivacyError, match="above the budget"):
        ledger.reserve(rows("c"), "c", 1, SPEND, [budget])


def test_a_budget_over_a_run_counts_what_the_run_did(ledger: Ledger) -> None:
    budget = limit(epsilon_of([SPEND, SPEND], DELTA), over="run")
    for run in ("one", "other"):
        for name in ("a", "b"):  # other rows in between do not make room
            ledger.reserve(rows(name), run, 1, SPEND, [budget])
        with pytest.raises(PrivacyError, match="above the budget"):
            ledger.reserve(rows("c"), run, 1, SPEND, [budget])


def test_of_two_processes_that_reserve_at_once_one_is_refused(ledger: Ledger) -> None:
    ledger.reserve(ROWS, "run", 1, SPEND)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from anabranch.client.ledger import Ledger, Limit\n"
        "from anabranch.client.privacy import epsilon_of\n"
        "from anabranch.protocols.errors import PrivacyError\n"
        "from tests.ledgers import SPEND, rows\n"
        "budget = Limit(epsilon=epsilon_of([SPEND] * 2, 1e-4), delta=1e-4, over='row', name='b')\n"
        "sys.stdout.write('ready\\n')\n"
        "sys.stdout.flush()\n"
        "sys.stdin.readline()\n"
        "try:\n"
        "    Ledger(Path(sys.argv[1])).reserve(rows(*range(5)), 'run', 2, SPEND, [budget])\n"
        "except PrivacyError as error:\n"
        "    sys.exit(0 if 'above b of' in str(error) else 1)\n"
        "sys.exit(7)\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(ledger.path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for one in both:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in both:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    codes = sorted(one.wait() for one in both)
    for one in both:
        assert one.stdin is not None
        assert one.stdout is not None
        one.stdin.close()
        one.stdout.close()

    assert codes == [0, 7]
    assert len(ledger.history()) == 2


# Published ways to undercount


def test_a_fresh_accountant_per_round_hides_most_of_the_cost(ledger: Ledger) -> None:
    # 20 rounds of 10 steps: every round for itself says 1.004, the run costs 3.75
    for number in range(1, 21):
        ledger.settle(ledger.reserve(ROWS, "run", number, SPEND), SPEND)
    fresh = PRVAccountant()
    fresh.history = [(1.2, 0.064, 10)]

    assert fresh.get_epsilon(DELTA) == pytest.approx(1.004, abs=0.001)
    assert ledger.spent(ROWS, DELTA) == pytest.approx(3.75, abs=0.01)
    low, high = pld_bounds(ledger.history(), DELTA)
    assert low <= 3.75 <= high + 0.01


def test_a_client_is_charged_for_the_rounds_it_did_and_not_for_those_expected(
    ledger: Ledger,
) -> None:
    # cohorts of half the clients: 10 of 20 rounds are expected, this client was drawn 16 times
    budget = limit(epsilon_of([SPEND] * 10, DELTA), over="run")
    drawn = 16
    done = 0
    for number in range(1, drawn + 1):
        try:
            ledger.settle(ledger.reserve(ROWS, "run", number, SPEND, [budget]), SPEND)
        except PrivacyError as error:
            assert "above the budget of the test" in str(error)  # noqa: PT017
        else:
            done += 1

    assert done == 10
    assert ledger.spent(ROWS, DELTA) <= budget.epsilon
    assert epsilon_of([SPEND] * drawn, DELTA) > 1.25 * budget.epsilon


@pytest.mark.parametrize(("n", "true"), [(199, 1.45), (172, 1.57), (85, 2.29), (30, 4.10)])
def test_noise_for_one_step_per_round_does_not_pay_for_a_hundred(
    ledger: Ledger, n: int, true: float
) -> None:
    # The hospitals of Fed-Heart in FLamby: 15 rounds of 100 steps, noise calibrated for 15 epochs
    # at Opacus' sample rate, one over the number of batches
    batch, rounds, steps = 4, 15, 100
    batches = math.ceil(n / batch)
    planned = plan_for(
        Privacy(epsilon=1.0, delta=DELTA),
        Training(batch_size=batch, local_steps=batches),
        rounds,
        batch * batches,
    )
    one = planned.spend(steps)
    reached = 0
    for number in range(1, rounds + 1):
        try:
            ledger.settle(ledger.reserve(ROWS, "run", number, one, [limit(1.0, "run")]), one)
        except PrivacyError:
            break
        reached = number

    assert reached < rounds
    assert ledger.spent(ROWS, DELTA) <= 1.0
    assert epsilon_of([one] * rounds, DELTA) == pytest.approx(
        true, rel=0.02
    )  # to Opacus' tolerance in σ


def test_a_budget_divided_by_rounds_is_not_what_the_rounds_cost(ledger: Ledger) -> None:
    # ε/T per round, each round calibrated alone, spends another ε than ε
    rounds, steps = 10, 5
    alone = plan_for(Privacy(epsilon=0.3, delta=DELTA), Training(local_steps=steps), 1, 500)
    whole = plan_for(Privacy(epsilon=3.0, delta=DELTA), Training(local_steps=steps), rounds, 500)
    for number in range(1, rounds + 1):
        ledger.settle(ledger.reserve(ROWS, "run", number, alone.spend(steps)), alone.spend(steps))

    assert ledger.spent(ROWS, DELTA) < 0.6 * 3.0
    assert whole.noise_multiplier < 0.5 * alone.noise_multiplier
