import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from anabranch.client.site import round_seed
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.training import batches
from anabranch.simulations.population.clients import client_name
from benchmarks.simulation import comparison, peer, plan, population
from benchmarks.simulation.comparison import TARGETS, Work
from benchmarks.simulation.peer import Job, Peer
from benchmarks.simulation.processes import Engine, Laps, peers_python
from benchmarks.simulation.run import FULL, QUICK
from benchmarks.simulation.workloads import BATCH, SEED, WORKLOADS


@pytest.mark.parametrize(
    ("name", "values"),
    [("mlp", 9_610), ("cnn", 153_962), ("small", 4 * 8 * 128 + 650)],
)
def test_workloads_train_as_many_values_as_their_table_says(name: str, values: int) -> None:
    classifier = load_classifier(WORKLOADS[name].config(1))

    assert sum(p.numel() for p in trainable_parameters(classifier).values()) == values


def test_a_turn_is_the_order_in_which_a_site_reads_its_records(tmp_path: Path) -> None:
    workload = dataclasses.replace(WORKLOADS["mlp"], clients=30, cohort=3)
    rounds = plan.turns(workload, 2)

    assert [len(one) for one in rounds] == [3, 3]
    assert [[turn.client for turn in one] for one in rounds] == plan.cohorts(workload, 2)
    turn = rounds[1][2]
    examples = Examples([torch.zeros(64)] * 50, torch.zeros(50, dtype=torch.int64))
    seed = round_seed(SEED, client_name(turn.client), 2)
    drawn = batches(examples, BATCH, np.random.default_rng(seed))
    assert turn.order == [i for _ in range(5) for i in next(drawn)]
    assert sorted(turn.order) == list(range(50))


def test_peers_read_the_records_of_a_turn_in_its_order(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    workload = dataclasses.replace(WORKLOADS["mlp"], clients=30)
    plan.write(file, workload, 1)
    held = Peer(Job(workload="mlp", rounds=1, clients=30, plan=str(file)))
    client, order = held.plan[0][3]
    inputs = workload.all_records().inputs

    rows, _ = held.records(client, order)

    assert isinstance(inputs, np.ndarray)
    np.testing.assert_array_equal(rows[7], inputs[client * 50 + order[7]])


def test_the_written_out_network_is_the_product_s(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan.write(file, dataclasses.replace(WORKLOADS["cnn"], clients=20, cohort=1), 1)
    held = Peer(Job(workload="cnn", rounds=1, clients=20, plan=str(file)))
    x = held.data[0][:3]

    for layout in ("default", "last"):
        model = peer.PeerModel(held.model.classifier, layout=layout, padding="batch")
        torch.testing.assert_close(model(x), held.model.classifier.logits(x, None))


def laps(seconds: float, rounds: int = 4, loss: float = 1.0) -> Laps:
    return Laps(seconds=[9.0, *[seconds] * (rounds - 1)], cpu=[seconds] * rounds, loss=loss)


def test_figures_are_ratios_of_the_rounds_after_the_first() -> None:
    work = Work(workload="mlp_100", warm=1, turns=3, variants=("pfl", "flower", "ours", "ours_two"))
    found = {"pfl": laps(1.0), "flower": laps(3.0), "ours": laps(0.1), "ours_two": laps(0.05)}

    figures = {f.figure: f.value for f in comparison.figures(work, found)}

    assert figures == pytest.approx({"mlp.speedup_pfl_100": 10.0, "mlp.speedup_flower_100": 60.0})


def test_minilm_is_told_apart_by_what_makes_it_faster() -> None:
    work = Work(workload="minilm", warm=1, turns=3, variants=("pfl", "ours", "ours_alone"))
    found = {"pfl": laps(1.0), "ours": laps(0.25), "ours_alone": laps(0.5)}

    figures = {f.figure: f.value for f in comparison.figures(work, found)}

    assert figures == {"minilm.speedup_pfl": 2.0, "minilm.speedup_pfl_packed": 4.0}


def test_losses_are_compared_within_a_workload() -> None:
    found = {"mlp": {"a": laps(1, loss=2.0), "b": laps(1, loss=2.5)}, "cnn": {"a": laps(1)}}

    assert comparison.losses(found).value == 0.5


def test_quick_and_full_have_the_figures_with_targets() -> None:
    for scale in (QUICK, FULL):
        found = {
            figure.figure
            for works in scale.groups
            for work in works
            for figure in comparison.figures(
                work, {name: laps(1.0, work.rounds) for name in work.variants}
            )
        }
        assert set(TARGETS) <= found


def test_in_full_flower_has_as_many_nodes_as_there_are_clients() -> None:
    for works in FULL.groups:
        assert len({WORKLOADS[work.workload].clients for work in works}) == 1


def test_the_drawing_is_a_file_of_its_own() -> None:
    text = population.drawing({1000: [10 << 20, 12 << 20], 10_000: [11 << 20, 12 << 20]})

    assert text.startswith("<svg ")
    assert 'xmlns="http://www.w3.org/2000/svg"' in text
    assert "10,000 clients" in text


def test_a_missing_environment_says_how_to_make_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANABRANCH_PEERS_PYTHON", str(tmp_path / "python"))

    with pytest.raises(SystemExit, match=r"run `make .venv-peers/installed`"):
        peers_python()


def test_a_worker_that_fails_shows_its_last_words() -> None:
    with (
        Engine("worker_plain.py", [Job(workload="mlp", rounds=1, plan="nowhere.json")]) as engine,
        pytest.raises(RuntimeError, match=r"(?s)ended with status 1:.*nowhere.json"),
    ):
        engine.round("mlp")


@pytest.mark.slow
def test_engines_end_at_the_same_loss(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan.write(file, dataclasses.replace(WORKLOADS["mlp"], clients=40), 2)
    job = Job(workload="mlp", rounds=2, loss_round=2, clients=40, plan=str(file))
    with Engine("worker_plain.py", [job]) as plain, Engine("worker_ours.py", [job]) as ours:
        for _ in range(2):
            plain.round("mlp")
            ours.round("mlp")

    assert plain.laps["mlp"].loss == pytest.approx(ours.laps["mlp"].loss, abs=1e-5)
    assert plain.laps["mlp"].loss is not None
    assert plain.laps["mlp"].loss < math.log(10) - 0.01
