"""Experiments over a population, from their tables to their run folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from anabranch.protocols.errors import ConfigError, DataError, RunError
from anabranch.server.statement.guarantees import LISTED
from anabranch.simulations import engines
from anabranch.simulations.experiment import load
from anabranch.simulations.experiments.compare import compare
from anabranch.simulations.experiments.population_run import show
from anabranch.simulations.experiments.rounds import read_rounds
from anabranch.simulations.experiments.sweep import run_sweep
from anabranch.simulations.simulate import simulate
from tests.runs import PRIVATE, table_text, write_table

ROUNDS = ("rounds = 2", "rounds = 3\ncohort = 10")
QUORUM = ("rounds = 2", "rounds = 2\nquorum = 4\ndeadline_s = 60")
EPOCHS = ("local_epochs = 2", "local_epochs = 10")
BOTH = 'validation = "dev.csv"\ntest = "test.csv"\n'
VIRTUAL = '[devices]\npreset = "hospitals"\n[clock]\noverhead_s = 5.0\n'


def population(
    folder: Path,
    tables: str = "",
    *,
    clients: int = 80,
    options: str = BOTH,
    engine: str = "cohort",
    replacements: tuple[tuple[str, str], ...] = (ROUNDS, EPOCHS),
    extra: str = "",
) -> Path:
    """Write an experiment over a Dirichlet population and return its path."""
    write_table(folder / "train.csv", n=800)
    write_table(folder / "dev.csv", n=60, seed=8)
    write_table(folder / "test.csv", n=90, seed=9)
    (folder / "run.toml").write_text(table_text(*replacements, extra=extra))
    path = folder / "e.toml"
    path.write_text(
        f'run = "run.toml"\nengine = "{engine}"\n{options}'
        f'[population]\ndata = "train.csv"\nclients = {clients}\npartition = "dirichlet"\n'
        f"alpha = 5.0\n{tables}"
    )
    return path


def adapters(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "checkpoints").iterdir())]


@pytest.fixture(scope="module")
def virtual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("virtual")
    path = population(folder, VIRTUAL, options=BOTH + "targets = [0.5, 1.0]\n")
    return folder, simulate(path, folder / "out")


def test_a_population_learns_in_virtual_time(virtual: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = virtual

    assert summary == json.loads((folder / "out" / "summary.json").read_text())
    assert summary["time"] == "virtual"
    assert summary["run_seconds"] >= 3 * 2 * 5.0  # three rounds, two ways of 5 s each
    assert summary["virtual"]["virtual_seconds"] == pytest.approx(summary["run_seconds"])
    assert summary["accuracy"]["federated"] > 0.5
    reached, never = summary["time_to_accuracy"]
    assert reached["seconds"] > 0
    assert never == {"accuracy": 1.0, "round": None, "seconds": None, "bytes": None}
    assert summary["release"]["int8_bytes"] > 0


def test_virtual_time_and_bytes_grow_from_round_to_round(
    virtual: tuple[Path, dict[str, Any]],
) -> None:
    rounds = read_rounds(virtual[0] / "out" / "rounds.csv")

    assert [one.round for one in rounds] == [1, 2, 3]
    assert [one.asked for one in rounds] == [10, 10, 10]
    for before, after in itertools.pairwise(rounds):
        assert before.seconds < after.seconds
        assert (before.bytes or 0) < (after.bytes or 0)
    assert rounds[-1].seconds == pytest.approx(virtual[1]["run_seconds"])


def test_every_message_is_in_the_table_of_messages(
    virtual: tuple[Path, dict[str, Any]],
) -> None:
    table = pq.read_table(virtual[0] / "out" / "messages.parquet")

    assert table.num_rows == sum(virtual[1]["virtual"]["answers"].values())


def test_the_same_seed_is_the_same_run_on_every_engine_and_another_is_not(
    virtual: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path = population(tmp_path, VIRTUAL)

    simulate(path, tmp_path / "again")
    simulate(path, tmp_path / "other", seed=4)
    one = simulate(path, tmp_path / "sequential", engine="sequential")

    assert adapters(tmp_path / "again") == adapters(virtual[0] / "out")
    assert adapters(tmp_path / "other") != adapters(virtual[0] / "out")
    assert one["run_seconds"] == virtual[1]["run_seconds"]
    assert one["accuracy"]["federated"] == pytest.approx(
        virtual[1]["accuracy"]["federated"], abs=1 / 80
    )


def test_summary_and_events_are_small_whatever_the_number_of_clients(tmp_path: Path) -> None:
    path = population(tmp_path, clients=400, replacements=(("rounds = 2", "rounds = 2"),))

    summary = simulate(path, tmp_path / "out")

    assert summary["population"]["clients"] == 400
    assert summary["population"]["trained"] == 400
    assert summary["population"]["deltas"] == 800
    assert summary["sites"] == summary["num_examples"] == summary["failures"] == {}
    for name, size in {"summary.json": 6_000, "events.jsonl": 6_000, "report.html": 60_000}.items():
        text = (tmp_path / "out" / name).read_text()
        assert len(text) < size
        assert "client-000" not in text
    assert "and 350 more" in (tmp_path / "out" / "release" / "README.md").read_text()
    assert not (tmp_path / "out" / "sites").exists()  # nobody had to keep anything


def test_few_clients_are_named(tmp_path: Path) -> None:
    path = population(tmp_path, clients=5, replacements=(("rounds = 2", "rounds = 1"),))

    summary = simulate(path, tmp_path / "out")

    assert summary["population"] is None
    assert list(summary["num_examples"]) == [f"client-{i:06d}" for i in range(5)]
    assert "client-000003" in (tmp_path / "out" / "report.html").read_text()


STEPS = ("local_epochs = 2", "local_steps = 2")


def test_fresh_noise_is_released_and_never_the_same_twice(tmp_path: Path) -> None:
    one_round = (STEPS, ("rounds = 2", "rounds = 1"))
    tables = PRIVATE + "[release]\nint8_tolerance = 0.9\n"  # whatever noise there is
    path = population(tmp_path, clients=4, replacements=one_round, extra=tables)

    first = simulate(path, tmp_path / "a")
    simulate(path, tmp_path / "b")

    assert first["release"] is not None
    assert all(7.9 < epsilon <= 8.0 for epsilon in first["epsilon"].values())
    assert adapters(tmp_path / "a") != adapters(tmp_path / "b")


def test_seeded_noise_can_be_repeated_and_nothing_is_released(tmp_path: Path) -> None:
    path = population(
        tmp_path,
        clients=4,
        options=BOTH + "seeded_noise = true\n",
        replacements=(STEPS, ("rounds = 2", "rounds = 1")),
        extra=PRIVATE,
    )

    first = simulate(path, tmp_path / "a")
    simulate(path, tmp_path / "b")

    assert adapters(tmp_path / "a") == adapters(tmp_path / "b")
    assert first["release"] is None
    assert "nobody is protected" in first["release_refused"]
    assert not (tmp_path / "a" / "release").exists()
    assert "nobody is protected" in (tmp_path / "a" / "report.html").read_text()


def test_more_private_clients_than_can_be_listed_have_no_release(tmp_path: Path) -> None:
    path = population(
        tmp_path,
        clients=LISTED + 1,
        replacements=(STEPS, ("rounds = 2", "rounds = 1")),
        extra=PRIVATE,
    )

    summary = simulate(path, tmp_path / "out")

    assert "a release lists the guarantee of each" in summary["release_refused"]
    assert summary["epsilon"] == {}
    assert 0 < summary["population"]["epsilon"] <= 8.0


FAULTS = "[faults]\nlost_answer = 0.2\nsign_flip = 0.2\nlate = 0.2\nrestart = 0.5\n"


def test_faults_are_written_down_and_can_be_replayed(tmp_path: Path) -> None:
    path = population(tmp_path, VIRTUAL + FAULTS)
    first = simulate(path, tmp_path / "a")
    plain = population(tmp_path, VIRTUAL)

    again = simulate(plain, tmp_path / "b", faults=tmp_path / "a" / "faults.toml")
    without = simulate(plain, tmp_path / "c")

    assert first["faults"]["counts"]["sign-flip"] > 0
    assert again["faults"] == first["faults"]
    assert "faults" not in without
    assert adapters(tmp_path / "a") == adapters(tmp_path / "b") != adapters(tmp_path / "c")


def test_a_run_that_fails_says_how_to_replay_it(tmp_path: Path) -> None:
    path = population(tmp_path, "[faults]\nlost_answer = 0.99\n", clients=4, replacements=(QUORUM,))

    with pytest.raises(RunError, match=r"are needed(.|\n)*--faults .*faults\.toml --seed 3"):
        simulate(path, tmp_path / "out")

    assert (tmp_path / "out" / "faults.toml").exists()
    assert not (tmp_path / "out" / "summary.json").exists()


def test_faults_strike_populations_only(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv")
    (tmp_path / "run.toml").write_text(table_text())
    (tmp_path / "e.toml").write_text('run = "run.toml"\n[sites]\na = "a.csv"\n')
    (tmp_path / "faults.toml").write_text("seed = 1\n")

    with pytest.raises(ConfigError, match=r"faults strike a \[population\]"):
        simulate(tmp_path / "e.toml", tmp_path / "out", faults=tmp_path / "faults.toml")


def test_a_sweep_over_the_population_can_be_compared(tmp_path: Path) -> None:
    sweep = '[sweep]\nseeds = [0, 1]\n"population.alpha" = [0.1, 10.0]\n'
    run_sweep(population(tmp_path, VIRTUAL + sweep), tmp_path / "out")

    compared, numbers = compare([tmp_path / "out"], output=tmp_path / "c.html")

    assert [one["name"] for one in numbers["groups"]] == ["alpha-0.1", "alpha-10.0"]
    assert compared.time == "virtual"
    assert "virtual time" in (tmp_path / "c.html").read_text()


def test_a_population_is_drawn_without_a_run(tmp_path: Path) -> None:
    shown = show(population(tmp_path, VIRTUAL), page=tmp_path / "population.html")

    assert (shown["clients"], shown["records"], shown["seed"]) == (80, 800, 3)
    assert "clients" in shown["text"]
    assert (tmp_path / "population.html").read_text().startswith("<!doctype html>")


def test_records_that_break_the_contract_are_refused_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    path = population(tmp_path)
    (tmp_path / "train.csv").write_text("a,b,y\n1,x,yes\n")

    with pytest.raises(DataError, match="row 1"):
        simulate(path, tmp_path / "out")

    assert not (tmp_path / "out").exists()


POPULATION = '[population]\ndata = "train.csv"\nclients = 2\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f'{POPULATION}[sites]\na = "a.csv"\n', r"\[sites\] and a \[population\]: leave one"),
        ('[sites]\na = "a.csv"\n[clock]\n', r"\[clock\] goes with \[population\], not"),
        ('[sites]\na = "a.csv"\n[faults]\n', r"\[faults\] goes with"),
        ('[sites]\na = "a.csv"\n[devices]\npreset = "phones"\n', r"\[devices\] goes with"),
        (f'engine = "flower"\n{POPULATION}[clock]\n', 'engine = "flower" runs in real time'),
        (f"seeded_noise = true\n{POPULATION}", r"seeded_noise is for runs with \[privacy\]"),
        ('seeded_noise = true\n[sites]\na = "a.csv"\n', r"seeded_noise goes with \[population\]"),
        ('[population]\ndata = "train.csv"\ncolour = 2\n', "unknown field `colour`"),
        ("targets = [1.5]\n" + POPULATION, "<= 1"),
        (f'base_dtype = "bf16"\n{POPULATION}', 'base_dtype = "bf16" is for engine "cohort"'),
        (f'base_dtype = "fp8"\n{POPULATION}', "Invalid enum value 'fp8'"),
        (f'{POPULATION}[clock]\nmetric = "loss"\n', "Invalid enum value 'loss'"),
        (f"{POPULATION}alpha = inf\n", r"e\.toml: population\.alpha = inf: expected a finite"),
        ("targets = [0.5, nan]\n" + POPULATION, r"targets|finite"),
    ],
)
def test_tables_that_contradict_each_other_are_refused(
    tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "run.toml").write_text(table_text())
    (tmp_path / "e.toml").write_text('run = "run.toml"\n' + text)

    with pytest.raises(ConfigError, match=says):
        load(tmp_path / "e.toml")


def test_partial_work_in_a_private_run_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    path = population(
        tmp_path, "[clock]\npartial_work = true\n", replacements=(STEPS,), extra=PRIVATE
    )

    with pytest.raises(ConfigError, match=r"partial_work = true does not go with \[privacy\]"):
        simulate(path, tmp_path / "out")

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "given", "says"),
    [
        ("", {"engine": "flower"}, 'engine = "flower" runs in real time'),
        ('base_dtype = "bf16"\n', {"engine": "sequential"}, 'is for engine "cohort" or "ray"'),
    ],
)
def test_an_engine_given_instead_is_checked_before_anything_is_written(
    tmp_path: Path, options: str, given: dict[str, Any], says: str
) -> None:
    path = population(tmp_path, "[clock]\n", options=options)

    with pytest.raises(ConfigError, match=says):
        simulate(path, tmp_path / "out", **given)

    assert not (tmp_path / "out").exists()


def test_the_base_dtype_of_the_file_is_that_of_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def run(*_: object, **given: object) -> None:
        seen.append(given["base_dtype"])
        raise RunError("seen")

    monkeypatch.setattr(engines, "run", run)
    for number, options in enumerate(("", 'base_dtype = "bf16"\n')):
        with pytest.raises(RunError, match="seen"):
            simulate(population(tmp_path, options=options), tmp_path / f"out-{number}")

    assert seen == ["fp32", "bf16"]


def test_the_report_says_what_the_devices_paid_and_what_went_wrong(tmp_path: Path) -> None:
    tables = f"{VIRTUAL}[faults]\nlost_answer = 0.1\n"
    path = population(tmp_path, tables, replacements=(QUORUM, EPOCHS))

    summary = simulate(path, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()

    assert '<section id="devices"' in page
    assert f"{summary['virtual']['virtual_seconds']:,.1f} s" in page
    assert f"{summary['virtual']['co2_grams']:,.4g} g" in page
    assert "lost-answer" in page


def test_an_hour_of_the_clock_and_another_of_the_devices_are_refused(tmp_path: Path) -> None:
    tables = '[devices]\npreset = "phones"\nstart_hour_utc = 3\n[clock]\nstart_hour = 9\n'

    with pytest.raises(ConfigError, match=r"clock\.start_hour = 9 and devices\.start_hour_utc = 3"):
        simulate(population(tmp_path, tables), tmp_path / "out")
