"""The text benchmark of the aggregation rules measures what the product computes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.lora import load_adapter, read_adapter
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.tables import Lora
from benchmarks import harness
from benchmarks.aggregation import data, federation, gains, grid, model, robustness, runner, tables
from benchmarks.aggregation.federation import Cell, Outcome, Prepared, config_for, federate
from benchmarks.aggregation.grid import Job, Task, Variant

LABELS = ("yes", "no", "maybe")
TEXTS = ("a short one", "fever and chills for three days, worse at night", "no findings")
CELL = Cell(
    dataset="medquad",
    head="fixed",
    clients=4,
    partition="iid",
    epsilon=0.0,
    ranks="mixed",
    rule="altqr",
    seed=1,
)
OUTCOME = Outcome(
    accuracy=0.5,
    macro_f1=0.4,
    uplink_bytes=1000,
    uplink_floats=200,
    downlink_bytes=5000,
    error=0.0,
    cpu_seconds=1.0,
)


def records(texts: tuple[str, ...], labels: list[int]) -> data.Records:
    return data.Records(texts, np.array(labels, np.int64), ())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Return a corpus of random words with three labels, 48 training records."""
    rng = np.random.default_rng(0)
    words = ["fever", "pain", "risk", "gene", "cure", "test", "drug", "care"]
    parts = []
    for count in (48, 9, 9):
        labels = [i % 3 for i in range(count)]
        texts = tuple(
            " ".join(rng.choice(words, 4)) + " " + LABELS[label] * (i % 7 + 1)
            for i, label in enumerate(labels)
        )
        parts.append(records(texts, labels))
    corpus = data.Corpus("medquad", LABELS, *parts)
    return federation.prepare(corpus, tmp_path_factory.mktemp("features"))


