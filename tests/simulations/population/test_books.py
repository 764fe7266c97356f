"""The books of simulated clients say what a site's ledger says."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client import privacy
from anabranch.client.ledger import Ledger, Limit
from anabranch.client.local import Learned, Local, train_alone
from anabranch.client.models import Models
from anabranch.client.privacy import Spend, epsilon_of, plan_for
from anabranch.client.private_round import Books
from anabranch.client.tuning.lora import read_adapter
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import AnabranchError, ConfigError, PrivacyError
from anabranch.protocols.messages import Assignment, Trained
from anabranch.protocols.tables import Privacy, Training
from anabranch.simulations.cohort.private import train_private_cohort
from anabranch.simulations.population.books import ClientBooks, SimulatedBooks
from anabranch.simulations.population.client import Conduct
from tests.ledgers import SPEND, rows, spend
from tests.simulations.populations import digits_run, population

SMALL = spend(2.0, 0.1, 3)
DELTA = 1e-5


def limit(epsilon: float, over: str, name: str = "the budget of the test") -> Limit:
    return Limit(epsilon=epsilon, delta=DELTA, over=over, name=name)  # type: ignore[arg-type]


def try_reserve(
    books: Books, names: list[int], run: str, one: Spend, limits: list[Limit]
) -> int | str:
    """Return the entry, or the refusal."""
    try:
        return books.reserve(rows(*names), run, 1, one, limits)
    except PrivacyError as error:
        return str(error)


# Laws


@settings(max_examples=12, deadline=None)
@given(
    script=st.lists(
        st.tuples(
            st.lists(st.integers(0, 4), max_size=4),
            st.sampled_from(["first", "second"]),
            st.sampled_from([SPEND, SMALL]),
            st.booleans(),
        ),
        max_size=5,
    ),
    budgets=st.tuples(*(st.sampled_from([0.9, 1.7, 9.0]) for _ in range(3))),
    asked=st.lists(st.integers(0, 6), min_size=1, max_size=4),
)
def test_a_client_is_told_what_a_sites_ledger_would_tell(
    tmp_path_factory: pytest.TempPathFactory,
    script: list[tuple[list[int], str, Spend, bool]],
    budgets: tuple[float, float, float],
    asked: list[int],
) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("site") / "ledger.sqlite")
    books = SimulatedBooks().of("client")
    limits = [limit(e, over) for e, over in zip(budgets, ("run", "row", "site"), strict=True)]
    for names, run, one, settles in script:
        theirs = try_reserve(ledger, names, run, one, limits)
        ours = try_reserve(books, names, run, one, limits)

        assert isinstance(ours, int) == isinstance(theirs, int)
        if isinstance(ours, int) and isinstance(theirs, int):
            if settles:
                ledger.settle(theirs, one)
                books.settle(ours, one)
        else:
            assert ours == theirs
        assert books.history() == ledger.history()
        assert books.history("first") == ledger.history("first")
        if names:
            assert books.spent(rows(*names), DELTA) == ledger.spent(rows(*names), DELTA)

    assert books.spent(rows(*asked), DELTA) == ledger.spent(rows(*asked), DELTA)


@settings(max_examples=20, deadline=None)
@given(script=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([SPEND, SMALL]))))
def test_clients_have_budgets_of_their_own(script: list[tuple[str, Spend]]) -> None:
    books = SimulatedBooks()
    for name, one in script:  # the same rows: what another client spends is not its spend
        books.of(name).reserve(rows("x"), "run", 1, one)

    for name in "abc":
        assert books.of(name).history() == [one for who, one in script if who == name]


# Refusals


def test_a_budget_that_would_be_exceeded_is_named_with_what_still_fits() -> None:
    books = SimulatedBooks().of("client-000003")
    run = Limit(epsilon=1.0, delta=DELTA, over="run", name="the run's [privacy] budget")
    while epsilon_of([*books.history(), SMALL], DELTA) <= 1.0:
        books.reserve(rows("x"), "run", 1, SMALL, [run])
    spent = books.history()

    with pytest.raises(PrivacyError, match=r"above the run's \[privacy\] budget of 1: .* would"):
        books.reserve(rows("x"), "run", 9, SPEND, [run])

    assert books.history() == spent
    assert spent


def test_a_new_run_has_its_own_budget_but_the_rows_keep_theirs() -> None:
    books, cost = SimulatedBooks().of("client"), epsilon_of([SPEND], DELTA)
    books.reserve(rows("x", "y"), "first", 1, SPEND, [limit(cost, "run"), limit(cost, "row")])

    books.reserve(rows("x", "y"), "second", 1, SPEND, [limit(cost, "run")])
    with pytest.raises(PrivacyError, match="the budget of the test"):
        books.reserve(rows("y", "z"), "third", 1, SPEND, [limit(cost, "row")])
    books.reserve(rows("z"), "third", 1, SPEND, [limit(cost, "row")])


def test_nothing_can_be_reserved_for_no_records() -> None:
    with pytest.raises(PrivacyError, match="0 records"):
        SimulatedBooks().of("client").reserve([], "run", 1, SPEND)


def test_an_entry_is_settled_once_and_with_what_it_reserved() -> None:
    books = SimulatedBooks().of("client-000007")
    entry = books.reserve(rows("x"), "run", 1, SPEND)

    with pytest.raises(PrivacyError, match=r"client-000007: entry 1 reserved .*nothing may leave"):
        books.settle(entry, SMALL)
    assert books.settle(entry, SPEND) == "simulated:client-000007:1"  # no hash, and it says so
    for closed in (entry, 0, 2):
        with pytest.raises(PrivacyError, match="is not open, nothing may leave"):
            books.settle(closed, SPEND)
    assert books.history() == [SPEND]


# Populations


def test_every_client_of_a_population_has_books_of_its_own(tmp_path: Path) -> None:
    clients = dataclasses.replace(population(tmp_path, [5, 5, 5]), books=SimulatedBooks())

    clients.site(1).books.reserve(rows("x"), "run", 1, SPEND)

    again = [clients.site(i).books for i in range(3)]
    assert [ledger.spent(rows("x"), DELTA) > 0 for ledger in again] == [False, True, False]
    assert isinstance(again[1], ClientBooks)
    assert again[1].client == "client-000001"


def test_books_travel_to_other_processes() -> None:
    books = SimulatedBooks()
    books.of("a").reserve(rows("x"), "run", 1, SPEND)

    assert pickle.loads(pickle.dumps(books)).of("a").history() == [SPEND]  # noqa: S301 - our own


def test_clients_of_one_size_share_one_plan_and_one_accounting() -> None:
    asked, training = Privacy(epsilon=4.0), Training(batch_size=10, local_steps=5)
    books = SimulatedBooks()
    plan_for(asked, training, 20, 50)
    first = books.of("first")
    first.reserve(rows("x"), "run", 1, SMALL, [limit(9.0, "run")])
    first.spent(rows("x"), DELTA)
    plans, costs = privacy.least_noise.cache_info(), privacy._bounds.cache_info()

    for i in range(100):
        plan_for(asked, training, 20, 50)
        own = books.of(f"client-{i:06d}")
        own.reserve(rows(i), "run", 1, SMALL, [limit(9.0, "run"), limit(9.0, "row")])
        own.spent(rows(i), DELTA)

    assert privacy.least_noise.cache_info().misses == plans.misses
    assert privacy._bounds.cache_info().misses == costs.misses
    assert privacy.least_noise.cache_info().maxsize == privacy.CACHED >= 10_000


def test_a_private_population_trains_together_as_its_clients_do_alone(tmp_path: Path) -> None:
    def alone(locals: list[Local]) -> list[Learned | AnabranchError]:
        return [train_alone(local) for local in locals]

    one_by_one = _a_round(tmp_path / "alone", alone)
    together = _a_round(tmp_path / "cohort", train_private_cohort)

    assert len(together) == 3
    for (ours, delta), (theirs, wanted) in zip(together, one_by_one, strict=True):
        assert ours.epsilon == theirs.epsilon
        assert ours.epsilon is not None
        assert 3.5 < ours.epsilon <= 4.0
        assert ours.ledger == f"simulated:{ours.site}:1"
        for name, array in wanted.arrays.items():
            np.testing.assert_allclose(delta.arrays[name], array, rtol=1e-5, atol=1e-5)
    assert together[0][0].noise_multiplier == together[1][0].noise_multiplier  # of one size


@pytest.mark.parametrize(
    "conduct",
    [
        Conduct(step_limit=lambda name, number, planned: planned),
        Conduct(training_of=lambda name, training: training),
    ],
)
def test_conduct_that_changes_a_private_plan_is_refused_and_nothing_is_spent(
    tmp_path: Path, conduct: Conduct
) -> None:
    changes = ("batch_size = 10", "batch_size = 10\nlocal_steps = 3"), ("rounds = 2", "rounds = 1")
    config = digits_run(*changes, extra="\n[privacy]\nepsilon = 4.0\n")
    site = dataclasses.replace(
        population(tmp_path, [30]), books=SimulatedBooks(), conduct=conduct
    ).site(0)
    adapter = read_adapter(Models().classifier(config, "cpu"))

    with pytest.raises(ConfigError, match=r"does not go with \[privacy\]"):
        site.prepare(Assignment(run="0" * 32, round=1, config=config), adapter)

    assert site.books.spent(site.records(config)[0].identities(), DELTA) == 0.0


def _a_round(
    folder: Path, train: Callable[[list[Local]], list[Learned | AnabranchError]]
) -> list[tuple[Trained, Delta]]:
    """Return what three clients send in the only round of a run; a second one is refused."""
    changes = ("batch_size = 10", "batch_size = 10\nlocal_steps = 3"), ("rounds = 2", "rounds = 1")
    config = digits_run(*changes, extra="\n[privacy]\nepsilon = 4.0\n")
    adapter = read_adapter(Models().classifier(config, "cpu"))  # as it was before any round
    clients = dataclasses.replace(
        population(folder, [30, 30, 12]), books=SimulatedBooks(), conduct=Conduct(noise_seed=3)
    )
    sites = [clients.site(i) for i in range(3)]
    assignment = Assignment(run="0" * 32, round=1, config=config)
    begun = [site.prepare(assignment, adapter) for site in sites]
    sent = []
    for site, one, outcome in zip(sites, begun, train([b.local for b in begun]), strict=True):
        assert isinstance(outcome, Learned)
        report, delta = site.finish(one, outcome)
        assert isinstance(delta, Delta)
        sent.append((report, delta))
    with pytest.raises(PrivacyError, match=r"above the run's \[privacy\] budget of 4"):
        sites[0].prepare(assignment, adapter)
    return sent
