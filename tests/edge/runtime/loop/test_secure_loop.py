"""The agent in a secure round: it trains, keeps its delta, and joins the sum."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from anabranch.edge.gateway.authority import Authority
from anabranch.edge.gateway.config import GATEWAY_FILE, Limits
from anabranch.edge.gateway.operator import gateway_file, invite, make_gateway
from anabranch.edge.gateway.server import Gateway as Serving
from anabranch.edge.gateway.server import start
from anabranch.edge.gateway.store import Row
from anabranch.edge.gateway.upstream import GatewaySite
from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import agent as agents
from anabranch.edge.runtime import task
from anabranch.edge.runtime.device_file import DEVICE_FILE
from anabranch.edge.runtime.enrol import Invitation, enrol
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.ledger_report import ledger_of
from anabranch.edge.runtime.loop import Agent
from anabranch.edge.runtime.spool import Spool
from anabranch.edge.runtime.transport import Gateway, GatewayUnavailable, connect
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PolicyError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Federation, Uplink
from anabranch.protocols.wire import decode_delta
from tests.edge.agents import TRAINING, agent_of, offer, write_data
from tests.edge.bundles import TRUSTED
from tests.edge.gateways import FakeGateway, enrolled_at
from tests.ports import free_port

PRIVACY = edge_pb2.RecordPrivacy(
    noise_multiplier=1.0, sample_rate=4 / 24, clipping_norm=1.0, delta=1e-4
)
SECURE = edge_pb2.SecureSum(
    minimum=3, threshold=0.6, range=4.0, weighting="examples", colluding=0.1
)
Bundle = tuple[Path, Any]
DAY_S = 86_400.0


class Summing(FakeGateway):
    """A gateway whose answers to Stage are those of the test."""

    stages: list[edge_pb2.StageReply | grpc.StatusCode]
    heard: list[edge_pb2.StageRequest]

    def Stage(self, request: edge_pb2.StageRequest, context: Any) -> edge_pb2.StageReply:
        self.heard.append(request)
        reply = self.stages.pop(0)
        if isinstance(reply, grpc.StatusCode):
            context.abort(reply, "as the test wants")
        return reply


def ended(reason: str = "") -> edge_pb2.StageReply:
    return edge_pb2.StageReply(ended=edge_pb2.SumEnd(counted=not reason, reason=reason))


@pytest.fixture
def fake(authority: Authority, bundle: Bundle) -> Summing:
    fake = Summing(authority)
    fake.stages, fake.heard = [], []
    for path in bundle[0].iterdir():
        fake.put(path.read_bytes())
    return fake


def offer_sum(fake: FakeGateway, made: Bundle, **changes: Any) -> edge_pb2.Task:
    """Let the gateway offer a task of a secure round."""
    return offer(fake, made, **({"secure": SECURE} | changes))


def awake(gateway: Gateway, home: Home, data: Path) -> Agent:
    """Return an agent that waits for nothing."""
    return agent_of(gateway, home, data, sleep=lambda seconds: None)


def test_the_delta_stays_and_an_aborted_sum_costs_no_line_of_the_ledger(
    fake: Summing, bundle: Bundle, home: Home, data: Path
) -> None:
    offer_sum(fake, bundle, privacy=PRIVACY)
    fake.stages = [ended("secure sum: 2 devices are left")]
    with enrolled_at(fake, home) as gateway:
        agent = awake(gateway, home, data)
        agent.run(once=True)
    assert fake.uploads == {}
    assert fake.committed == []
    assert [request.stage for request in fake.heard] == [""]
    assert task.remembered(home) is None
    assert Spool(home.spool).entries() == []
    ledger = ledger_of(home)
    assert len(ledger.history()) == 1
    state = ledger.state()
    assert state is not None
    assert (len(state.settled), len(state.open)) == (1, 0)
    assert "delta of task t-1 is in no sum: secure sum: 2 devices are left" in agent.said  # type: ignore[attr-defined]


def test_without_a_network_the_delta_waits(
    fake: Summing, bundle: Bundle, home: Home, data: Path
) -> None:
    offer_sum(fake, bundle)
    fake.stages = [grpc.StatusCode.UNAVAILABLE] * 3
    with enrolled_at(fake, home) as gateway:
        with pytest.raises(GatewayUnavailable):
            awake(gateway, home, data).run(once=True)
        (entry,) = Spool(home.spool).entries()
        assert entry.secure
        assert task.remembered(home) is not None
        fake.stages = [ended()]
        awake(gateway, home, data).run(once=True)
    assert Spool(home.spool).entries() == []
    assert len(fake.aborted) == 0


@pytest.mark.parametrize("where", ["forget", "remove"])
def test_a_kill_at_the_end_trains_nothing_again(
    fake: Summing,
    bundle: Bundle,
    home: Home,
    data: Path,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer_sum(fake, bundle)
    fake.stages = [ended(), ended()]

    def dying(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with enrolled_at(fake, home) as gateway:
        with monkeypatch.context() as patch:
            patch.setattr(task if where == "forget" else Spool, where, dying)
            with pytest.raises(KeyboardInterrupt):
                awake(gateway, home, data).run(once=True)
        monkeypatch.setattr(task, "perform", dying)
        awake(gateway, home, data).run(once=True)
    assert Spool(home.spool).entries() == []
    assert task.remembered(home) is None


def test_a_device_that_requires_sums_trains_nothing_else(
    fake: Summing, bundle: Bundle, home: Home, data: Path
) -> None:
    home.folder.mkdir(exist_ok=True)
    (home.folder / DEVICE_FILE).write_text("[secure_aggregation]\nrequired = true\n")
    offer_sum(fake, bundle, secure=None)
    offer_sum(fake, bundle)
    with enrolled_at(fake, home) as gateway:
        with pytest.raises(PolicyError, match="asks for the delta itself"):
            awake(gateway, home, data).run(once=True)
        with pytest.raises(PolicyError, match="roster: it is not signed"):
            awake(gateway, home, data).run(once=True)
    assert fake.aborted == [("t-1", "PolicyError")] * 2
    assert fake.fetched == []


def test_a_request_that_does_not_fit_gives_the_task_back(
    fake: Summing, bundle: Bundle, home: Home, data: Path
) -> None:
    offer_sum(fake, bundle)
    asked = edge_pb2.SumRequest(stage="advertise", content=b"{}")
    fake.stages = [edge_pb2.StageReply(request=asked)]
    with enrolled_at(fake, home) as gateway, pytest.raises(Exception, match="secure sum"):
        awake(gateway, home, data).run(once=True)
    assert fake.aborted == [("t-1", "ProtocolError")]
    assert Spool(home.spool).entries() == []
    assert task.remembered(home) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"minimum": 1},
        {"threshold": 0.4},
        {"colluding": 0.5},
        {"range": 0.0},
        {"range": float("nan")},
        {"weighting": "mine"},
        {"roster": b"short"},
    ],
    ids=str,
)
def test_a_task_that_no_sum_can_be_made_of_is_refused(
    fake: Summing, bundle: Bundle, changes: dict[str, Any]
) -> None:
    secure = edge_pb2.SecureSum()
    secure.CopyFrom(SECURE)
    for name, value in changes.items():
        setattr(secure, name, value)
    one = offer_sum(fake, bundle, secure=secure)
    with pytest.raises(Exception, match="task t-1: "):
        task.checked(one)
    for table in (Uplink(codec="int8"), Part(ranks=(0,))):
        wrong = offer_sum(fake, bundle)
        name = "uplink" if isinstance(table, Uplink) else "part"
        setattr(wrong, name, msgspec.json.encode(table))
        with pytest.raises(Exception, match="a secure sum of"):
            task.checked(wrong)


# With a real gateway: devices that train a bundle, in threads, and the gateway's Flower side.


def test_three_devices_train_and_the_gateway_sees_their_sum_alone(
    tmp_path: Path, bundle: Bundle, make_config: Callable[..., RunConfig]
) -> None:
    file = gateway_file(
        "north",
        ["127.0.0.1"],
        port=free_port(),
        enroll_port=free_port(),
        bundles=[str(bundle[0])],
        bundle_keys=[key.hex() for key in TRUSTED],
        cohort=3,
        min_cohort=3,
        retry_s=1,
        limits=Limits(calls_a_minute=100_000),
        secure_aggregation={"minimum": 3, "stage_s": 20.0},
    )
    make_gateway(tmp_path / "gateway", file)
    assert "[secure_aggregation]" in (tmp_path / "gateway" / GATEWAY_FILE).read_text()
    counts = (24, 12, 18)

    def device(number: int) -> str:
        home, offset = Home(tmp_path / f"device-{number}"), 0.0

        def sleep(seconds: float) -> None:
            nonlocal offset
            offset += seconds  # its clock runs ahead of the gateway's, for less than DAY_S
            time.sleep(0.02)

        with connect(home) as channel:
            agent = agent_of(channel, home, tmp_path / f"{number}.npz", sleep=sleep)
            agent.now = lambda: time.time() + offset
            agent.run(once=True)
        return agents.read_memory(home).last

    config = make_config(
        "tabular", training=TRAINING, federation=Federation(rounds=2, deadline_s=DAY_S)
    )
    with start(tmp_path / "gateway") as gateway:
        for number, text in enumerate(invite(tmp_path / "gateway", count=3)):
            write_data(tmp_path / f"{number}.npz", number, counts[number])
            enrol(Home(tmp_path / f"device-{number}"), Invitation.parse(text))
        with ThreadPoolExecutor(4) as pool:
            assert [*pool.map(device, range(3))] == ["checked in: no task now"] * 3
            site = GatewaySite(tmp_path / "gateway")
            asked = pool.submit(site.train, Assignment(run="r", round=1, config=config), bundle[1])
            wait_for_a_round(gateway)
            said = [*pool.map(device, range(3))]
            trained, frame = asked.result(60)
        (row,) = gateway.parts.store.rows("SELECT * FROM rounds")
    assert [word.endswith(" is in the sum") for word in said] == [True] * 3
    require_sum(row)
    assert (trained.num_examples, trained.steps) == (sum(counts), 6)
    assert decode_delta(frame, bundle[1].spec).norm() > 0


def wait_for_a_round(gateway: Serving, wait_s: float = 60.0) -> None:
    until = time.monotonic() + wait_s
    while not gateway.parts.store.rows("SELECT id FROM rounds"):
        assert time.monotonic() < until
        time.sleep(0.01)


def require_sum(row: Row) -> None:
    assert (row["state"], row["clients"], row["reason"]) == ("closed", 3, "")
