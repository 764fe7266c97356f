"""A site's noised contribution: in the ledger before it can leave, once for every attempt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anabranch.client.ledger import Ledger
from anabranch.client.privacy import epsilon_of
from anabranch.client.site_file import Budget
from anabranch.client.sums.given import InMemory
from anabranch.client.sums.noised import NoisedSum, charged, noised_sum
from anabranch.protocols.adapter import Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError, ProtocolError
from anabranch.protocols.secagg.plan import length
from tests.ledgers import rows
from tests.noise_cases import CLIENT, RECORD, assignment, config, noise, terms
from tests.simulations.rig import SPEC

ROWS = rows(*range(300))


def delta() -> Delta:
    arrays = {n: np.full(shape, 0.01, np.float32) for n, shape in SPEC.tensors}
    return Delta(SPEC, arrays, 300, steps=1)


def site(run: RunConfig, folder: Path, budget: Budget | None = None) -> tuple[NoisedSum, Ledger]:
    ledger = Ledger(folder / "ledger.sqlite")
    found = noised_sum(run, SPEC, books=ledger, rows=ROWS, budget=budget, masked=InMemory())
    assert found is not None
    return found, ledger


def send(
    site: NoisedSum, run: RunConfig, number: int = 1, instance: str = "a1", **more: Any
) -> Any:
    agreed = terms(run, number=number, instance=instance * 32, **more)
    return site.vector(delta(), assignment(run, number), agreed, 5)


def test_a_client_has_one_settled_row_for_every_attempt(tmp_path: Path) -> None:
    run = config(CLIENT)
    found, ledger = site(run, tmp_path)
    first, again = send(found, run), send(found, run, instance="b2")
    send(found, run, number=2)
    state = ledger.state()
    assert state is not None
    assert [(e.run, e.round, e.unit) for e in state.reserved.values()] == [
        ("sums-1", 1, "client"),
        ("sums-1", 1, "client"),
        ("sums-1", 2, "client"),
    ]
    assert not state.open
    assert ledger.history() == []
    assert ledger.epsilon(1e-5, "client") == epsilon_of([noise(run).spend(3)], 1e-5)
    assert first.shape == (length(terms(run)),)
    assert not np.array_equal(first[:29], again[:29])  # noise is drawn anew


def test_a_record_round_was_paid_with_its_training_and_a_second_attempt_is_not(
    tmp_path: Path,
) -> None:
    run = config(RECORD)
    found, ledger = site(run, tmp_path)
    send(found, run)
    assert ledger.history() == []  # the training's own reservation, which this test leaves out
    send(found, run, instance="b2")
    (one,) = ledger.history()
    assert one == noise(run).spend(1, 20 / 300)
    send(found, run, number=2)
    assert len(ledger.history()) == 1


def test_a_budget_that_would_be_exceeded_keeps_the_site_out(tmp_path: Path) -> None:
    run = config(CLIENT)
    found, ledger = site(run, tmp_path)
    for number in range(1, 11):
        send(found, run, number=number)
    with pytest.raises(PrivacyError, match=r"above the run's \[client_privacy\] budget of 6"):
        send(found, run, number=10, instance="b2")
    assert len(ledger.history(unit="client")) == 10


def test_the_sites_own_budget_counts_records(tmp_path: Path) -> None:
    run = config(RECORD)
    spend, _ = charged(run, noise(run), 300, None)
    small = Budget(epsilon=epsilon_of([spend], 1e-5) * 0.99, delta=1e-5)
    found, ledger = site(run, tmp_path, small)
    send(found, run)
    with pytest.raises(PrivacyError, match="Nothing is trained"):
        send(found, run, instance="b2")
    assert ledger.history() == []


def test_terms_of_another_run_cost_nothing(tmp_path: Path) -> None:
    run = config(CLIENT)
    found, ledger = site(run, tmp_path)
    with pytest.raises(ProtocolError, match="the noise of this run is made for"):
        send(found, run, limit=4.0)
    assert ledger.state() is None


def test_a_run_without_such_noise_has_no_such_sum(tmp_path: Path) -> None:
    run = config(RECORD, privacy__noise="local")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    found = noised_sum(run, SPEC, books=ledger, rows=ROWS, budget=None, masked=InMemory())
    assert found is None


def test_a_site_with_too_few_records_takes_no_part() -> None:
    run = config(RECORD)
    with pytest.raises(PrivacyError, match="This site takes no part"):
        charged(run, noise(run), 199, None)
