"""The agent against clocks that jump, disks that are full, and gateways that mean no good."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from anabranch.cli.main import run
from anabranch.edge.gateway.authority import Authority
from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import agent, enrol, task
from anabranch.edge.runtime.agent import Ask, Facts, Memory, Send, decide, read_memory
from anabranch.edge.runtime.alone import only_one
from anabranch.edge.runtime.backoff import MAX_WINDOW_S, Backoff, Window
from anabranch.edge.runtime.conditions import Readings
from anabranch.edge.runtime.device_file import Conditions
from anabranch.edge.runtime.download import PART, prune, wanted
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.loop import Agent
from anabranch.edge.runtime.spool import Spool
from anabranch.edge.runtime.transport import as_device_error
from anabranch.protocols.errors import DeviceError, ProtocolError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Training, Uplink
from tests.edge.agents import GOOD, FakeSensors
from tests.edge.gateways import (
    SECRET,
    FakeGateway,
    enrolled_at,
    invitation_of,
    new_authority,
    served,
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return new_authority(tmp_path_factory.mktemp("ca"))


@dataclass
class Watching(FakeGateway):
    """Remembers the certificate of every check-in."""

    seen: list[bytes] = field(default_factory=list)

    def CheckIn(self, request: edge_pb2.CheckInRequest, context: Any) -> edge_pb2.CheckInReply:
        self.seen.append(context.auth_context()["x509_pem_cert"][0])
        return super().CheckIn(request, context)


@pytest.fixture
def fake(authority: Authority) -> Watching:
    return Watching(authority)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "label": "b"}\n' * 3)
    return path


def agent_of(gateway: Any, home: Home, data: Path | None, **fields: Any) -> tuple[Agent, list[str]]:
    said: list[str] = []
    values: dict[str, Any] = {"conditions": Conditions(), "sensors": FakeSensors()} | fields
    return Agent(home=home, gateway=gateway, data=data, say=said.append, **values), said


def a_task(**changes: Any) -> edge_pb2.Task:
    given: dict[str, Any] = {
        "id": "t-1",
        "run": "r-1",
        "round": 1,
        "bundle": "codes",
        "bundle_version": 1,
        "training": msgspec.json.encode(Training()),
        "part": msgspec.json.encode(Part()),
        "uplink": msgspec.json.encode(Uplink()),
        "deadline_unix": int(time.time()) + 3600,
        "max_upload_bytes": 1000,
    }
    return edge_pb2.Task(**(given | changes))


# Certificates


def test_a_renewed_certificate_is_used_at_once(
    fake: Watching, home: Home, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service runs for longer than its first certificate."""
    monkeypatch.setattr(enrol, "to_be_renewed", lambda *_: True)
    with enrolled_at(fake, home) as gateway:
        first = home.certificate.read_bytes()
        agent_of(gateway, home, data)[0].run(once=True)
        assert home.certificate.read_bytes() != first
        assert fake.seen == [home.certificate.read_bytes()]


def test_another_device_does_not_inherit_tasks_and_deltas(fake: Watching, home: Home) -> None:
    """What was trained for one gateway is not sent to the next."""
    home.folder.mkdir(parents=True)
    task.remember(home, a_task())
    Spool(home.spool).put("t-0", b"delta", examples=1, steps=1, deadline_unix=2**40)
    agent.write_memory(home, Memory(ask_unix=time.time() + 5e5))
    with served(fake, mutual=False):
        enrol.enrol(home, invitation_of(fake))
    assert fake.enrolled[0].token == SECRET
    assert task.remembered(home) is None
    assert Spool(home.spool).entries() == []
    assert read_memory(home) == Memory()


