"""Sites with ledgers in noised secure sums: what each round leaves in their books."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anabranch.client.ledger import Ledger
from anabranch.client.privacy import epsilon_of
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.secagg.agreed_noise import noise_of, values_of
from anabranch.protocols.secagg.noise import DistributedNoise
from anabranch.server.evaluation import initial_adapter
from anabranch.simulations import engines
from tests.runs import table_run, write_site, write_table

CLIENT = "[client_privacy]\nepsilon = 8.0\npopulation = 500\n[secure_aggregation]\n"
RECORD = '[privacy]\nepsilon = 8.0\ndelta = 1e-5\nnoise = "distributed"\n[secure_aggregation]\n'
SGD = ("local_epochs = 2", 'local_steps = 1\noptimizer = "sgd"\nmomentum = 0.0')


@pytest.fixture
def sites(tmp_path: Path) -> dict[str, Path]:
    """Return three sites of 40 records each."""
    found = {}
    for seed, name in enumerate(("east", "north", "south")):
        data = write_table(tmp_path / f"{name}.csv", seed=seed)
        found[name] = write_site(tmp_path / name, name, data)
    return found


def planned(run: RunConfig, adapter: Adapter) -> DistributedNoise:
    noise = noise_of(run, values_of(adapter.spec))
    assert noise is not None
    return noise


def test_a_client_has_a_row_for_every_round_it_took_part_in(sites: dict[str, Path]) -> None:
    uniform = ("rounds = 2", 'rounds = 2\nweighting = "uniform"\nclient_evaluation = false')
    run = table_run(uniform, extra=CLIENT)
    first = initial_adapter(run)

    result = engines.run("sequential", run, sites, first, run_name="clients")

    noise = planned(run, first)
    assert [report.round for report in result.history] == [1, 2]
    assert all((report.asked, report.trained) == ((), {}) for report in result.history)
    assert result.sites == {}  # a client-private run names nobody
    for folder in sites.values():
        ledger = Ledger(folder / "ledger.sqlite")
        state = ledger.state()
        assert state is not None
        assert [(e.run, e.round, e.unit) for e in state.reserved.values()] == [
            ("clients", 1, "client"),
            ("clients", 2, "client"),
        ]
        assert not state.open
        assert ledger.history() == []
        assert ledger.epsilon(noise.delta, "client") == noise.epsilon <= 8.0


def test_a_record_round_is_paid_once_and_the_model_is_noised(sites: dict[str, Path]) -> None:
    uniform = ("rounds = 2", 'rounds = 2\nweighting = "uniform"')
    run = table_run(uniform, SGD, ("[data.columns]", "[data]\nmin_rows = 20\n[data.columns]"),
                    extra=RECORD)  # fmt: skip
    first = initial_adapter(run)

    result = engines.run("sequential", run, sites, first, run_name="records")

    noise = planned(run, first)
    moved = result.adapter.minus(first, num_examples=0)
    flat = np.concatenate([a.reshape(-1) for a in moved.arrays.values()]).astype(np.float64)
    deviation = np.sqrt(2 * noise.variance) * noise.step / 3  # of two rounds of three members
    assert 0.6 * deviation < flat.std() < 3 * deviation
    for name, folder in sites.items():
        ledger = Ledger(folder / "ledger.sqlite")
        spends = ledger.history()
        assert [(s.noise_multiplier, s.steps, s.skellam) for s in spends] == [
            (noise.noise_multiplier, 1, noise.sensitivities)
        ] * 2
        assert result.sites[name].epsilon == epsilon_of(spends, 1e-5) <= noise.epsilon
        assert ledger.state().settled == frozenset(ledger.state().reserved)  # type: ignore[union-attr]
        assert (folder / "secure" / "masked" / "records").exists()
