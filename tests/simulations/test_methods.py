"""Every aggregation method, codec, robust rule and way of personalisation, from file to summary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anabranch.protocols.errors import ConfigError, RunError
from anabranch.simulations.experiment import load
from anabranch.simulations.simulate import simulate
from tests.runs import PRIVATE, table_text, write_table

METHODS = ["fedavg", "ffa", "rolora", "altqr", "fedex", "flora", "flexlora", "hetlora", "fedsa"]
ONE_FACTOR = {"ffa", "rolora", "altqr"}
MIXED = ["fedavg", "ffa", "rolora", "altqr", "flora", "flexlora", "hetlora"]
CODECS = ["fp16", "int8", "int4", "top-k"]
ROBUST = [
    "norm-clipping",
    "median",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "geometric-median",
    "centred-clipping",
]
RANKS = "[ranks]\nnorth = 1\nwest = 2\n"
STEPS = ("local_epochs = 2", "local_steps = 3")
HELD_OUT = ("batch_size", "holdout = 0.25\nbatch_size")


@dataclass(frozen=True)
class Run:
    """A finished simulation."""

    folder: Path
    summary: dict[str, Any]

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [event for line in lines if (event := json.loads(line))["kind"] == kind]

    @property
    def accuracy(self) -> float:
        """Return the sites' mean accuracy after the last round."""
        return float(self.events("round_evaluated")[-1]["client"]["accuracy"])


def write(
    folder: Path,
    federation: str = "",
    *replacements: tuple[str, str],
    extra: str = "",
    ranks: str = "",
    options: str = "",
) -> Path:
    """Write the files of a run of three sites of 60 records and four rounds."""
    for seed, name in enumerate(("north", "south", "west")):
        write_table(folder / f"{name}.csv", n=60, seed=seed)
    rounds = ("rounds = 2", f"rounds = 4\n{federation}")
    (folder / "run.toml").write_text(table_text(rounds, HELD_OUT, *replacements, extra=extra))
    sites = "".join(f'{name} = "{name}.csv"\n' for name in ("north", "south", "west"))
    path = folder / "experiment.toml"
    path.write_text(f'run = "run.toml"\n{options}[sites]\n{sites}{ranks}')
    return path


