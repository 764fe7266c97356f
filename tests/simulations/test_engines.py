from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from anabranch.protocols.errors import ConfigError, RunError
from anabranch.server.evaluation import initial_adapter
from anabranch.server.result import Result
from anabranch.simulations import engines
from anabranch.simulations.population.books import SimulatedBooks
from tests.runs import table_run
from tests.simulations.populations import digits_run, population
from tests.simulations.rig import SIZES, ToySite, adapter, config

SITES = {name: Path(name) for name in SIZES}  # a toy site's folder is its name


def open_toy(folder: Path) -> ToySite:
    return ToySite(folder.name, SIZES[folder.name])


def run_on(engine: engines.Engine, **federation: int) -> Result:
    return engines.run(
        engine,
        config(**federation),
        SITES,
        adapter(),
        run_name="toy-1",
        workers=2,
        open_site=open_toy,
    )


def assert_same_adapter(a: Result, b: Result) -> None:
    assert all(report.update_norm > 0.01 for report in a.history)
    for name, array in a.adapter.arrays.items():
        np.testing.assert_allclose(array, b.adapter.arrays[name], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_leftovers")
def test_flowers_simulation_runtime_gives_the_same_adapter_as_this_process(
    table_sites: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    run = table_run(
        ("rounds = 2", "rounds = 2\nquorum = 2"), ("batch_size", "holdout = 0.25\nbatch_size")
    )
    first = initial_adapter(run)

    here = engines.run("sequential", run, table_sites, first, run_name="here")
    ray = engines.run("flower", run, table_sites, first, run_name="ray", workers=2)

    assert_same_adapter(here, ray)
    assert here.history[1].client == pytest.approx(ray.history[1].client, abs=1e-5)
    assert [r.asked for r in here.history] == [r.asked for r in ray.history]
    assert "flwr" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("ray_leftovers")
def test_altqr_over_sites_of_unequal_rank_is_the_same_on_both_engines(
    table_sites: dict[str, Path],
) -> None:
    with (table_sites["oncology"] / "site.toml").open("a") as file:
        file.write("max_rank = 1\n")
    run = table_run(
        ("rounds = 2", 'rounds = 2\nquorum = 2\nmethod = "altqr"'),
        extra='[uplink]\ncodec = "int8"\nerror_feedback = true\n',
    )
    first = initial_adapter(run)

    here = engines.run("sequential", run, table_sites, first, run_name="here")
    ray = engines.run("flower", run, table_sites, first, run_name="ray", workers=2)

    assert_same_adapter(here, ray)
    assert [row.max_rank for row in here.sites.values()] == [None, 1]
    assert [r.method for r in ray.history] == ["altqr", "altqr"]
    assert all(r.sites["oncology"].bytes_up < r.sites["cardiology"].bytes_up for r in (here, ray))


def test_the_order_in_which_sites_are_given_does_not_matter() -> None:
    backwards = dict(sorted(SITES.items(), reverse=True))
    turned = engines.run(
        "sequential", config(), backwards, adapter(), run_name="toy-1", open_site=open_toy
    )

    assert_same_adapter(turned, run_on("sequential"))


def test_an_unknown_engine_is_refused() -> None:
    engines = "'sequential', 'cohort', 'ray' or 'flower'"
    with pytest.raises(ConfigError, match=f"expected {engines}, got 'spark'"):
        run_on("spark")  # type: ignore[arg-type]


def test_a_run_without_sites_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least one site, got none"):
        engines.run("sequential", config(), {}, adapter(), run_name="toy-1")


@pytest.mark.usefixtures("ray_leftovers")
@pytest.mark.parametrize("engine", ["sequential", pytest.param("flower", marks=pytest.mark.slow)])
def test_a_run_fails_with_the_same_sentence_on_either_engine(engine: engines.Engine) -> None:
    with pytest.raises(RunError, match=r"round 1: 9 sites are needed, after .* s there are 4"):
        engines.run(
            engine,
            config(quorum=9),
            SITES,
            adapter(),
            run_name="toy-1",
            open_site=open_toy,
            connect_s=2.0 if engine == "sequential" else 30.0,
        )


def test_fedbuff_is_the_same_run_one_at_a_time_and_in_cohorts() -> None:
    buffered = {"buffer": 2, "cohort": 3, "rounds": 4}
    alone = run_on("sequential", **buffered)
    together = run_on("cohort", **buffered)

    assert_same_adapter(alone, together)
    assert [r.asked for r in alone.history] == [r.asked for r in together.history]
    assert [r.ages for r in alone.history] == [r.ages for r in together.history]


def test_a_private_population_is_refused_where_its_books_would_not_be_kept(tmp_path: Path) -> None:
    clients = dataclasses.replace(population(tmp_path, [5, 5]), books=SimulatedBooks())
    private = digits_run(
        ("batch_size = 10", "batch_size = 10\nlocal_steps = 1"), extra="[privacy]\nepsilon = 8.0\n"
    )
    with pytest.raises(ConfigError, match=r"\[privacy\] in a population: clients move between"):
        engines.run("flower", private, clients, initial_adapter(private), run_name="x-1")