def test_a_device_that_works_is_not_enrolled_anew_under_its_feet(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"localhost:1/{'a' * 64}/{SECRET}"
    with only_one(home):
        assert run(["edge", "enroll", text, "--home", str(home.folder), "--force"]) == 1
    assert "another process works for this device" in capsys.readouterr().err
    assert home.folder.stat().st_mode & 0o077 == 0


# Clocks


def facts(memory: Memory, **more: Any) -> Facts:
    given: dict[str, Any] = {"unmet": (), "entries": (), "doing": None}
    return Facts(now_unix=1e9, memory=memory, **(given | more))


def test_a_clock_that_was_set_back_does_not_silence_the_device(home: Home) -> None:
    later = 1e9 + MAX_WINDOW_S
    assert isinstance(decide(facts(Memory(ask_unix=later + 1))), Ask)
    assert isinstance(decide(facts(Memory(call_unix=later + 1))), Ask)
    assert not isinstance(decide(facts(Memory(ask_unix=later))), Ask)
    entry = Spool(home.spool).put("t", b"x", examples=1, steps=1, deadline_unix=2**31)
    assert isinstance(decide(facts(Memory(call_unix=later + 1), entries=(entry,))), Send)


def test_a_clock_that_was_set_back_does_not_hide_lost_conditions(home: Home) -> None:
    clock = iter([10_000.0, 10_001.0, 400.0, 400.0, 400.0])
    hot = FakeSensors(GOOD)
    one, _ = agent_of(None, home, Path("data"), sensors=hot, now=lambda: next(clock))
    should_stop = one._watch(1e12)
    hot.readings = Readings(
        battery=0.1,
        charging=False,
        temperature_c=90.0,
        network=None,
        idle=False,
        local=GOOD.local,
    )
    assert not should_stop()  # a second later
    assert should_stop()


def test_a_gateway_cannot_keep_a_device_for_longer_than_a_week(
    fake: Watching, home: Home, data: Path
) -> None:
    fake.replies.append(edge_pb2.CheckInReply(task=a_task(deadline_unix=2**52)))
    with enrolled_at(fake, home) as gateway:
        one, _ = agent_of(gateway, home, data, now=lambda: 1e9)
        one.do(Ask())
        kept = task.remembered(home)
        assert kept is not None
        assert kept.deadline_unix == 1e9 + MAX_WINDOW_S


# Disks


class Stopped(Exception):
    pass


def test_a_full_disk_is_said_and_tried_again(
    fake: Watching, home: Home, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise Stopped

    with enrolled_at(fake, home) as gateway:
        one, said = agent_of(gateway, home, data, sleep=sleep)
        monkeypatch.setattr(agent, "write_memory", full)
        with pytest.raises(Stopped):
            one.run(once=False)
        assert slept[0] == agent.POLL_S
        assert "No space left" in said[0]
        with pytest.raises(DeviceError, match="No space left"):
            one.run(once=True)


def test_half_downloads_that_nobody_wants_any_more_are_removed(home: Home) -> None:
    home.cache.mkdir(parents=True)
    old, new = (home.cache / (name * 64 + PART) for name in "ab")
    for path in (old, new):
        path.write_bytes(b"half")
    assert prune(home, keep=["b" * 64]) == 4
    assert [path.name for path in home.cache.iterdir()] == [new.name]


# What a gateway says


def test_what_a_gateway_says_does_not_reach_the_terminal_as_it_is(
    fake: Watching, home: Home
) -> None:
    Spool(home.spool).put("t-0", b"delta", examples=1, steps=1, deadline_unix=2**40)
    fake.verdict = (False, "no\x1b[2J\nINFO all is well " + "x" * 5000)
    with enrolled_at(fake, home) as gateway:
        one, said = agent_of(gateway, home, None)
        one.run(once=True)
    assert any("refused" in text for text in said)
    for text in [*said, read_memory(home).last]:
        assert text.isprintable()
        assert len(text) < 1000


def test_an_error_of_a_gateway_does_not_reach_the_terminal_as_it_is() -> None:
    class Broken(grpc.RpcError):  # type: ignore[misc]
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.NOT_FOUND

        def details(self) -> str:
            return "no\x1b[2J\nINFO all is well"

    assert str(as_device_error(Broken())).isprintable()


def test_names_for_the_terminal_are_refused(fake: Watching, home: Home) -> None:
    with pytest.raises(ProtocolError, match="name") as error:
        wanted(edge_pb2.FileRef(name="a\x1b[2J", sha256=bytes(32), size=1), limit=10)
    assert str(error.value).isprintable()

    def named(reply: edge_pb2.EnrollReply) -> edge_pb2.EnrollReply:
        reply.device = "d\x1b[2J"
        return reply

    fake.reply = named
    with served(fake, mutual=False), pytest.raises(DeviceError, match="name"):
        enrol.enrol(home, invitation_of(fake))
    assert not home.gateway.exists()


def test_a_task_with_a_name_for_the_terminal_is_refused() -> None:
    for name in ("id", "run"):
        with pytest.raises(ProtocolError, match="id and run") as error:
            task.checked(a_task(**{name: "a\x1b[2J"}))
        assert str(error.value).isprintable()


# Records that came after the check-in


def test_more_records_than_were_told_are_told_before_the_delta_is_sent(
    fake: Watching, home: Home, data: Path
) -> None:
    with enrolled_at(fake, home) as gateway:
        one, _ = agent_of(gateway, home, data)
        one.run(once=True)
        assert fake.asked[0].capabilities.examples == 3
        spool = Spool(home.spool)
        spool.put("t-1", b"delta", examples=5, steps=1, deadline_unix=2**40)
        one.run(once=True)
        assert (fake.asked[1].resume_task, fake.asked[1].capabilities.examples) == ("t-1", 5)
        assert len(fake.committed) == 1
        spool.put("t-2", b"delta", examples=4, steps=1, deadline_unix=2**40)
        asked = len(fake.asked)
        agent_of(gateway, home, None)[0].run(once=True)
        assert [one.resume_task for one in fake.asked[asked:]] in ([], ["t-2"])
        assert len(fake.committed) == 2


def test_what_was_told_outlives_failures_and_windows() -> None:
    memory, rng = Memory(told=7), random.Random(0)
    assert agent.failed(memory, 0.0, Backoff(), rng).told == 7
    assert agent.reached(memory, 0.0, Window(min_s=1, max_s=2), rng).told == 7
