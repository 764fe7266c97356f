"""Workers: processes on this machine, and Ray actors on a cluster of two nodes."""

from __future__ import annotations

import gc
import re
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from flwr.app import RecordDict

from anabranch.client.tuning import bases
from anabranch.client.tuning.bases import load_classifier
from anabranch.protocols.config import parse
from anabranch.protocols.errors import RunError
from anabranch.server.evaluation import initial_adapter
from anabranch.server.result import Result
from anabranch.simulations import engines
from anabranch.simulations.cohort.ray_actors import ray_workers
from anabranch.simulations.cohort.shard import Batch
from anabranch.simulations.cohort.workers import local_workers
from anabranch.simulations.population.clients import PopulationClients
from tests.runs import TEXT_RUN
from tests.simulations.populations import Killed, digits_run, population

SIZES = [12, 30, 25, 18, 40, 9, 22, 31]


def run_on(engine: engines.Engine, clients: PopulationClients, workers: int) -> Result:
    config = digits_run()
    return engines.run(
        engine, config, clients, initial_adapter(config), run_name="x-1", workers=workers
    )


def assert_same(a: Result, b: Result) -> None:
    assert [r.asked for r in a.history] == [r.asked for r in b.history]
    assert all(report.update_norm > 1e-3 for report in a.history)
    for name, array in a.adapter.arrays.items():
        np.testing.assert_allclose(array, b.adapter.arrays[name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("alone")
    return run_on("sequential", population(folder, SIZES), 1)


def test_two_worker_processes_give_the_sequential_adapter(alone: Result, tmp_path: Path) -> None:
    assert_same(alone, run_on("cohort", population(tmp_path, SIZES), 2))


def test_a_worker_that_dies_ends_the_run_with_a_reason(tmp_path: Path) -> None:
    clients = population(tmp_path, SIZES)
    dying = Killed(clients.records, clients.partition, tmp_path)

    with local_workers(dying, 1) as (worker,):
        worker.send(Batch((RecordDict(),), ((0, "train", 0),)))
        with pytest.raises(RunError, match=r"a worker process died \(exit code"):
            worker.receive()


def test_what_goes_wrong_in_a_worker_is_told(tmp_path: Path) -> None:
    with local_workers(population(tmp_path, SIZES), 1) as (worker,):
        worker.send(Batch((), ((0, "train", 7),)))
        with pytest.raises(RunError, match="a worker process failed: IndexError"):
            worker.receive()


def require_no_ray(address: str, reason: str, tmp_path: Path) -> None:
    """Fail unless a cluster that RAY_ADDRESS names and that is not there is said to be missing."""
    import ray

    wanted = f"RAY_ADDRESS = {re.escape(address)}: no Ray cluster answers there .*{reason}"
    with (
        pytest.raises(RunError, match=wanted),
        ray_workers(population(tmp_path, SIZES), 1, digits_run(), "cpu"),
    ):
        pass
    assert not ray.is_initialized()


def test_an_address_where_nobody_listens_is_refused_and_no_ray_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as held:  # bound, so that nobody else listens there
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        require_no_ray(address, "refused.*unset RAY_ADDRESS", tmp_path)
        monkeypatch.setenv("RAY_ADDRESS", f"ray://{address}")
        require_no_ray(f"ray://{address}", "refused", tmp_path)


def test_a_listener_that_is_no_ray_is_refused_and_no_ray_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def init(**options: object) -> None:  # what Ray raises, after its many attempts
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        require_no_ray(address, "Failed to connect", tmp_path)


@pytest.mark.parametrize(
    ("address", "reason"),
    [("head", "expected HOST:PORT"), (":6379", "expected HOST:PORT"), ("head:port", "Port")],
)
def test_an_address_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, reason: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    require_no_ray(address, reason, tmp_path)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray cluster of two nodes of one core each."""
    from ray.cluster_utils import Cluster

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield
        cluster.shutdown()
        gc.collect()


@pytest.mark.slow
@pytest.mark.usefixtures("two_nodes")
def test_two_ray_nodes_give_the_sequential_adapter(alone: Result, tmp_path: Path) -> None:
    assert_same(alone, run_on("ray", population(tmp_path, SIZES), 2))


@pytest.mark.slow
@pytest.mark.usefixtures("two_nodes")
def test_more_workers_than_the_cluster_has_cores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="workers = 9: the Ray cluster has 2 CPUs"):
        run_on("ray", population(tmp_path, SIZES), 9)


def test_a_base_that_is_lent_to_another_process_is_the_same_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = parse(TEXT_RUN, source="text")
    loaded = load_classifier(config)
    shared = bases.share(config.model)
    assert shared is not None
    read_only = {name: array.copy() for name, array in shared.weights.items()}
    for array in read_only.values():
        array.flags.writeable = False  # as Ray's object store gives them
    monkeypatch.setattr(bases, "_LENT", {})
    monkeypatch.setattr(bases, "_text_base", None)  # no model files here

    bases.lend(bases.Shared(shared.key, shared.module, read_only, shared.digest, shared.tokenizer))
    lent = load_classifier(config)

    assert lent.spec == loaded.spec
    assert lent.compute_base_digest() == loaded.compute_base_digest()
    weight = next(p for p in lent.base.parameters() if not p.requires_grad)
    assert any(weight.data_ptr() == array.ctypes.data for array in read_only.values())


def test_a_base_that_is_made_from_a_seed_is_not_sent() -> None:
    assert bases.share(digits_run().model) is None
    assert bases.share(msgspec.structs.replace(digits_run().model, base="logistic")) is None
