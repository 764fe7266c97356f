"""The agent at work, with a gateway that is as bad as the test asks and a real bundle."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.edge.gateway.authority import Authority
from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import loop, sync, task
from anabranch.edge.runtime.bundle_manifest import MANIFEST, SIGNATURE
from anabranch.edge.runtime.conditions import Network, Readings
from anabranch.edge.runtime.device_file import Conditions
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.ledger_report import ledger_of
from anabranch.edge.runtime.loop import Agent, only_one
from anabranch.edge.runtime.spool import Spool
from anabranch.edge.runtime.transport import Gateway, GatewayUnavailable
from anabranch.edge.runtime.trust import add_trusted
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import BundleError, DeviceError, PrivacyError, ProtocolError
from anabranch.protocols.part import Part
from anabranch.protocols.rdp import epsilon_of
from anabranch.protocols.spend import Spend
from anabranch.protocols.tables import Privacy, Training, Uplink
from anabranch.protocols.wire import decode_delta, encode
from tests.edge.bundles import TRUSTED, reseal, write_bundle
from tests.edge.gateways import FakeGateway, enrolled_at, new_authority

TRAINING = Training(batch_size=4, local_steps=6)
GOOD = Readings(
    battery=None,
    charging=None,
    temperature_c=30.0,
    network=Network.unmetered,
    idle=True,
    local=datetime(2026, 1, 1, 3, 0),
)


@dataclass
class FakeSensors:
    readings: Readings = GOOD
    later: list[Readings] = field(default_factory=list)

    def read(self) -> Readings:
        return self.later.pop(0) if self.later else self.readings


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return new_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory,
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("bundles") / "one"
    classifier = make_classifier("tabular")
    write_bundle(
        path, classifier, make_config("tabular"), precisions=("fp32",), with_artifacts=False
    )
    return path, read_adapter(classifier)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    add_trusted(home.trusted, TRUSTED[0])
    return home


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 24)
    inputs = rng.normal(size=(24, 5)).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=inputs, labels=labels)
    return tmp_path / "data.npz"


@pytest.fixture
def fake(authority: Authority, bundle: tuple[Path, Any]) -> FakeGateway:
    fake = FakeGateway(authority)
    for path in bundle[0].iterdir():
        fake.put(path.read_bytes())
    fake.put(encode(bundle[1]))
    return fake


def offer(fake: FakeGateway, made: tuple[Path, Any], /, **changes: Any) -> edge_pb2.Task:
    """Let the gateway offer a task at the next check-in."""
    folder, adapter = made
    manifest = json.loads((folder / MANIFEST).read_bytes())
    one = edge_pb2.Task(
        id="t-1",
        run="r-1",
        round=1,
        bundle=manifest["name"],
        bundle_version=manifest["version"],
        manifest=fake.put((folder / MANIFEST).read_bytes(), MANIFEST),
        signature=fake.put((folder / SIGNATURE).read_bytes(), SIGNATURE),
        adapter=fake.put(encode(adapter), "adapter"),
        training=msgspec.json.encode(TRAINING),
        part=msgspec.json.encode(Part()),
        uplink=msgspec.json.encode(Uplink()),
        seed=7,
        deadline_unix=int(time.time()) + 3600,
        chunk_bytes=1024,
        max_upload_bytes=1 << 20,
    )
    for name, value in changes.items():
        if name == "privacy":
            one.privacy.CopyFrom(value)
        else:
            setattr(one, name, value)
    fake.replies.append(edge_pb2.CheckInReply(task=one))
    return one


def agent_of(gateway: Gateway, home: Home, data: Path | None, **fields: Any) -> Agent:
    said: list[str] = []
    values: dict[str, Any] = {"conditions": Conditions(), "sensors": FakeSensors()} | fields
    agent = Agent(home=home, gateway=gateway, data=data, say=said.append, **values)
    agent.said = said  # type: ignore[attr-defined]
    return agent


def delta_bytes(fake: FakeGateway) -> bytes:
    (one,) = fake.uploads.values()
    return bytes(one)


def nothing_left(home: Home) -> bool:
    state = list((home.folder / "training").rglob("*.*"))
    return task.remembered(home) is None and not Spool(home.spool).entries() and not state


def test_ask_pull_train_send(
    fake: FakeGateway, bundle: tuple[Path, Any], home: Home, data: Path
) -> None:
    offer(fake, bundle)
    with enrolled_at(fake, home) as gateway:
        agent = agent_of(gateway, home, data)
        agent.run(once=True)
    delta = decode_delta(delta_bytes(fake), bundle[1].spec)
    assert (delta.num_examples, delta.steps) == (24, 6)
    assert delta.norm() > 0
    assert len(fake.committed) == 1
    assert nothing_left(home)
    assert fake.asked[0].capabilities.examples == 24


KILLS = [
    "remember", "fetch_bundle", "fetch_frame", "open_installed", "perform", "put", "forget",
    "send", "remove",
]  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", KILLS)
def test_a_kill_anywhere_costs_nothing(
    where: str,
    after: bool,
    fake: FakeGateway,
    bundle: tuple[Path, Any],
    home: Home,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = offer(fake, bundle)
    owner: Any = {"remember": task, "perform": task, "forget": task, "send": sync}.get(
        where, Spool if where in ("put", "remove") else loop
    )
    with enrolled_at(fake, home) as gateway:
        with monkeypatch.context() as patch:
            patch.setattr(owner, where, _dying(getattr(owner, where), after))
            with pytest.raises(KeyboardInterrupt):
                agent_of(gateway, home, data).run(once=True)
        if where == "remember" and not after:  # the gateway gives a device the task it has
            fake.replies.append(edge_pb2.CheckInReply(task=one))
        agent_of(gateway, home, data).run(once=True)
    assert len(fake.committed) == 1
    assert len(fake.uploads) == 1
    assert nothing_left(home)


def _dying(real: Callable[..., Any], after: bool) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        if after:
            real(*arguments, **named)
        raise KeyboardInterrupt

    return call


def test_lost_conditions_stop_training_and_it_goes_on_with_the_same_result(
    fake: FakeGateway,
    bundle: tuple[Path, Any],
    home: Home,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(fake, bundle)
    with enrolled_at(fake, home) as gateway:
        agent_of(gateway, home, data).run(once=True)
    straight = delta_bytes(fake)
    fake.uploads.clear()

    other = Home(tmp_path / "other")
    add_trusted(other.trusted, TRUSTED[0])
    offer(fake, bundle)
    monkeypatch.setattr(loop, "WATCH_S", 0.0)
    hot = replace(GOOD, temperature_c=60.0)
    # one reading before each of check-in, download and training; then before every micro-batch
    sensors = FakeSensors(GOOD, later=[GOOD] * 6 + [hot])
    with enrolled_at(fake, other) as gateway:
        agent = agent_of(gateway, other, data, sensors=sensors)
        agent.run(once=True)
        assert any("conditions were lost" in text for text in agent.said)  # type: ignore[attr-defined]
        assert fake.uploads == {}
        assert (other.training("tiny-tabular") / "task" / "training.state").exists()
        agent.run(once=True)
    assert delta_bytes(fake) == straight
    assert fake.aborted == []


def test_nothing_is_asked_while_conditions_do_not_hold(
    fake: FakeGateway, bundle: tuple[Path, Any], home: Home, data: Path
) -> None:
    offer(fake, bundle)
    sensors = FakeSensors(replace(GOOD, network=Network.metered))
    with enrolled_at(fake, home) as gateway:
        agent = agent_of(gateway, home, data, sensors=sensors)
        agent.run(once=True)
        assert agent.said == ["waiting: the network is metered"]  # type: ignore[attr-defined]
        assert fake.asked == []
        agent_of(gateway, home, data, sensors=sensors, conditions=None).run(once=True)
    assert len(fake.committed) == 1


def test_a_delta_waits_for_the_network(
    fake: FakeGateway,
    bundle: tuple[Path, Any],
    home: Home,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(fake, bundle)
    with enrolled_at(fake, home) as gateway:
        agent_of(gateway, home, data).run(once=True, train=False)
        away = FakeSensors(replace(GOOD, network=Network.offline))
        agent_of(gateway, home, data, sensors=away).run(once=True)
        assert len(Spool(home.spool).entries()) == 1
        assert fake.uploads == {}
        agent_of(gateway, home, None).run(once=True)
    assert len(fake.committed) == 1


def test_a_gateway_that_is_away_is_backed_off_from(
    fake: FakeGateway, home: Home, data: Path
) -> None:
    fake.codes = [grpc.StatusCode.UNAVAILABLE] * 3
    with enrolled_at(fake, home) as gateway:
        agent = agent_of(gateway, home, data, now=lambda: 1000.0)
        with pytest.raises(GatewayUnavailable):
            agent.run(once=True)
        memory = agent.facts().memory
        assert memory.failures == 1
        assert memory.call_unix > 1000.0
        agent.run(once=True)
        assert agent.facts().memory.failures == 0


def test_past_its_deadline_a_delta_is_dropped_and_a_task_forgotten(
    fake: FakeGateway, bundle: tuple[Path, Any], home: Home, data: Path
) -> None:
    one = offer(fake, bundle)
    with enrolled_at(fake, home) as gateway:
        agent_of(gateway, home, data).run(once=True, train=False)
        Spool(home.spool).put("t-0", b"old", examples=1, steps=1, deadline_unix=10)
        agent = agent_of(gateway, home, data, now=lambda: one.deadline_unix + 1.0)
        agent.run(once=True)
    assert nothing_left(home)
    assert fake.uploads == {}
    said = " ".join(agent.said)  # type: ignore[attr-defined]
    assert "task t-0 dropped: its deadline has passed" in said
    assert "task t-1 forgotten: its deadline has passed" in said


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"training": b"{}x"}, ProtocolError, "training"),
        ({"part": b'{"factors":"C"}'}, ProtocolError, "part"),
        ({"uplink": b'{"error_feedback":true}'}, ProtocolError, "error feedback"),
        ({"id": ""}, ProtocolError, "id and run"),
        ({"max_upload_bytes": 0}, ProtocolError, "max_upload_bytes"),
        ({"max_upload_bytes": 10}, ProtocolError, "the gateway takes 10"),
        ({"proximal_mu": -1.0}, ProtocolError, "proximal_mu"),
        ({"bundle": "another"}, BundleError, "the task is for"),
        ({"bundle": "../../precious"}, ProtocolError, "no name of a bundle"),
        ({"bundle": "/precious"}, ProtocolError, "no name of a bundle"),
        ({"part": b'{"ranks":[7]}'}, ProtocolError, "ranks"),
    ],
)
def test_a_task_that_cannot_be_done_is_given_back(
    changes: dict[str, Any],
    kind: type[Exception],
    reason: str,
    fake: FakeGateway,
    bundle: tuple[Path, Any],
    home: Home,
    data: Path,
) -> None:
    one = offer(fake, bundle, **changes)
    precious = home.folder.parent / "precious" / "task" / "file"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    (home.folder / "training").mkdir(parents=True)
    with enrolled_at(fake, home) as gateway, pytest.raises(kind, match=reason):
        agent_of(gateway, home, data).run(once=True)
    assert precious.read_text() == "mine"
    assert [task_id for task_id, _ in fake.aborted] == [one.id]
    assert nothing_left(home)


def test_the_gateways_refusal_ends_a_delta_and_a_closed_door_does_not(
    fake: FakeGateway, home: Home
) -> None:
    spool = Spool(home.spool)
    spool.put("t-1", b"delta", examples=1, steps=1, deadline_unix=2**40)
    with enrolled_at(fake, home) as gateway:
        fake.codes = [grpc.StatusCode.PERMISSION_DENIED]
        with pytest.raises(DeviceError, match="enrol again"):
            agent_of(gateway, home, None).run(once=True)
        assert len(spool.entries()) == 1
        fake.codes = [grpc.StatusCode.NOT_FOUND]
        agent_of(gateway, home, None).run(once=True)
    assert spool.entries() == []


def test_one_process_works_for_a_device(home: Home) -> None:
    with only_one(home), pytest.raises(DeviceError, match="another process"), only_one(home):
        pass
    with only_one(home):
        pass


# Privacy

ASKED = edge_pb2.RecordPrivacy(
    noise_multiplier=1.5, sample_rate=0.25, clipping_norm=1.0, delta=1e-3
)


def test_a_private_task_is_reserved_settled_and_sent(
    fake: FakeGateway, bundle: tuple[Path, Any], home: Home, data: Path, state_home: Path
) -> None:
    offer(fake, bundle, privacy=ASKED)
    with enrolled_at(fake, home) as gateway:
        agent_of(gateway, home, data).run(once=True)
    assert len(fake.committed) == 1
    (spend,) = ledger_of(home).history()
    assert (spend.noise_multiplier, spend.sample_rate, spend.steps) == (1.5, 0.25, 6)
    state = ledger_of(home).state()
    assert state is not None
    assert not state.open
    assert nothing_left(home)


PRIVATE_KILLS = [(task, "_reserve"), (task, "_frame"), (Spool, "put")]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "where"), PRIVATE_KILLS)
def test_a_killed_private_task_sends_one_delta_of_one_settled_training(
    owner: Any,
    where: str,
    after: bool,
    fake: FakeGateway,
    bundle: tuple[Path, Any],
    home: Home,
    data: Path,
    state_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(fake, bundle, privacy=ASKED)
    with enrolled_at(fake, home) as gateway:
        with monkeypatch.context() as patch:
            patch.setattr(owner, where, _dying(getattr(owner, where), after))
            with pytest.raises(KeyboardInterrupt):
                agent_of(gateway, home, data).run(once=True)
        agent_of(gateway, home, data).run(once=True)
    state = ledger_of(home).state()
    assert state is not None
    assert len(state.settled) == 1
    lost = where == "_reserve" and not after  # a reservation that nobody knows: it counts
    assert len(state.open) == int(lost)
    assert len(fake.committed) == 1


def test_a_gateway_cannot_renew_a_run_s_budget_by_another_name(
    fake: FakeGateway,
    bundle: tuple[Path, Any],
    home: Home,
    data: Path,
    state_home: Path,
    tmp_path: Path,
) -> None:
    one = Spend(noise_multiplier=1.5, sample_rate=0.25, steps=6)
    once, twice = epsilon_of([one], 1e-3), epsilon_of([one, one], 1e-3)
    folder = tmp_path / "private"
    shutil.copytree(bundle[0], folder)
    privacy = Privacy(epsilon=(once + twice) / 2, delta=1e-3)
    reseal(folder, lambda m: msgspec.structs.replace(m, privacy=privacy, privacy_steps=12))
    for path in folder.iterdir():
        fake.put(path.read_bytes())
    private = (folder, bundle[1])
    with enrolled_at(fake, home) as gateway:
        offer(fake, private, privacy=ASKED)
        agent_of(gateway, home, data).run(once=True)
        offer(fake, private, id="t-2", run="another", privacy=ASKED)
        with pytest.raises(PrivacyError, match="the budget of run"):
            agent_of(gateway, home, data).run(once=True)
    assert len(fake.committed) == 1


def test_a_budget_stops_private_training_and_forbids_any_other(
    fake: FakeGateway, bundle: tuple[Path, Any], home: Home, data: Path, state_home: Path
) -> None:
    home.folder.mkdir(exist_ok=True)
    (home.folder / "device.toml").write_text("[budget]\nepsilon = 0.01\ndelta = 1e-3\n")
    with enrolled_at(fake, home) as gateway:
        offer(fake, bundle)
        with pytest.raises(PrivacyError, match="private training alone"):
            agent_of(gateway, home, data).run(once=True)
        offer(fake, bundle, id="t-2", privacy=ASKED)
        with pytest.raises(PrivacyError, match=r"budget.*device\.toml|device\.toml.*budget"):
            agent_of(gateway, home, data).run(once=True)
    assert fake.aborted == [("t-1", "PrivacyError"), ("t-2", "PrivacyError")]
    assert fake.uploads == {}
