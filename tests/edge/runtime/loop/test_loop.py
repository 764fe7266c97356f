"""The agent at work, with a gateway that is as bad as the test asks and a real bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import loop, sync, task
from anabranch.edge.runtime.alone import only_one
from anabranch.edge.runtime.conditions import Network
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.spool import Spool
from anabranch.edge.runtime.transport import GatewayUnavailable
from anabranch.edge.runtime.trust import add_trusted
from anabranch.protocols.errors import BundleError, DeviceError, ProtocolError
from anabranch.protocols.wire import decode_delta
from tests.edge.agents import GOOD, FakeSensors, agent_of, delta_bytes, killed, nothing_left, offer
from tests.edge.bundles import TRUSTED
from tests.edge.gateways import FakeGateway, enrolled_at


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
) -> None:
    one = offer(fake, bundle)
    owner: Any = {"remember": task, "perform": task, "forget": task, "send": sync}.get(
        where, Spool if where in ("put", "remove") else loop
    )
    with enrolled_at(fake, home) as gateway:
        killed(agent_of(gateway, home, data), owner, where, after=after)
        if where == "remember" and not after:  # the gateway gives a device the task it has
            fake.replies.append(edge_pb2.CheckInReply(task=one))
        agent_of(gateway, home, data).run(once=True)
    assert len(fake.committed) == 1
    assert len(fake.uploads) == 1
    assert nothing_left(home)


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
