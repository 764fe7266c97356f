"""Above, the gateway is one Flower client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from anabranch.client import flower
from anabranch.client.privacy import epsilon_of as epsilon_by_prv
from anabranch.edge.gateway.app import gateway_or_site
from anabranch.edge.gateway.asking import CLIENT, collecting_s, spends_of
from anabranch.edge.gateway.results import KEEP_ROUNDS, KEEP_S, forget_results
from anabranch.edge.gateway.upstream import GatewaySite
from anabranch.protocols import rdp, wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import (
    ConfigError,
    DataError,
    PrivacyError,
    ProtocolError,
    RunError,
)
from anabranch.protocols.messages import Assignment, Refused, Trained
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.spend import Spend
from anabranch.protocols.tables import Federation, Privacy, Task, Training, Uplink
from anabranch.server.flower import Failure, Peer, read_trained
from anabranch.simulations.grid import InProcessGrid
from benchmarks.edge.gateway_load import adapter_of, config_of, delta_of, spec_of
from tests.gateway_cases import open_round

Fleet = Callable[..., Any]


def asked(number: int = 1, part: Part | None = None, **tables: Any) -> Assignment:
    more: Any = {} if part is None else {"part": part}
    return Assignment(run="run", round=number, config=config_of(**tables), **more)


def answering(
    devices: list[Any], frames: list[bytes], then: Callable[[], object] = lambda: None
) -> threading.Thread:
    """Let devices take part as soon as there is a task for them, and then do that."""

    def work() -> None:
        for device, frame in zip(devices, frames, strict=True):
            while device.check_in().WhichOneof("outcome") != "task":
                stop.wait(0.02)
            device.send(frame)
        then()

    stop = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_flower_message_in_and_the_devices_mean_out(
    fleet: Fleet, adapter: Adapter, codec: Any
) -> None:
    gateway, devices = fleet(3)
    uplink = Uplink(codec=codec)
    deltas = [delta_of(adapter.spec, seed) for seed in range(3)]
    rng = np.random.default_rng(0)
    frames = [wire.encode(delta, codec=codec, rng=rng) for delta in deltas]
    site = GatewaySite(gateway.folder.folder)
    app = flower.client_app(lambda context: site)
    content = flower.pack_assignment(asked(uplink=uplink), wire.encode(adapter))
    with InProcessGrid(app, ["gateway"]) as grid:
        describe = flower.pack_describe(flower.Describe(run="run", config=config_of()))
        described = flower.unpack_described(_ask(grid, describe, flower.DESCRIBE))
        assert isinstance(described, flower.Described)
        assert (described.site, described.num_examples, described.held_out) == ("north", 30, 0)
        working = answering(devices, frames)
        first = _ask(grid, content, "train")
        working.join()
        second = _ask(grid, content, "train")
    peer = Peer("north", 1, described.num_examples, described.held_out)
    taken = read_trained(
        first, peer, spec=adapter.spec, parts={"north": Part()}, uplink=uplink
    )  # as the coordinator does
    assert not isinstance(taken, Failure), taken.message
    trained, mean = _unpacked(first, adapter.spec, uplink)
    again, same = _unpacked(second, adapter.spec, uplink)
    assert (trained.site, trained.num_examples, trained.steps) == ("north", 30, 3)
    assert (trained.num_examples, trained.steps) == (mean.num_examples, mean.steps)
    assert again == trained
    for name, array in mean.arrays.items():
        np.testing.assert_array_equal(array, same.arrays[name])
        expected = np.mean([d.arrays[name] for d in deltas], axis=0, dtype=np.float64)
        tolerance = 1e-6 if codec == "fp32" else 0.1
        np.testing.assert_allclose(array, expected, atol=tolerance)


def _unpacked(content: RecordDict, spec: AdapterSpec, uplink: Uplink) -> tuple[Trained, Delta]:
    got = flower.unpack_trained(content, spec, Part(), uplink)
    assert not isinstance(got, Refused)
    return got


def _ask(grid: InProcessGrid, content: RecordDict, kind: str) -> RecordDict:
    (node,) = grid.get_node_ids()
    (sent,) = grid.push_messages([Message(content, node, kind)])
    grid.wait([sent])
    (reply,) = grid.pull_messages([sent])
    return reply.content


def _context(**node: str) -> Context:
    return Context(run_id=1, node_id=1, node_config={**node}, state=RecordDict(), run_config={})


def test_a_node_is_a_gateway_or_a_site(fleet: Fleet, table_sites: dict[str, Path]) -> None:
    gateway, _ = fleet(1)
    for node, name in (
        ({"gateway": str(gateway.folder.folder)}, "north"),
        ({"site": str(table_sites["cardiology"])}, "cardiology"),
    ):
        assert gateway_or_site(_context(**node)).name == name


@pytest.mark.parametrize("node", [{}, {"gateway": ""}, {"gateway": "/g", "site": "/s"}])
def test_a_node_that_is_neither_or_both_says_so(node: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="node-config"):
        gateway_or_site(_context(**node))


def test_too_few_devices_are_no_client(fleet: Fleet) -> None:
    gateway, _ = fleet(2, min_cohort=3)
    with pytest.raises(DataError, match="2 devices with records have called"):
        GatewaySite(gateway.folder.folder).sizes(config_of())


def test_below_the_minimum_cohort_the_answer_is_a_refusal(fleet: Fleet, adapter: Adapter) -> None:
    gateway, devices = fleet(2)
    site = GatewaySite(gateway.folder.folder)
    working = answering(
        devices[:1],
        [wire.encode(delta_of(adapter.spec, 0))],
        then=lambda: gateway.closer.due(now=time.time() + 86_400.0),  # the round's time is up
    )
    app = flower.client_app(lambda context: site)
    with InProcessGrid(app, ["gateway"]) as grid:
        content = flower.pack_assignment(asked(), wire.encode(adapter))
        answer = flower.unpack_trained(_ask(grid, content, "train"), adapter.spec, Part(), Uplink())
    working.join()
    assert isinstance(answer, Refused)
    assert answer.reason == "data"
    assert "1 devices sent a delta that counts, min_cohort = 2" in answer.message


def test_without_the_grpc_process_waiting_ends(fleet: Fleet, adapter: Adapter) -> None:
    gateway, _ = fleet(2)
    gateway.stopping.set()
    gateway.ending.join()
    times = iter([0.0, 1e12])
    site = GatewaySite(gateway.folder.folder, clock=lambda: next(times), sleep=lambda seconds: None)
    with pytest.raises(RunError, match="serve` running"):
        site.train(asked(), adapter)


def test_a_round_ends_before_the_coordinators_deadline() -> None:
    assert [collecting_s(s) for s in (2.0, 10.0, 60.0, 3600.0)] == [1.0, 5.0, 50.0, 3540.0]


def test_evaluation_is_refused(fleet: Fleet, adapter: Adapter) -> None:
    gateway, _ = fleet(1)
    with pytest.raises(DataError, match="no metrics"):
        GatewaySite(gateway.folder.folder).evaluate(asked(), adapter)


def test_a_round_is_one_thing(fleet: Fleet, adapter: Adapter, spec: AdapterSpec) -> None:
    gateway, _ = fleet(2)
    row = open_round(gateway.opener, adapter)
    assert open_round(gateway.opener, adapter)["id"] == row["id"]
    with pytest.raises(ProtocolError, match="asked before with another"):
        open_round(gateway.opener, adapter_of(spec, seed=1))
    with pytest.raises(ProtocolError, match="began with another configuration"):
        open_round(gateway.opener, adapter, 2, seed=5)


def test_runs_without_a_bundle_are_refused(fleet: Fleet, adapter: Adapter) -> None:
    gateway, _ = fleet(2)
    with pytest.raises(ConfigError, match="no published bundle"):
        open_round(gateway.opener, adapter_of(spec_of(1600)))
    other = Task(kind="tabular-classification", labels=("a", "b"))
    with pytest.raises(ConfigError, match="no published bundle"):
        open_round(gateway.opener, adapter, task=other)


PRIVATE: dict[str, Any] = {
    "privacy": Privacy(epsilon=8, delta=1e-4),
    "training": Training(local_steps=3, batch_size=2),
    "federation": Federation(rounds=2, method="ffa", deadline_s=600),
    "part": Part(factors="B"),
}


def test_record_privacy_is_one_mechanism_with_a_true_epsilon(
    fleet: Fleet, adapter: Adapter
) -> None:
    gateway, devices = fleet(2, cohort=2, record_privacy={"records": 10})
    site = GatewaySite(gateway.folder.folder)
    frames = [wire.encode(delta_of(adapter.spec, s, part=Part(factors="B"))) for s in range(2)]
    said = []
    for number in (1, 2):
        working = answering(devices, frames)
        said.append(site.train(asked(number, **PRIVATE), adapter)[0])
        working.join()
    mechanisms = {(one.noise_multiplier, one.sample_rate, one.delta, one.steps) for one in said}
    assert len(mechanisms) == 1
    ((sigma, rate, delta, steps),) = mechanisms
    assert sigma is not None
    assert rate is not None
    assert delta is not None
    once, twice = (Spend(noise_multiplier=sigma, sample_rate=rate, steps=n * steps) for n in (1, 2))
    epsilons = [rdp.epsilon_of([one], delta) for one in (once, twice)]
    assert [one.epsilon for one in said] == pytest.approx(epsilons)
    # What the coordinator's own accountant finds is below what is stated.
    assert epsilon_by_prv([twice], delta) <= epsilons[1]
    assert epsilons[1] <= 8 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("settings", "tables", "message"),
    [
        ({}, {}, r"needs \[record_privacy\]"),
        (
            {"record_privacy": {"records": 10}},
            {"privacy": Privacy(epsilon=8, clipping="adaptive")},
            "devices clip flat",
        ),
    ],
)
def test_private_runs_that_cannot_be_kept_are_refused(
    fleet: Fleet, adapter: Adapter, settings: Any, tables: Any, message: str
) -> None:
    gateway, _ = fleet(2, **settings)
    with pytest.raises(PrivacyError, match=message):
        open_round(gateway.opener, adapter, **(PRIVATE | tables))


def test_a_round_beyond_the_plan_is_refused(fleet: Fleet, adapter: Adapter) -> None:
    gateway, _ = fleet(2, record_privacy={"records": 10})
    with pytest.raises(PrivacyError, match="beyond the 2"):
        open_round(gateway.opener, adapter, 3, **PRIVATE)


CLIENT_PRIVACY = {
    "epsilon": 12.0,
    "noise_multiplier": 1.0,
    "clipping_norm": 1.0,
    "population": 3,
    "delta": 0.01,
}


def test_client_privacy_spends_a_budget_of_the_gateways_own(fleet: Fleet, adapter: Adapter) -> None:
    gateway, devices = fleet(3, client_privacy=CLIENT_PRIVACY)
    site = GatewaySite(gateway.folder.folder)
    frames = [wire.encode(delta_of(adapter.spec, seed)) for seed in range(3)]
    working = answering(devices, frames)
    trained, frame = site.train(asked(), adapter)
    working.join()
    assert (trained.num_examples, trained.steps) == (3, 0)
    assert site.train(asked(), adapter)[1] == frame
    assert len(spends_of(gateway.parts.store, CLIENT)) == 1  # asked again, spent once
    number, refusal = 1, ""
    while not refusal and number < 50:
        number += 1
        try:
            open_round(gateway.opener, adapter, number)
        except PrivacyError as error:
            refusal = str(error)
    assert "above the [client_privacy] budget" in refusal
    spends = spends_of(gateway.parts.store, CLIENT)
    assert len(spends) == number - 1
    assert rdp.epsilon_of(spends, 0.01) <= 12.0 < rdp.epsilon_of([*spends, spends[0]], 0.01)


def test_with_client_privacy_few_devices_are_no_reason_to_refuse(
    fleet: Fleet, adapter: Adapter
) -> None:
    """A refusal would tell how many came; the noise covers a round of nobody."""
    gateway, _ = fleet(1, client_privacy=CLIENT_PRIVACY)
    row = open_round(gateway.opener, adapter)
    gateway.closer.due(now=row["deadline"])
    found = gateway.parts.store.row("SELECT * FROM rounds")
    assert (found["state"], found["examples"]) == ("closed", 3)


def test_more_devices_than_the_population_are_refused(fleet: Fleet, adapter: Adapter) -> None:
    gateway, _ = fleet(4, client_privacy=CLIENT_PRIVACY)
    with pytest.raises(PrivacyError, match="4 devices have been enrolled"):
        open_round(gateway.opener, adapter)
    assert spends_of(gateway.parts.store, CLIENT) == []


def test_a_device_is_drawn_once_per_round(fleet: Fleet, adapter: Adapter) -> None:
    plan = CLIENT_PRIVACY | {"population": 40, "sample_rate": 0.5}
    gateway, devices = fleet(24, client_privacy=plan, limits={"calls_a_minute": 1000})
    open_round(gateway.opener, adapter)
    drawn = [[d.check_in().WhichOneof("outcome") == "task" for d in devices] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert 0 < sum(drawn[0]) < 24  # missed with a chance of 2^-23


def test_old_results_are_removed_and_the_last_ones_asked_again(
    fleet: Fleet, adapter: Adapter
) -> None:
    gateway, devices = fleet(2, cohort=2)
    site, results = GatewaySite(gateway.folder.folder), gateway.folder.results
    answers = []
    for number in range(1, KEEP_ROUNDS + 3):
        frames = [wire.encode(delta_of(adapter.spec, 10 * number + i)) for i in range(2)]
        working = answering(devices, frames)
        answers.append(site.train(asked(number), adapter)[1])
        working.join()
        assert len(list(results.iterdir())) <= KEEP_ROUNDS
    assert site.train(asked(KEEP_ROUNDS + 2), adapter)[1] == answers[-1]
    assert site.train(asked(3), adapter)[1] == answers[2]
    for number in (1, 2):
        with pytest.raises(RunError, match=f"round {number} is not kept any more"):
            site.train(asked(number), adapter)
    later = time.time() + KEEP_S + 1
    assert forget_results(gateway.parts.store, gateway.folder, now=later) == KEEP_ROUNDS
    assert list(results.iterdir()) == []


def test_a_result_that_a_kept_round_has_too_stays(fleet: Fleet, adapter: Adapter) -> None:
    gateway, devices = fleet(2, cohort=2)
    site = GatewaySite(gateway.folder.folder)
    frames = [wire.encode(delta_of(adapter.spec, i)) for i in range(2)]
    for number in range(1, KEEP_ROUNDS + 2):
        working = answering(devices, frames)
        frame = site.train(asked(number), adapter)[1]
        working.join()
    assert len(list(gateway.folder.results.iterdir())) == 1
    assert site.train(asked(KEEP_ROUNDS + 1), adapter)[1] == frame
