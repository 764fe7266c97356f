"""Fed-Heart-Disease: FLamby's records, FLamby's methods on two logits, and what figures say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch.nn import functional

from anabranch.client.tuning.examples import Examples
from anabranch.protocols.adapter import Adapter
from benchmarks import harness
from benchmarks.fed_heart import data, run, table
from benchmarks.fed_heart.data import PATIENTS, Floats, Split, Table
from benchmarks.fed_heart.federation import changed, federated, random_start, trained, with_mean
from benchmarks.fed_heart.ours import Choices, Personal, chosen, shared_grid, with_epsilon
from benchmarks.fed_heart.ours import private_grid as private
from benchmarks.fed_heart.published import ALONE, FEDERATED, PUBLISHED, nominal_epsilon

TEXT = (
    "63,1,1,145,1,233,2,150,0,2.3,3,0,6,0\n"
    "40,0,4,120,0,?,0,140,1,1,?,?,?,1\n"  # column 5 is kept: this patient is not
    "51,0,2,130,0,210,1,141,0,.5,?,?,?,3\n"
)


@pytest.fixture(scope="module")
def tables(shared_data: Path) -> list[Table]:
    return data.load(shared_data / "heart-disease")


def test_patients_without_a_kept_column_go_and_categories_become_columns() -> None:
    found = data.parse(TEXT)

    plain = [63, 1, 145, 1, 233, 150, 0, 2.3]
    assert found.features[0].tolist() == pytest.approx([*plain, 0, 0, 0, 0, 1])
    assert found.features[1, 8:].tolist() == [1, 0, 0, 1, 0]
    assert found.labels.tolist() == [0, 1]


def test_the_split_has_the_published_numbers_of_patients(tables: list[Table]) -> None:
    split = data.published_split(tables)

    sizes = [(len(a), len(b)) for a, b in zip(split.train, split.test, strict=True)]
    assert sizes == list(PATIENTS.values())
    assert (len(split.pooled_train), len(split.pooled_test)) == (486, 254)


def test_training_records_have_mean_0_and_deviation_1_on_both_scales(tables: list[Table]) -> None:
    split = data.published_split(tables)

    for examples in (*split.train, split.pooled_train):
        rows = torch.stack(list(examples.features))
        deviation = rows.std(dim=0)
        assert rows.mean(dim=0).abs().max() < 1e-5
        # Cholesterol is 0 for every patient of Switzerland: a constant stays 0.
        assert bool(((deviation - 1).abs() < 1e-4).logical_or(deviation == 0).all())


def test_every_training_record_is_held_out_once(tables: list[Table]) -> None:
    training = [data.divided(t)[0] for t in tables]

    splits = data.folds(training, 5, seed=0)

    held = [sum(len(s.test[i]) for s in splits) for i in range(4)]
    assert held == [train for train, _ in PATIENTS.values()]
    assert all(len(s.train[i]) + len(s.test[i]) == held[i] for s in splits for i in range(4))


def test_another_file_is_refused(shared_data: Path, tmp_path: Path) -> None:
    for name in data.HOSPITALS:
        content = data.file_of(shared_data / "heart-disease", name).read_bytes()
        data.file_of(tmp_path, name).write_bytes(content + b"\n")

    with pytest.raises(ValueError, match=r"processed\.cleveland\.data has MD5 .*, expected 2d91"):
        data.load(tmp_path)


def test_missing_data_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))

    with pytest.raises(SystemExit, match="is missing: set ANABRANCH_DATA"):
        data.data_folder()


Vector = torch.Tensor  # weight (13) and bias of one logit


def one_logit(examples: Examples, start: Vector, rate: float, mu: float, steps: int) -> Vector:
    """Gradient descent as FLamby does it: nn.Linear(13, 1), sigmoid, binary cross-entropy."""
    x = functional.pad(torch.stack(list(examples.features)), (0, 1), value=1.0)
    w = start.clone().requires_grad_()
    for _ in range(steps):
        loss = functional.binary_cross_entropy_with_logits(x @ w, examples.labels.float())
        (gradient,) = torch.autograd.grad(loss + mu / 2 * (w - start).square().sum(), w)
        with torch.no_grad():
            w -= rate * gradient
    return w.detach()


def flamby(name: str, hospitals: list[Examples], start: Vector, rounds: int, steps: int) -> Vector:
    """FLamby's server loop (strategies/fed_avg.py, fed_opt.py) on one logit."""
    rate = {"fedavg": 1e-3, "fedprox": 1e-3, "fedadam": 1e-2}.get(name, 0.003162)
    mu = 0.01 if name == "fedprox" else 0.0
    w, m, v = start, torch.zeros(14), torch.zeros(14)
    n = torch.tensor([float(len(h)) for h in hospitals])
    for _ in range(rounds):
        moved = torch.stack([one_logit(h, w, rate, mu, steps) - w for h in hospitals])
        d = (n[:, None] * moved).sum(dim=0) / n.sum()
        m = 0.9 * m + 0.1 * d
        if name == "fedadam":
            v = 0.999 * v + 0.001 * d**2
        elif name == "fedyogi":
            v = v - 0.001 * d**2 * torch.sign(v - d**2)
        else:
            v = v + d**2
        server = 0.316228 if name == "fedadagrad" else 1e-2
        w = w + (d if name in ("fedavg", "fedprox") else server * m / (v.sqrt() + 1e-8))
    return w


def difference(adapter: Adapter) -> Vector:
    """Return z_1 − z_0 as one logit."""
    weight, bias = adapter.arrays["head.weight"], adapter.arrays["head.bias"]
    return torch.tensor(np.append(weight[1] - weight[0], bias[1] - bias[0]))


