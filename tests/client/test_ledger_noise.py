"""Noise of secure sums in a site's ledger: chained like all else, records and clients apart."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.ledger import Ledger, Limit
from anabranch.client.ledger_report import report, verify
from anabranch.client.privacy import epsilon_bounds, epsilon_of
from anabranch.client.site_file import ledger_of, read_site
from anabranch.protocols import rdp
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.spend import Skellam, Spend, Unit
from anabranch.storage.chain import spend_of
from tests.ledgers import SPEND, change, rows
from tests.runs import write_site, write_table

ROWS = rows("a", "b")
SENSITIVITIES = Skellam(l1=900.0, l2=30.0, slack=1e-9)


def noised(unit: Unit = "record", rate: float = 0.1, steps: int = 1) -> Spend:
    return Spend(
        noise_multiplier=2.0,
        sample_rate=1.0 if unit == "client" else rate,
        steps=steps,
        skellam=SENSITIVITIES,
        unit=unit,
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "site" / "ledger.sqlite")


# Laws


@settings(max_examples=10, deadline=None)
@given(
    script=st.lists(
        st.sampled_from([SPEND, noised(), noised(rate=0.3), noised("client")]), max_size=6
    )
)
def test_what_was_reserved_is_read_back_and_the_units_are_never_mixed(
    tmp_path_factory: pytest.TempPathFactory, script: list[Spend]
) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("site") / "ledger.sqlite")
    for number, one in enumerate(script, 1):
        ledger.settle(ledger.reserve(ROWS, "run", number, one), one)
    for unit in ("record", "client"):
        own = [one for one in script if one.unit == unit]
        assert ledger.history(unit=unit) == own
        assert ledger.spent(ROWS, 1e-5, unit) == epsilon_of(own, 1e-5) == ledger.epsilon(1e-5, unit)


def test_one_skellam_spend_turns_the_whole_history_to_renyi_divergences() -> None:
    mixed = [SPEND, noised()]
    assert epsilon_of(mixed, 1e-5) == rdp.epsilon_of(mixed, 1e-5)
    assert epsilon_bounds(mixed, 1e-5) == (0.0, rdp.epsilon_of(mixed, 1e-5))
    assert epsilon_of(mixed, 1e-5) > epsilon_of([SPEND], 1e-5)
    assert epsilon_of([SPEND], 1e-5) < rdp.epsilon_of([SPEND], 1e-5)  # the closer PRV


# Literal examples


def test_an_event_says_its_mechanism_and_a_gaussian_one_is_what_it_always_was(
    ledger: Ledger,
) -> None:
    for number, one in enumerate((SPEND, noised(), noised("client")), 1):
        ledger.reserve(ROWS, "run", number, one)
    bodies = [json.loads(e.text) for e in ledger.events() if e.kind == "reserve"]
    plain, record, client = bodies
    assert list(plain) == [
        "data",
        "run",
        "round",
        "noise_multiplier",
        "sample_rate",
        "steps",
        "time",
        "mechanism",
        "neighbouring",
    ]
    assert record["mechanism"] == client["mechanism"] == "poisson-subsampled-skellam"
    assert record["skellam"] == {"l1": 900.0, "l2": 30.0, "slack": 1e-9}
    assert record["neighbouring"] == plain["neighbouring"] == "add-or-remove-one-record"
    assert client["neighbouring"] == "zero-out-one-client"
    state = ledger.state()
    assert state is not None
    assert [spend_of(body) for body in state.reserved.values()] == [
        SPEND,
        noised(),
        noised("client"),
    ]


def test_a_limit_counts_its_own_unit(ledger: Ledger) -> None:
    client = noised("client")
    limit = Limit(epsilon=epsilon_of([client] * 2, 1e-5), delta=1e-5, over="run", name="budget")
    for number in (1, 2):
        ledger.reserve(ROWS, "run", number, noised(steps=50))  # costs a client nothing
        ledger.reserve(ROWS, "run", number, client, [limit])
    with pytest.raises(PrivacyError, match="above budget"):
        ledger.reserve(rows("z"), "run", 3, client, [limit])  # other rows are the same client
    row = Limit(epsilon=epsilon_of([client] * 2, 1e-5), delta=1e-5, over="row", name="budget")
    with pytest.raises(PrivacyError, match="above budget"):
        ledger.reserve(rows("z"), "other", 1, client, [row])


def test_what_was_settled_is_what_was_reserved(ledger: Ledger) -> None:
    entry = ledger.reserve(ROWS, "run", 1, noised())
    other = Spend(noise_multiplier=2.0, sample_rate=0.1, steps=1)
    with pytest.raises(PrivacyError, match="training spent"):
        ledger.settle(entry, other)
    found = ledger.confirm(entry, "run", 1, noised(), 1e-5)
    assert found is not None
    assert found[1] == epsilon_of([noised()], 1e-5)


def test_a_client_that_took_part_is_confirmed_as_a_client(ledger: Ledger) -> None:
    ledger.reserve(ROWS, "run", 1, noised(steps=100))
    entry = ledger.reserve(ROWS, "run", 1, noised("client"))
    found = ledger.confirm(entry, "run", 1, noised("client"), 1e-5)
    assert found is not None
    assert found[1] == epsilon_of([noised("client")], 1e-5)


# Refusals


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"l2":30.0', '"l2":300.0'),
        ("zero-out-one-client", "add-or-remove-one-record"),
    ],
)
def test_an_edited_event_stops_training(ledger: Ledger, before: str, after: str) -> None:
    ledger.reserve(ROWS, "run", 1, noised("client"))
    change(ledger.path, f"UPDATE events SET body = replace(body, '{before}', '{after}')")
    with pytest.raises(PrivacyError, match="was changed"):
        ledger.spent(ROWS, 1e-5)


# Reports


def test_the_report_has_both_units_apart_and_verify_says_what_it_could_check(
    tmp_path: Path,
) -> None:
    folder = write_site(tmp_path / "north", "north", write_table(tmp_path / "records.csv", n=20))
    ledger = ledger_of(folder, read_site(folder))
    for number, one in enumerate((SPEND, noised(), noised("client"), noised("client")), 1):
        ledger.settle(ledger.reserve(ROWS, "r1", number, one), one)
    ledger.reserve(ROWS, "r2", 1, noised("client"))

    found, checked = report(folder), verify(folder)

    (group,) = found.sets
    assert (group.rounds, group.open) == (2, 0)
    assert group.epsilon == epsilon_of([SPEND, noised()], group.delta) == found.everything
    assert found.client is not None
    assert (found.client.rounds, found.client.open, found.client.runs) == (3, 1, ("r1", "r2"))
    assert found.client.epsilon == epsilon_of([noised("client")] * 3, found.client.delta)
    assert found.as_dict()["client"]["rounds"] == 3
    assert checked.ok
    assert checked.renyi == {
        group.data: (group.epsilon, group.delta),
        "client": (found.client.epsilon, found.client.delta),
    }
    assert checked.epsilons[group.data].prv[1] == epsilon_of([SPEND], group.delta)
    assert checked.as_dict()["renyi"]["client"]["delta"] == found.client.delta
    assert math.isfinite(group.epsilon)


def test_a_ledger_of_clients_alone_has_spent_nothing_on_records(tmp_path: Path) -> None:
    folder = write_site(tmp_path / "north", "north", write_table(tmp_path / "records.csv", n=20))
    ledger_of(folder, read_site(folder)).reserve(ROWS, "r1", 1, noised("client"))
    (one,) = report(folder).sets
    assert (one.rounds, one.epsilon, one.first) == (0, 0.0, "")
    assert verify(folder).ok
