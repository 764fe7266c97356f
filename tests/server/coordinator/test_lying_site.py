"""A site that has joined and lies: to the SuperLink, to the run, and at the port."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from anabranch.client.agent.door import Door
from anabranch.client.agent.identity import Identity, trusting
from anabranch.client.fleet import Announced, Fleet, Refused, _call, _without_content
from anabranch.client.flower import DESCRIBE
from anabranch.client.policy.code import app_bundle, code_digest
from anabranch.protocols.errors import MalformedMessage, RunError
from anabranch.protocols.identity import authority, join
from anabranch.server.coordinator import door_server
from anabranch.server.coordinator.door import PEER, TOLD
from anabranch.server.coordinator.door import Door as PublicDoor
from anabranch.server.coordinator.door import Refused as Forbidden
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.limits import RENEWALS
from anabranch.server.fleet_calls import GRACE_S, NOTHING, PIECE, FleetCalls
from anabranch.server.superlink import SuperLink, SuperLinkGrid
from tests.server.coordinator.served import HOST, Served, served

SAID = RecordDict({"message": ConfigRecord({"kind": "describe", "json": b"{}"})})


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("lying")) as coordinator:
        yield coordinator


@pytest.fixture(scope="module")
def anna(here: Served) -> Iterator[Fleet]:
    yield from connected(here, here.join("st-anna"))


@pytest.fixture(scope="module")
def mary(here: Served, anna: Fleet) -> Iterator[Fleet]:
    yield from connected(here, here.join("st-mary"))


@pytest.fixture
def grid(here: Served, anna: Fleet, mary: Fleet) -> Iterator[SuperLinkGrid]:
    anna.beat()
    mary.beat()
    with here.supervisor.link.attach(app_bundle(code_digest())) as attached:
        yield attached


def connected(here: Served, identity: Identity) -> Iterator[Fleet]:
    fleet = Fleet(here.address, identity.context(), identity.key())
    fleet.connect()
    yield fleet
    fleet.close()


def asked(grid: SuperLinkGrid, fleet: Fleet, words: RecordDict = SAID) -> tuple[str, Announced]:
    """Send a site a message; return its id, and what the site sees of it."""
    (name,) = grid.push_messages([Message(words, fleet.node, DESCRIBE, ttl=60.0, group_id="0")])
    found = until(fleet.receive)
    assert found.id == name
    return name, found


def until(look: Callable[[], Any]) -> Any:
    end = time.monotonic() + 30
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def answer_to(fleet: Fleet, one: Announced) -> Message:
    message = fleet.fetch(one, 1 << 20, lambda done, total: None)
    return Message(RecordDict({"message": ConfigRecord({"kind": "x"})}), reply_to=message)


def announcement(fleet: Fleet, reply: Message, **changes: Any) -> PushMessagesRequest:
    """Return what a site says of an answer, with changes to the message's metadata."""
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree, proto = get_object_tree(reply), message_to_proto(_without_content(reply))
    for name, value in changes.items():
        setattr(proto.metadata, name, value)
    return PushMessagesRequest(
        node=Node(node_id=fleet.node),
        messages_list=[proto],
        message_object_trees=[tree],
        clientapp_runtime_list=[0.1],
    )


def test_an_honest_answer_arrives(grid: SuperLinkGrid, anna: Fleet) -> None:
    name, one = asked(grid, anna)

    anna.answer(answer_to(anna, one), 0.1, lambda done, total: None)

    (reply,) = until(lambda: grid.pull_messages([name]))
    assert not reply.has_error()
    assert reply.metadata.src_node_id == anna.node


@pytest.mark.parametrize(
    "changes",
    [
        {"src_node_id": SUPERLINK_NODE_ID, "reply_to_message_id": ""},
        {"reply_to_message_id": ""},
        {"src_node_id": 77},
        {"dst_node_id": 77},
        {"message_id": "0" * 64},
    ],
)
def test_a_site_sends_nothing_but_its_own_answers(
    grid: SuperLinkGrid, anna: Fleet, mary: Fleet, changes: dict[str, Any]
) -> None:
    _, one = asked(grid, anna)
    reply = answer_to(anna, one)
    order = announcement(anna, reply, **changes)
    if "dst_node_id" not in changes and "src_node_id" in changes:
        order.messages_list[0].metadata.dst_node_id = mary.node

    with pytest.raises(Refused):
        _call(anna._client.PushMessages, order)

    assert mary.receive() is None