def test_logits_and_spec_are_those_of_the_product_with_lora_on_the_same_layer() -> None:
    config = model.config_for("medquad", LABELS, Lora(rank=0))
    source = model.whole(data.Corpus("medquad", LABELS, *[records(TEXTS, [0, 1, 2])] * 3))
    ours = model.classifier(source, Lora(rank=4, alpha=8.0, targets=("dense",)), seed=3)
    theirs = load_classifier(config, lora=Lora(rank=4, alpha=8.0, targets=(model.TARGET,)))
    rng = np.random.default_rng(1)
    adapter = Adapter(
        theirs.spec,
        {
            name: (0.1 * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in theirs.spec.tensors
        },
    )

    assert ours.spec == theirs.spec
    load_adapter(ours, adapter)
    load_adapter(theirs, adapter)
    encoded = theirs.encode(TEXTS)
    rows, mask = collate([torch.from_numpy(row) for row in model.compute(source, encoded)])
    with torch.no_grad():
        got = ours(rows, mask)
        wanted = theirs.logits(*collate(encoded))

    assert float(wanted.abs().max()) > 1
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_features_are_computed_once_and_read_from_the_file(tmp_path: Path) -> None:
    one = records(TEXTS, [0, 1, 2])
    source = model.whole(data.Corpus("medquad", LABELS, one, one, one))
    file = tmp_path / "features.npy"
    first = model.features(source, one, file)
    written = file.stat().st_mtime_ns

    again = model.features(source, one, file)

    assert file.stat().st_mtime_ns == written
    assert len(again) == 3
    assert [len(again[i]) for i in range(3)] == [len(x) for x in source.encode(TEXTS)]
    assert torch.equal(first[1], again[1])


@given(
    st.integers(1, 6),
    st.integers(12, 60),
    st.sampled_from(["iid", "dirichlet-0.5", "dirichlet-0.1"]),
    st.integers(0, 99),
)
def test_partitions_are_equal_disjoint_and_complete(
    clients: int, count: int, kind: str, seed: int
) -> None:
    labels = [i % 3 for i in range(count)]
    one = records(("x",) * count, labels)

    parts = data.partition(one, kind, clients, seed)

    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    again = data.partition(one, kind, clients, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_a_small_alpha_gives_clients_of_few_labels() -> None:
    one = records(("x",) * 1000, [i % 10 for i in range(1000)])

    def labels_per_client(kind: str) -> float:
        parts = data.partition(one, kind, 20, seed=0)
        return float(np.mean([len(set(one.labels[part].tolist())) for part in parts]))

    assert labels_per_client("dirichlet-0.1") + 2 < labels_per_client("iid")


def test_natural_clients_are_the_sources() -> None:
    one = data.Records(("a",) * 4, np.zeros(4, np.int64), ("x", "y", "x", "z"))

    parts = data.partition(one, "natural", 3, seed=0)

    assert [part.tolist() for part in parts] == [[0, 2], [1], [3]]
    with pytest.raises(ValueError, match="there are 3 sources, asked for 4 clients"):
        data.partition(one, "natural", 4, seed=0)


def test_no_disease_of_medquad_is_on_two_sides(shared_data: Path) -> None:
    corpus = data.medquad(shared_data / "medquad")
    parts = (corpus.train, corpus.validation, corpus.test)

    assert len(corpus.labels) == 15
    assert len(set(corpus.train.sources)) == grid.NATURAL_CLIENTS
    focus = {}
    for line in (shared_data / "medquad" / "answers.tsv").read_text().splitlines()[1:]:
        fields = line.split("\t")
        focus[fields[4]] = fields[2]
    sides = [{focus[text] for text in part.texts if text in focus} for part in parts]
    assert min(map(len, sides)) > 100
    shared = (sides[0] & sides[1]) | (sides[0] & sides[2]) | (sides[1] & sides[2])
    # An answer that two diseases share is listed under the last one only.
    assert len(shared) < 0.02 * sum(map(len, sides))


def test_sst2_has_the_sizes_the_page_states(shared_data: Path) -> None:
    corpus = data.sst2(shared_data / "sst2")

    sizes = [len(part) for part in (corpus.train, corpus.validation, corpus.test)]
    assert sizes == [2000, 800, 1821]
    assert len(set(corpus.train.texts)) > 1990


@pytest.mark.parametrize("rule", grid.MIXED)
def test_every_rule_runs_and_a_fixed_head_is_neither_trained_nor_sent(
    rule: str, prepared: Prepared
) -> None:
    cell = dataclasses.replace(CELL, rule=rule)

    outcome = federate(prepared, cell, 1e-2, held="validation", rounds=2)

    # Ranks 2, 4, 8, 2 of four clients: 16 / 4 on average; A and B, or one of them in turn.
    both = 4 * (model.INNER + model.WIDTH)
    floats = {"altqr": both / 2, "rolora": both / 2, "ffa": 4 * model.WIDTH}
    assert outcome.uplink_floats == floats.get(rule, both)
    assert 0 <= outcome.accuracy <= 1
    assert (outcome.error < 1e-6) == (rule in ("altqr", "rolora", "ffa"))


def test_a_fixed_head_is_orthonormal_and_the_same_for_every_rule(prepared: Prepared) -> None:
    heads = []
    for rule in ("altqr", "fedex"):
        config = config_for(dataclasses.replace(CELL, rule=rule), LABELS, 1e-2)
        classifier = model.classifier(prepared.source, config.adapter, seed=CELL.seed)
        heads.append(federation.first_adapter(classifier, CELL).arrays["head.weight"])

    np.testing.assert_array_equal(heads[0], heads[1])
    np.testing.assert_allclose(heads[0] @ heads[0].T, np.eye(3), atol=1e-6)


def test_a_cell_is_a_function_of_its_seed(prepared: Prepared) -> None:
    outcomes = [federate(prepared, CELL, 1e-2, held="validation", rounds=2) for _ in range(2)]

    assert dataclasses.replace(outcomes[0], cpu_seconds=0) == dataclasses.replace(
        outcomes[1], cpu_seconds=0
    )


def test_private_cells_train_through_the_product_s_private_fit(prepared: Prepared) -> None:
    cell = dataclasses.replace(CELL, epsilon=8.0)

    outcome = federate(prepared, cell, 1e-2, held="validation", rounds=2)

    assert outcome.uplink_floats == 4 * (model.INNER + model.WIDTH) / 2


def test_int8_frames_are_a_quarter(prepared: Prepared) -> None:
    plain, int8 = (
        federate(
            prepared, CELL, 1e-2, held="validation", **robustness.options(variant) | {"rounds": 2}
        )
        for variant in (Variant(robust="none"), Variant(codec="int8"))
    )

    assert 0.25 < int8.uplink_bytes / plain.uplink_bytes < 0.3


def test_variants_of_half_and_twice_the_rounds() -> None:
    rounds = [
        robustness.options(Variant(codec="int8", rounds=name))["rounds"]
        for name in ("half", "all", "double")
    ]

    assert rounds == [10, 20, 40]


def test_every_rule_has_the_same_number_of_trials_on_another_seed() -> None:
    cells = grid.plan()

    assert len(cells) == len(set(cells))
    assert {len(grid.trials(cell)) for cell in cells} == {4}
    assert grid.TUNING_SEED not in grid.SEEDS
    assert not any(cell.rule == "fedex" and cell.ranks == "mixed" for cell in cells)
    assert not any(cell.partition == "natural" and cell.dataset == "sst2" for cell in cells)


def test_the_best_rate_is_known_once_all_trials_are() -> None:
    trials = grid.trials(CELL)
    accuracies = dict(zip([t.rate for t in trials], [0.1, 0.7, 0.7, 0.2], strict=True))
    situation = grid.situation(CELL)

    assert grid.best_rate({situation: accuracies}, CELL) == trials[1].rate
    del accuracies[trials[0].rate]
    assert grid.best_rate({situation: accuracies}, CELL) is None


def test_what_was_run_is_read_back_and_not_asked_for_again(tmp_path: Path) -> None:
    attacked = Job(CELL, Variant(robust="krum", attack="flip"))
    for task in (Task(Job(CELL), 0.01), Task(attacked, 0.01)):
        runner.append(tmp_path, task, OUTCOME)
    for trial in grid.trials(CELL):
        runner.append(tmp_path, trial, OUTCOME)

    results, rates = runner.read_results(tmp_path), runner.read_rates(tmp_path)

    assert results == {Job(CELL): OUTCOME, attacked: OUTCOME}
    assert rates == {grid.situation(CELL): dict.fromkeys(grid.RATES, 0.5)}
    missing = runner.run([Job(CELL), attacked], tmp_path, tmp_path, workers=1, seconds=60)
    assert missing == 0
    assert runner.read_results(tmp_path) == results


def test_trials_come_before_the_cell_that_needs_them() -> None:
    waiting, asked = [Job(CELL)], set[Task]()
    first = list(runner._next(waiting, {}, asked, 9))
    assert [task.rate for task in first] == list(grid.RATES)
    assert all(task.tuning for task in first)
    assert list(runner._next(waiting, {}, asked, 9)) == []

    known = {grid.situation(CELL): dict(zip(grid.RATES, (0.1, 0.2, 0.4, 0.3), strict=True))}

    assert list(runner._next(waiting, known, asked, 9)) == [Task(Job(CELL), grid.RATES[2])]
    assert waiting == []


def made_up(accuracies: Mapping[str, list[float]], **changes: Any) -> dict[Job, Outcome]:
    """Return outcomes of rules over seeds 1, 2, 3."""
    return {
        Job(dataclasses.replace(CELL, rule=rule, seed=seed, clients=10, **changes)): (
            dataclasses.replace(OUTCOME, accuracy=accuracy)
        )
        for rule, row in accuracies.items()
        for seed, accuracy in enumerate(row, 1)
    }


def test_a_lead_within_its_interval_is_a_tie() -> None:
    results = made_up({"altqr": [0.50, 0.60, 0.70], "fedavg": [0.51, 0.59, 0.73]})
    mixed = next(line for line in tables.decisions(results).splitlines() if "mixed ranks" in line)

    assert "FedIT (fedavg, absent ranks zero) | -1.0 ± 5.0 | **yes**" in mixed

    clear = made_up({"altqr": [0.50, 0.60, 0.70], "fedavg": [0.61, 0.70, 0.81]})
    mixed = next(line for line in tables.decisions(clear).splitlines() if "mixed ranks" in line)
    assert "-10.7 ± 1.4 | **no**" in mixed


def test_cells_that_were_not_run_are_shown_as_not_run() -> None:
    results = made_up({"altqr": [0.5, 0.6, 0.7], "fedavg": [0.3, 0.3]})
    situation = tables.Situation("fixed", 0.0, "mixed")

    text = tables.grid_table(results, situation, "medquad")

    assert "| AltQR-LoRA | **60.0 ± 10.0** | not run |" in text
    assert "| FedIT (fedavg, absent ranks zero) | 30.0 ± 0.0 (2)" in text
    assert "| FedEx-LoRA | — |" in text
    assert "FFA-LoRA | not run |" in text
    assert tables.grid_table(results, situation, "sst2").endswith("not run.")


def test_the_gain_counts_rules_that_send_no_more() -> None:
    results = made_up(
        {
            "altqr": [0.5, 0.6, 0.7],
            "fedavg": [0.40, 0.52, 0.60],
            "fedavg-skip": [0.45, 0.55, 0.62],
            "flora": [0.9, 0.9, 0.9],
        }
    )
    results |= {
        job: dataclasses.replace(outcome, uplink_bytes=3000)
        for job, outcome in results.items()
        if job.cell.rule == "flora"
    }

    found = {f.figure: f for f in gains.mixed_ranks(results)}

    assert found["mixed_ranks.gain_points_padding"].value == pytest.approx(28 / 3)
    assert found["mixed_ranks.gain_points_naive"].value == pytest.approx(18 / 3)
    assert found["mixed_ranks.gain_points_naive"].note.startswith("altqr on MedQuAD, mean of 3")


def test_altqr_sends_half_of_fedit_and_an_eighth_in_int8() -> None:
    config = config_for(dataclasses.replace(CELL, ranks="equal"), LABELS, 1e-2)

    found = {f.figure: f.value for f in gains.uplink(config)}

    assert found["uplink.ratio_floats"] == 0.5
    assert 0.125 < found["uplink.ratio_int8_bytes"] < 0.14


def test_attackers_send_a_multiple_of_what_they_trained(prepared: Prepared) -> None:
    config = config_for(CELL, LABELS, 1e-2)
    adapter = read_adapter(model.classifier(prepared.source, config.adapter, seed=1))
    delta = Delta(adapter.spec, adapter.arrays, 5)

    tamper = robustness.attack(-10.0)

    lie = tamper(robustness.ATTACKERS[0], delta)
    for name, array in delta.arrays.items():
        np.testing.assert_array_equal(lie.arrays[name], -10 * array)
    assert tamper(max(robustness.ATTACKERS) + 1, delta) is delta


def test_robust_rules_count_when_their_worst_attack_costs_little() -> None:
    clean = {Job(robustness.cell("iid", seed)): 0.8 for seed in grid.SEEDS}
    hit = {
        Job(robustness.cell("iid", seed), Variant(robust=rule, attack=name)): value
        for seed in grid.SEEDS
        for rule, accuracies in {
            "mean": (0.7, 0.1, 0.2),
            "median": (0.79, 0.78, 0.8),
            "krum": (0.8, 0.76, 0.8),
        }.items()
        for name, value in zip(robustness.FACTORS, accuracies, strict=True)
    }
    results = {
        job: dataclasses.replace(OUTCOME, accuracy=accuracy)
        for job, accuracy in (clean | hit).items()
    }

    found = {f.figure: f for f in robustness.figures(results, "iid")}

    assert found["robust.within_3_points"].value == 1
    assert "median" in found["robust.within_3_points"].note
    assert found["robust.mean_loss_points"].value == pytest.approx(70)
    assert robustness.figures({}, "iid") == []


@pytest.mark.slow
def test_a_quick_run_writes_the_figures_of_a_full_one(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    script = harness.ROOT / "benchmarks" / "aggregation" / "run.py"
    page = (harness.ROOT / "docs" / "benchmarks" / "aggregation.md").read_bytes()

    subprocess.run([sys.executable, str(script), "--quick", "--json", str(file)], check=True)

    content = json.loads(file.read_text())
    found = {figure["figure"] for figure in content["figures"]}
    assert found >= {
        "exactness.max_error",
        "mixed_ranks.gain_points_naive",
        "mixed_ranks.gain_points_padding",
        "uplink.ratio_floats",
        "uplink.ratio_int8_bytes",
        "uplink.int8_loss_points",
        "robust.within_3_points",
        "robust.mean_loss_points",
    }
    assert content["header"]["quick"] is True
    assert (harness.ROOT / "docs" / "benchmarks" / "aggregation.md").read_bytes() == page
