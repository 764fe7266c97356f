"""What a coordinator that lies, and a neighbour on the same machine, cannot do to an agent."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.run_pb2 import GetRunResponse, Run

from anabranch.client.agent import agent as agents
from anabranch.client.agent.agent import NODE, OWN_TROUBLE, Agent
from anabranch.client.agent.door import Door
from anabranch.client.agent.identity import Identity
from anabranch.client.agent.join import join_site
from anabranch.client.agent.work import Doing
from anabranch.client.fleet import Fleet, Refused, Unreachable
from anabranch.client.policy.journal import LINES
from anabranch.client.policy.rules import NotAllowed
from anabranch.client.sums.participant import PARTICIPANTS
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.identity.join import Report, decode, encode
from tests.client.agent.doors import Coordinator


@pytest.fixture
def site(door: Coordinator, records: Path, tmp_path: Path) -> Path:
    """Return the folder of a joined site that others could look into."""
    folder = tmp_path / "site"
    folder.mkdir(mode=0o755)
    join_site(door.invite(), records, folder)
    return folder


@pytest.fixture
def fleet(site: Path) -> Iterator[Fleet]:
    identity = Identity(site)
    opened = Fleet(identity.address, identity.context(), identity.key())
    yield opened
    opened._client.close()


@pytest.mark.parametrize("name", ["", "x" * 64, "a" * 10_000_000, "\x1b[2J" + "a" * 60])
def test_a_message_is_named_by_a_hash(fleet: Fleet, name: str) -> None:
    fleet._client.PullMessages = lambda request: PullMessagesResponse(  # type: ignore[method-assign]
        messages_list=[Message(metadata=Metadata(message_id=name))],
        message_object_trees=[ObjectTree(object_id=name)],
    )

    with pytest.raises(Refused, match="without a name"):
        fleet.receive()


@pytest.mark.parametrize("wants", ["", "F" * 64, "0" * 63, "0" * 10_000_000])
def test_an_app_is_named_by_a_hash(fleet: Fleet, wants: str) -> None:
    fleet._client.GetRun = lambda request: GetRunResponse(  # type: ignore[method-assign]
        run=Run(fab_hash=wants)
    )

    with pytest.raises(Refused, match="names no app"):
        fleet.app(1)


def test_a_certificate_is_not_renewed_whenever_the_coordinator_says_so(
    site: Path, door: Coordinator
) -> None:
    agent = Agent(site)
    before = len(door.seen)
    with Door(agent.identity) as opened:
        renewed = [agent._renews(opened, True) for _ in range(5)]

    assert renewed == [True, False, False, False, False]
    assert [one.path for one in door.seen[before:]] == ["/site/renew"]


def test_runs_for_other_software_do_not_fill_the_log(site: Path) -> None:
    agent = Agent(site)
    for number in range(3 * LINES):
        agent.guarded.journal.refusal(str(number), None, NotAllowed("code", "other software"))

    assert (site / "audit.jsonl").read_bytes().count(b'"refused"') == LINES


@pytest.mark.parametrize("about", [{"run": "x" * 10_000}, {"run": "\x1b[2J"}, {"round": 2**70}])
def test_what_a_message_says_of_itself_can_be_reported(about: dict[str, Any]) -> None:
    doing = Doing("1")
    doing.set("preparing", **about)

    assert decode(encode(doing.report), Report) == doing.report


def test_a_path_of_the_sites_machine_is_not_reported(site: Path) -> None:
    agent = Agent(site)
    agent.stop.set()  # nobody waits
    errors = [
        OSError(28, "No space left on device", str(site / "answers")),
        ConfigError(f"{site}/site.toml: no data"),
    ]

    for error in errors:
        agent._lost(error)
        assert agent.doing.report.reason == OWN_TROUBLE
        assert str(site) in agent._link  # the owner is told
    agent._lost(Unreachable("coordinator example.org:8443 cannot be reached"))
    assert agent.doing.report.reason == "coordinator example.org:8443 cannot be reached"


@pytest.mark.parametrize("damage", [b"", b"no number", b"\xff\xfe"])
def test_a_node_that_cannot_be_read_is_asked_for_anew(
    site: Path, fleet: Fleet, damage: bytes
) -> None:
    asked: list[int] = []

    def connect(node: int = 0) -> int:
        asked.append(node)
        return 7

    fleet.connect = connect  # type: ignore[method-assign,assignment]
    (site / NODE).write_bytes(damage)

    Agent(site)._connect(fleet)

    assert asked == [0]
    assert (site / NODE).read_text() == "7"


def test_secrets_of_sums_that_are_over_go_whatever_the_coordinator_does(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops in the middle of one; the agent idles, cannot connect, or trains."""
    agent = Agent(site)
    monkeypatch.setattr(PARTICIPANTS, "expire", agent.stop.set)

    agent.serve()

    assert agent.stop.is_set()


def test_the_process_of_a_site_cannot_be_dumped(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(agents, "forbid_dumps", lambda: done.append("dumps"))
    monkeypatch.setattr(Agent, "serve", lambda self: done.append("serve"))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    agents.serve(site)

    assert done == ["dumps", "serve"]


def test_what_was_learned_from_records_is_for_the_owner_alone(site: Path) -> None:
    old = os.umask(0)
    try:
        (site / "personal").mkdir(mode=0o755)
        agent = Agent(site)
        agent.stop.set()
        agent.serve()
    finally:
        os.umask(old)

    for name in ("answers", "personal", "feedback", "clipping", "runs", "identity"):
        assert stat.S_IMODE((site / name).stat().st_mode) == 0o700, name
    for file in site.rglob("*"):
        assert not stat.S_IMODE(file.stat().st_mode) & 0o022, file
    secret = {"identity/site.key", "audit.key", "audit.jsonl", "policy.toml", "state.json"}
    for name in secret:
        assert stat.S_IMODE((site / name).stat().st_mode) == 0o600, name