def test_no_answer_is_given_in_anothers_name(grid: SuperLinkGrid, anna: Fleet, mary: Fleet) -> None:
    theirs, _ = asked(grid, mary)
    ours, one = asked(grid, anna)
    reply = answer_to(anna, one)
    reply.metadata.__dict__["_reply_to_message_id"] = theirs
    reply.metadata.__dict__["_src_node_id"] = mary.node
    false = announcement(anna, reply, reply_to_message_id=ours, src_node_id=anna.node)

    upload(anna, grid.flower_run, reply, false)

    (error,) = until(lambda: grid.pull_messages([theirs, ours]))
    assert error.has_error()
    assert error.metadata.reply_to_message_id == ours


def upload(fleet: Fleet, run: int, reply: Message, said: PushMessagesRequest) -> None:
    told = _call(fleet._client.PushMessages, said)
    with no_object_id_recompute():
        objects = {name: one.deflate() for name, one in get_all_nested_objects(reply).items()}
    for name in told.objects_to_push:
        fleet._push(run, told.session_id, name, objects[name])


@pytest.mark.parametrize(
    "content",
    [
        b"ConfigRecord  0\x00",
        b"Message  4\x00\xff\xff\xff\xff",
        b"Message " + b"a" * 64 + b" 0\x00",
        b"RecordDict  2\x00{}",
        b"ArrayChunk  1\x00a",
    ],
)
def test_objects_that_are_no_answer_stop_no_run(
    grid: SuperLinkGrid, anna: Fleet, content: bytes
) -> None:
    name, one = asked(grid, anna)
    reply = answer_to(anna, one)
    false = announcement(anna, reply)
    root = hashlib.sha256(content).hexdigest()
    del false.message_object_trees[:]
    false.message_object_trees.append(ObjectTree(object_id=root))
    false.messages_list[0].metadata.message_id = root
    told = _call(anna._client.PushMessages, false)
    anna._push(grid.flower_run, told.session_id, root, content)

    (error,) = until(lambda: grid.pull_messages([name]))

    assert error.has_error()
    assert grid.get_node_ids()


def test_an_answer_of_too_many_objects_is_refused(
    grid: SuperLinkGrid, anna: Fleet, here: Served
) -> None:
    _, one = asked(grid, anna)
    order = announcement(anna, answer_to(anna, one))
    most = FleetCalls(here.federation.settings.limits.max_message_bytes).objects
    for number in range(most):
        name = hashlib.sha256(str(number).encode()).hexdigest()
        order.message_object_trees[0].children.append(ObjectTree(object_id=name))

    with pytest.raises(Refused, match="an answer of"):
        _call(anna._client.PushMessages, order)


def test_a_piece_that_is_too_large_or_of_no_upload_is_refused(
    grid: SuperLinkGrid, anna: Fleet
) -> None:
    large = PushObjectRequest(
        node=Node(node_id=anna.node), run_id=grid.flower_run, object_content=b" " * PIECE
    )
    nowhere = PushObjectRequest(node=Node(node_id=anna.node), object_id="0" * 64)

    with pytest.raises(Refused, match="at most"):
        _call(anna._client.PushObject, large)
    with pytest.raises(Refused, match="no upload"):
        _call(anna._client.PushObject, nowhere)


def given(one: Announced) -> bytes:
    """Return what the SuperLink answers a site that asks for messages."""
    answer: bytes = PullMessagesResponse(message_object_trees=[one.tree]).SerializeToString()
    return answer


def test_what_was_given_to_one_site_is_not_there_for_another(
    grid: SuperLinkGrid, mary: Fleet
) -> None:
    now = [0.0]
    calls = FleetCalls(1 << 20, clock=lambda: now[0])
    name, one = asked(grid, mary)
    calls.answered("mary", "/v1/fleet/pull-messages", given(one))
    pulls = [
        PullObjectRequest(object_id=object_id).SerializeToString()
        for object_id in (name, one.tree.children[0].object_id)
    ]
    confirm = ConfirmMessageReceivedRequest(message_object_id=name).SerializeToString()

    def judged(site: str) -> list[bytes | None]:
        return [calls.judge(site, "/v1/fleet/pull-object", one) for one in pulls]

    assert judged("anna") == [None, None]  # a door that was just started cannot tell
    now[0] = GRACE_S
    assert judged("anna") == [NOTHING, NOTHING]
    assert calls.judge("anna", "/v1/fleet/confirm-message-received", confirm) == NOTHING
    assert judged("mary") == [None, None]
    assert calls.judge("mary", "/v1/fleet/confirm-message-received", confirm) is None
    assert judged("mary") == [NOTHING, NOTHING]
    assert calls.judge("mary", "/v1/fleet/pull-messages", b"") is None