def run(folder: Path, *args: Any, **texts: str) -> Run:
    return Run(folder / "out", simulate(write(folder, *args, **texts), folder / "out"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(tmp_path: Path, method: str) -> None:
    done = run(tmp_path, f'method = "{method}"')

    assert done.accuracy > 0.8
    rounds = done.events("round_aggregated")
    assert [event["method"] for event in rounds] == [method] * 4
    assert all(event["update_norm"] > 0.1 for event in rounds)
    errors = [event["aggregation_error"] for event in rounds]
    assert done.summary["aggregation_error"] == errors
    if method in ONE_FACTOR:
        assert all(error < 1e-6 for error in errors)
    elif method == "fedsa":
        assert errors == [None] * 4
    else:
        assert all(0 < error < 0.5 for error in errors)


@pytest.mark.parametrize("method", MIXED)
def test_sites_of_unequal_rank_train_together(tmp_path: Path, method: str) -> None:
    done = run(tmp_path, f'method = "{method}"', ranks=RANKS)

    assert done.accuracy > 0.7
    sites = done.summary["sites"]
    assert {name: row["max_rank"] for name, row in sites.items()} == {
        "north": 1,
        "south": None,
        "west": 2,
    }
    assert all((row["rounds"], row["failures"]) == (4, 0) for row in sites.values())
    assert sites["north"]["bytes_up"] < sites["west"]["bytes_up"] < sites["south"]["bytes_up"]


def test_absent_ranks_may_be_skipped(tmp_path: Path) -> None:
    assert run(tmp_path, 'absent_ranks = "skip"', ranks=RANKS).accuracy > 0.7


@pytest.mark.parametrize("method", ["fedex", "fedsa"])
def test_a_method_for_equal_ranks_names_the_site_and_what_to_do(
    tmp_path: Path, method: str
) -> None:
    with pytest.raises(
        RunError,
        match=r"no part for site north: .*lower lora\.rank to 1, (or take|set federation)",
    ):
        run(tmp_path, f'method = "{method}"', ranks=RANKS)


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_with_error_feedback(tmp_path: Path, codec: str) -> None:
    feedback = f'[uplink]\ncodec = "{codec}"\nerror_feedback = true\n'
    (tmp_path / "plain").mkdir()
    plain = run(tmp_path / "plain", 'method = "altqr"')

    done = run(tmp_path, 'method = "altqr"', extra=feedback)

    assert done.accuracy > 0.7
    assert done.summary["bytes_up"] < plain.summary["bytes_up"]
    assert done.summary["aggregation"]["codec"].endswith("error feedback")


@pytest.mark.parametrize("rule", ROBUST)
def test_every_robust_rule(tmp_path: Path, rule: str) -> None:
    done = run(tmp_path, 'method = "ffa"', extra=f'[robust]\nrule = "{rule}"\nbyzantine = 0\n')

    assert done.accuracy > 0.8
    assert done.summary["aggregation"]["robust rule"] == rule


@pytest.mark.parametrize("method", ["altqr", "ffa"])
def test_one_factor_at_a_time_with_differential_privacy(tmp_path: Path, method: str) -> None:
    done = run(tmp_path, f'method = "{method}"', STEPS, extra=PRIVATE)

    assert all(7.9 < epsilon <= 8.0 for epsilon in done.summary["epsilon"].values())
    assert len(done.summary["epsilon"]) == 3
    assert all(event["update_norm"] > 0.1 for event in done.events("round_aggregated"))


def test_ranks_a_private_run_and_a_codec_together(tmp_path: Path) -> None:
    extra = PRIVATE + '[uplink]\ncodec = "int8"\nerror_feedback = true\n'

    done = run(tmp_path, 'method = "altqr"', STEPS, extra=extra, ranks=RANKS)

    assert all(7.9 < epsilon <= 8.0 for epsilon in done.summary["epsilon"].values())


def test_a_buffered_run_counts_merges_and_drops_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, 'method = "ffa"\nbuffer = 2')

    rounds = done.events("round_aggregated")
    assert [len(event["sites"]) for event in rounds] == [2] * 4
    assert done.events("site_late") == []
    assert sum(row["rounds"] for row in done.summary["sites"].values()) == 8


def test_a_private_buffered_run_spends_no_more_than_its_epsilon(tmp_path: Path) -> None:
    done = run(tmp_path, 'method = "ffa"\nbuffer = 1', STEPS, extra=PRIVATE)

    trained = [(event["site"], event["round"]) for event in done.events("site_trained")]
    assert len(trained) == len(set(trained))
    assert all(epsilon <= 8.0 for epsilon in done.summary["epsilon"].values())


# Personalisation


@pytest.mark.parametrize(
    ("federation", "extra", "kept"),
    [
        ('method = "fedsa"', "", "B of every layer"),
        ("", '[personal]\nhead = "local"\n', "the head"),
    ],
)
def test_where_a_part_stays_at_the_sites_nothing_is_released_and_it_says_why(
    tmp_path: Path, federation: str, extra: str, kept: str
) -> None:
    done = run(tmp_path, federation, extra=extra)

    assert done.accuracy > 0.8
    assert done.summary["release"] is None
    assert f"{kept} stays at each site" in done.summary["release_refused"]
    assert done.summary["aggregation"]["kept at the sites"] == kept
    scores = [event["client"]["accuracy"] for event in done.events("round_evaluated")]
    assert done.summary["best_round"] == 1 + scores.index(max(scores))


@pytest.mark.parametrize("records", ["validation", "test"])
def test_the_coordinators_records_are_refused_where_it_has_no_whole_model(
    tmp_path: Path, records: str
) -> None:
    path = write(tmp_path, 'method = "fedsa"', options=f'{records} = "north.csv"\n')

    with pytest.raises(ConfigError, match=rf"{records}: .*evaluate theirs: training\.holdout"):
        load(path)


def test_shared_and_personal_accuracy_of_every_site_are_in_summary_and_report(
    tmp_path: Path,
) -> None:
    done = run(tmp_path, 'method = "altqr"', extra="[personal]\nrank = 2\n", ranks=RANKS)

    accuracy = done.summary["site_accuracy"]
    assert set(accuracy) == {"shared", "personal"}
    assert set(accuracy["shared"]) == set(accuracy["personal"]) == {"north", "south", "west"}
    assert accuracy["shared"] != accuracy["personal"]
    page = (done.folder / "report.html").read_text()
    for word in ("shared", "personal", "Aggregation error", "altqr", "a private adapter of rank 2"):
        assert word in page