@pytest.mark.parametrize("name", FEDERATED)
def test_two_logits_at_half_the_rate_are_flamby_s_one(name: str, tables: list[Table]) -> None:
    split, start = data.published_split(tables), random_start(42)
    config = changed(
        FEDERATED[name], training={"batch_size": 1000, "local_steps": 6}, federation={"rounds": 4}
    )

    found = difference(federated(config, split.train, start))

    expected = flamby(name, split.train, difference(start), rounds=4, steps=6)
    assert (expected - difference(start)).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-3)


def test_adam_on_two_logits_moves_their_difference_as_on_one(tables: list[Table]) -> None:
    examples, start = data.published_split(tables).train[0], random_start(43)
    x, y = torch.stack(list(examples.features)), examples.labels.float()
    w = difference(start).clone().requires_grad_()
    adam = torch.optim.Adam([w], lr=1e-3)
    for _ in range(20):
        adam.zero_grad()
        functional.binary_cross_entropy_with_logits(x @ w[:13] + w[13], y).backward()
        adam.step()
    training = changed(
        FEDERATED["fedavg"],
        training={
            "optimizer": ALONE.optimizer,
            "learning_rate": ALONE.learning_rate,
            "batch_size": 1000,
            "local_steps": 20,
        },
    ).training

    found = difference(trained(training, examples, start, seed=0))

    torch.testing.assert_close(found, w.detach(), atol=2e-5, rtol=1e-3)


def test_the_published_epsilon_is_nominal() -> None:
    found = [nominal_epsilon(1.0, train) for train, _ in PATIENTS.values()]

    assert max(found) == pytest.approx(4.1, abs=0.15)  # Switzerland, 30 records
    assert all(epsilon > 1.4 for epsilon in found)


def test_the_first_of_equal_candidates_is_taken(tables: list[Table]) -> None:
    split = data.folds([data.divided(t)[0] for t in tables], 5, seed=0)[0]
    right = {"a": [1, 1, 1, 1, 9], "b": [2, 2, 2, 2, 5], "c": [2, 2, 2, 2, 5]}

    def score(name: str) -> Callable[[Split, int], Floats]:
        return lambda split, seed: np.array(right[name], np.float32)

    by_mean, by_pooled = chosen(list(right), score, [(0, [split])], 4, 5)

    assert (by_mean[0], by_pooled[0]) == ("b", "a")


def of(*values: float) -> Floats:
    return np.array([with_mean(np.array(values, np.float32))], np.float32)


def made_up() -> tuple[dict[str, Floats], Choices]:
    row = of(0.7, 0.7, 0.8, 0.8, 0.79)
    rows = dict.fromkeys(table.NAMES, row)
    rows |= {name: np.array([values], np.float32) for name, values in PUBLISHED.items()}
    rows["fedavg"] = rows["fedavg"] + np.float32(0.01)
    run_, budget = shared_grid()[0], private()[0]
    personal = Personal(base=run_, training=run_.training, pull=0.1)
    names = ("for_mean", "for_pooled", "personal", "alone", "private")
    choices = Choices(
        for_mean=run_,
        for_pooled=run_,
        personal=personal,
        alone=personal,
        private=budget,
        validation=dict.fromkeys(names, row[0]) | {"personal": row[0] + 0.01},
    )
    return rows, choices


def test_the_figures_follow_from_the_rows() -> None:
    rows, choices = made_up()

    found = {f.figure: f for f in run.figures(rows, choices, 1.0)}

    assert found["reproduction.max_difference"].value == pytest.approx(0.01, abs=1e-6)
    assert found["best.mean4"].note.startswith("one model per hospital")
    assert found["best.mean4"].reached
    assert found["best.pooled"].value == pytest.approx(0.79)
    assert found["eps1.mean4"].value == pytest.approx(0.75)
    assert {"fedavg.pooled", "fedadam.mean4", "fedyogi.mean4", "pooled_training.pooled"} <= set(
        found
    )


def test_the_table_shows_ours_and_the_published_rows() -> None:
    rows, choices = made_up()

    text = table.table(rows, choices)

    assert "| … published | 0.7308 | 0.7191 | 0.6500 | 0.6400 | 0.6850 | 0.7480 |" in text
    assert "| **ours**, one model, ε = 1 | 0.7000 ± 0.0000 |" in text
    assert "| 10 | 0.7500 ± 0.0000 | 0.7900 ± 0.0000 | 0.7004 |" in text
    assert "then 10 steps of 32, SGD at 0.01, λ = 0.1" in text
    assert table.chart(rows).startswith("<svg")


def test_noise_follows_the_seed_and_the_budget(tables: list[Table]) -> None:
    split = data.published_split(tables)
    config = changed(private()[0], federation={"rounds": 2})

    def model(epsilon: float, seed: int) -> torch.Tensor:
        seeded = msgspec.structs.replace(with_epsilon(config, epsilon), seed=seed)
        return difference(federated(seeded, split.train, random_start(0)))

    assert torch.equal(model(1.0, 1), model(1.0, 1))
    assert not torch.equal(model(1.0, 1), model(1.0, 2))
    quiet = (model(50.0, 1) - model(50.0, 2)).norm()
    assert (model(0.1, 1) - model(0.1, 2)).norm() > 10 * quiet


@pytest.mark.slow
def test_the_benchmark_writes_its_figures(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "figures.json"
    script = harness.ROOT / "benchmarks" / "fed_heart" / "run.py"
    monkeypatch.setenv("ANABRANCH_DATA", str(shared_data))

    subprocess.run([sys.executable, str(script), "--quick", "--json", str(file)], check=True)

    found = {f["figure"]: f["value"] for f in json.loads(file.read_text())["figures"]}
    assert found["reproduction.max_difference"] <= 0.015
    assert found["best.mean4"] >= 0.731
    assert found["best.pooled"] >= 0.77