@pytest.mark.parametrize(
    "path", ["push-messages", "push-object", "pull-object", "confirm-message-received"]
)
def test_what_is_no_call_is_refused_before_flower_sees_it(path: str) -> None:
    with pytest.raises(MalformedMessage):
        FleetCalls(1 << 20).judge("key", f"/v1/fleet/{path}", b"\xff\xff\xff")


def test_a_certificate_is_not_renewed_again_and_again(here: Served) -> None:
    with Door(here.join("renewing")) as door:
        for _ in range(int(RENEWALS)):
            door.renew()
        with pytest.raises(RunError, match="too many renewals"):
            door.renew()


def test_refusals_do_not_fill_the_audit_log(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path / "f", "heart", [HOST], 8443)
    door = PublicDoor(federation, SuperLink(tmp_path / "s"))

    async def strangers() -> None:
        for number in range(2 * TOLD):
            scope = {"client": (f"10.0.{number // 250}.{number % 250}", 1)}
            await door._note(scope, Forbidden(401, "no certificate", "no"))

    asyncio.run(strangers())

    log = (federation.folder / "audit.jsonl").read_bytes()
    assert log.count(b'"peer-refused"') == TOLD
    assert door.refused == {"no certificate": 2 * TOLD}


def test_a_state_that_cannot_be_read_is_said_and_not_shown(here: Served) -> None:
    identity = here.join("unlucky")
    door = PublicDoor(here.federation, SuperLink(Path("nowhere")))

    class Broken:
        def site_by_key(self, key: str) -> None:
            raise RunError("/srv/federation/state.sqlite: cannot be used now")

    door.federation = types.SimpleNamespace(state=Broken(), audit=None)  # type: ignore[assignment]
    peer = identity.certificate().public_bytes(Encoding.DER)
    said: list[Any] = []

    async def call() -> None:
        async def receive() -> Any:
            return {"type": "http.request"}

        async def send(event: Any) -> None:
            said.append(event)

        scope = {"type": "http", "method": "GET", "path": join.HELLO, "headers": [], PEER: peer}
        await door(scope, receive, send)

    asyncio.run(call())

    assert said[0]["status"] == 503
    assert b"sqlite" not in said[1]["body"]


def test_a_site_has_so_many_connections_and_no_more(here: Served) -> None:
    identity = here.join("greedy")
    host, _, port = here.address.rpartition(":")
    with ExitStack() as stack:
        for _ in range(door_server.SITE_MOST):
            plain = stack.enter_context(socket.create_connection((host, int(port)), 10))
            stack.enter_context(identity.context().wrap_socket(plain, server_hostname=host))
        with Door(identity) as door, pytest.raises(RunError):
            door.hello()


def test_who_holds_connections_before_tls_keeps_no_site_out(here: Served) -> None:
    host, _, port = here.address.rpartition(":")
    limits = here.federation.settings.limits
    with ExitStack() as stack:
        for number in range(limits.connections):
            source = (f"127.0.1.{1 + number // limits.connections_per_address}", 0)
            stack.enter_context(
                socket.create_connection((host, int(port)), 10, source_address=source)
            )
        identity = here.join("patient")
        with Door(identity) as door:
            assert door.hello().federation == "heart"


def test_a_certificate_that_a_site_signed_lets_nobody_in(here: Served, tmp_path: Path) -> None:
    anna, now = Identity(here.folder / "st-anna"), datetime.now(UTC)
    issuer, key = anna.certificate(), authority.new_key()
    signing = authority.Authority("heart", anna.key(), issuer)
    forged = signing.site(key.public_key(), "st-mary", now)
    chain = authority.certificate_pem(forged) + authority.certificate_pem(issuer)
    (tmp_path / "key.pem").write_bytes(authority.key_pem(key))
    (tmp_path / "chain.pem").write_bytes(chain)
    context = trusting(here.federation.root())
    context.load_cert_chain(tmp_path / "chain.pem", tmp_path / "key.pem")

    with (
        httpx.Client(
            verify=context, base_url=f"https://{here.address}", trust_env=False, timeout=60
        ) as peer,
        pytest.raises(httpx.TransportError),
    ):
        peer.get(join.HELLO)
