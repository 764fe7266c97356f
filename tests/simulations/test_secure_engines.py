from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.client.sums.participant import PARTICIPANTS
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.secagg.agreed_noise import noise_of, values_of
from anabranch.server.evaluation import initial_adapter
from anabranch.simulations import engines
from anabranch.simulations.population.books import SimulatedBooks
from tests.runs import table_run
from tests.secure_cases import furthest, secured, step_of
from tests.simulations.populations import digits_run, population

SIZES = [12, 20, 9, 31, 17, 26]
CLOSE = 2e-4  # a few rounds of training on adapters that differ by a step of the grid


def virtual(folder: Path, config: RunConfig, engine: engines.Engine = "cohort", **more: Any) -> Any:
    clients = population(folder, SIZES)
    return engines.run(
        engine, config, clients, initial_adapter(config), run_name=folder.name, **more
    )


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return secured(digits_run(), value_bits=28)


def in_the_clear(run: RunConfig) -> RunConfig:
    return msgspec.structs.replace(run, secure_aggregation=None)


def require_the_mean_of_one_round(
    folder: Path, engine: engines.Engine, workers: int, extra: str = ""
) -> None:
    """Fail unless an engine's sum is its mean in the clear, up to what the grid rounds off."""
    run = secured(digits_run(("rounds = 2", "rounds = 1"), extra=extra), value_bits=22)
    plain = virtual(folder / "plain", in_the_clear(run), engine, workers=workers)

    got = virtual(folder / "sums", run, engine, workers=workers)

    off = furthest(got.adapter, plain.adapter)
    assert 0 < off <= step_of(run, len(SIZES), [float(size) for size in SIZES])
    assert furthest(got.adapter, initial_adapter(run)) > 100 * off
    assert all(report.failed == {} for report in got.history)


@pytest.mark.parametrize(
    ("engine", "workers"),
    [("sequential", 2), ("cohort", 1), pytest.param("cohort", 2, marks=pytest.mark.slow)],
)
def test_engines_in_this_process_and_in_workers_sum_what_they_average_in_the_clear(
    engine: engines.Engine, workers: int, tmp_path: Path
) -> None:
    require_the_mean_of_one_round(tmp_path, engine, workers)


def test_rounds_that_follow_stay_close(tmp_path: Path, run: RunConfig) -> None:
    plain = virtual(tmp_path / "plain", in_the_clear(run))

    got = virtual(tmp_path / "sums", run)

    assert furthest(got.adapter, plain.adapter) < CLOSE
    assert furthest(got.adapter, initial_adapter(run)) > 10 * CLOSE
    assert all(row.rounds == 2 for row in got.sites.values())


@pytest.mark.parametrize("engine", ["sequential", "cohort"])
def test_heads_that_clients_keep_are_those_of_a_run_in_the_clear(
    tmp_path: Path, engine: engines.Engine
) -> None:
    require_the_mean_of_one_round(tmp_path, engine, 1, extra='[personal]\nhead = "local"\n')

    def heads(name: str) -> list[bytes]:
        folder = tmp_path / name
        return [
            file.read_bytes() for file in sorted(folder.glob(f"*/personal/{name}.kept.adapter"))
        ]

    assert heads("sums") == heads("plain")
    assert len(heads("sums")) == len(SIZES)


def test_what_clients_kept_is_gone_with_the_run(tmp_path: Path, run: RunConfig) -> None:
    virtual(tmp_path, run)

    assert tmp_path.name not in PARTICIPANTS._runs


def test_sites_with_folders_write_down_what_they_gave(
    table_sites: dict[str, Path],
) -> None:
    run = secured(table_run(("rounds = 2", "rounds = 2\nquorum = 2")), minimum=2)
    first = initial_adapter(run)
    clear = in_the_clear(run)

    got = engines.run("sequential", run, table_sites, first, run_name="summed")
    plain = engines.run("sequential", clear, table_sites, first, run_name="plain")

    assert furthest(got.adapter, plain.adapter) < 1e-3
    for folder in table_sites.values():
        given = folder / "secure" / "given" / "summed"
        assert list(msgspec.json.decode(given.read_bytes())) == ["1", "2"]
        assert given.stat().st_mode & 0o777 == 0o600


def test_a_private_run_says_its_steps_and_spends_in_its_books(tmp_path: Path) -> None:
    private = digits_run(
        ("rounds = 2", "rounds = 1"),
        ("batch_size = 10", "batch_size = 4\nlocal_steps = 4"),
        extra="[privacy]\nepsilon = 8.0\n",
    )
    run = secured(private, range=64.0)
    clients = dataclasses.replace(population(tmp_path, SIZES), books=SimulatedBooks())

    result = engines.run("cohort", run, clients, initial_adapter(run), run_name="private")

    (report,) = result.history
    assert {one.steps for one in report.trained.values()} == {4}
    assert {one.num_examples for one in report.trained.values()} == {0}
    assert all(row.epsilon is not None and row.epsilon > 0 for row in result.sites.values())


def test_members_make_the_noise_of_their_records_together(tmp_path: Path) -> None:
    run = digits_run(
        ("rounds = 2", 'rounds = 1\nweighting = "uniform"'),
        ("batch_size = 10", "batch_size = 4\nlocal_steps = 1\nmomentum = 0.0"),
        ("[data.columns]", "[data]\nmin_rows = 9\n[data.columns]"),
        extra='[privacy]\nepsilon = 8.0\ndelta = 1e-5\nnoise = "distributed"\n'
        "[secure_aggregation]\n",
    )
    clients = dataclasses.replace(population(tmp_path, SIZES), books=SimulatedBooks())

    result = engines.run("cohort", run, clients, initial_adapter(run), run_name="together")

    (report,) = result.history
    assert report.failed == {}
    noise = noise_of(run, values_of(result.adapter.spec))
    assert noise is not None
    moved = result.adapter.minus(initial_adapter(run), num_examples=0)
    flat = np.concatenate([a.reshape(-1) for a in moved.arrays.values()]).astype(np.float64)
    deviation = math.sqrt(noise.variance) * noise.step / len(SIZES)  # of a mean's value, at least
    assert 0.7 * deviation < flat.std() < 3 * deviation
    assert all(row.steps == 1 and row.epsilon is not None for row in result.sites.values())


def test_flowers_runtime_with_more_than_one_process_is_refused(
    tmp_path: Path, run: RunConfig
) -> None:
    with pytest.raises(ConfigError, match="more than one worker does not go with"):
        virtual(tmp_path, run, "flower", workers=2)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_leftovers")
@pytest.mark.parametrize(("engine", "workers"), [("ray", 2), ("flower", 1)])
def test_ray_actors_sum_what_they_average_in_the_clear(
    engine: engines.Engine, workers: int, tmp_path: Path
) -> None:
    require_the_mean_of_one_round(tmp_path, engine, workers)
