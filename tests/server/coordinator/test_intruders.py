"""Nobody gets in: every way that stock Flower leaves open, and those that TLS is known for."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest

from anabranch.client.agent.door import CLOSED, CutOff, Door, join_door, pinned
from anabranch.client.agent.door import Refused as DoorRefused
from anabranch.client.agent.identity import Identity, trusting
from anabranch.client.fleet import Fleet, Refused
from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.identity import authority, join
from anabranch.protocols.identity.invitation import Invitation, new_secret
from anabranch.server.coordinator import enrolment
from anabranch.server.coordinator.door_server import PeerProtocol
from tests.ports import free_port
from tests.server.coordinator.served import HOST, Served, served

PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}

# What stock Flower answers on its one port, to anybody who speaks TLS.
FLOWERS = [
    ("GET", "/docs", b""),
    ("GET", "/openapi.json", b""),
    ("GET", "/health", b""),
    ("POST", "/v1/control/start-run", StartRunRequest().SerializeToString()),
    ("POST", "/v1/control/register-node", RegisterNodeRequest().SerializeToString()),
    ("POST", "/v1/control/list-nodes", b""),
    ("POST", "/v1/control/list-runs", b""),
    (
        "POST",
        "/v1/runtime/acquire-task",
        AcquireTaskRequest(supported_task_types=["flwr-serverapp"]).SerializeToString(),
    ),
    ("POST", "/v1/runtime/get-nodes", b""),
    ("POST", "/v1/fleet/register-node", RegisterNodeFleetRequest().SerializeToString()),
    ("POST", "/v1/fleet/unregister-node", b""),
    ("POST", "/v1/fleet/get-fab", b""),
    ("POST", "/v1/fleet/../control/list-runs", b""),
    ("POST", "/v1/fleet/pull-messages/../../control/list-runs", b""),
    ("POST", "/v1/fleet/%2e%2e/control/list-runs", b""),
    ("POST", "//v1/control/list-runs", b""),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("intruders")) as coordinator:
        yield coordinator


@pytest.fixture(scope="module")
def anna(here: Served) -> Identity:
    return here.join("st-anna")


@pytest.fixture(scope="module")
def mary(here: Served) -> Identity:
    return here.join("st-mary")


def client(context: ssl.SSLContext, here: Served) -> httpx.Client:
    return httpx.Client(
        verify=context, base_url=f"https://{here.address}", trust_env=False, timeout=60
    )


def stranger(here: Served) -> ssl.SSLContext:
    """TLS without a certificate."""
    return trusting(here.federation.root())


def own(
    here: Served, key: authority.Key, certificate: x509.Certificate, at: Path
) -> ssl.SSLContext:
    """TLS with any certificate."""
    context = stranger(here)
    (at / "key.pem").write_bytes(authority.key_pem(key))
    (at / "own.pem").write_bytes(authority.certificate_pem(certificate))
    context.load_cert_chain(at / "own.pem", at / "key.pem")
    return context


def close_the_door_to_strangers(here: Served) -> None:
    """Let every site that has joined call once, and wait for the door to know."""
    for entry in here.federation.state.sites():
        if entry.status == "active":
            with Door(Identity(here.folder / entry.name)) as door:
                door.hello()
    assert here.federation.state.open_invitations(time.time()) == []
    end = time.monotonic() + 30
    while True:
        try:
            with client(stranger(here), here) as outside:
                outside.get(join.HELLO)
        except httpx.TransportError:
            return
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(("method", "path", "body"), FLOWERS)
def test_a_site_reaches_nothing_of_flower_but_its_own_calls(
    here: Served, anna: Identity, method: str, path: str, body: bytes
) -> None:
    with client(anna.context(), here) as inside:
        answer = inside.request(method, path, content=body, headers=PROTOBUF)

    assert answer.status_code in (404, 412)
    assert b"flwr" not in answer.content.lower()


@pytest.mark.parametrize(("method", "path", "body"), FLOWERS)
def test_without_a_certificate_there_is_no_connection(
    here: Served, anna: Identity, method: str, path: str, body: bytes
) -> None:
    close_the_door_to_strangers(here)

    with client(stranger(here), here) as outside, pytest.raises(httpx.TransportError):
        outside.request(method, path, content=body, headers=PROTOBUF)


def test_while_an_invitation_is_open_a_stranger_may_join_and_nothing_else(here: Served) -> None:
    enrolment.invite(here.federation, "late", time.time())
    try:
        deadline = time.monotonic() + 30
        with client(stranger(here), here) as outside:
            while True:
                try:
                    outside.get(join.HELLO)
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            for method, path, body in [
                *FLOWERS,
                ("GET", join.HELLO, b""),
                ("POST", join.REPORT, b"{}"),
                ("POST", join.RENEW, b"{}"),
                ("POST", "/v1/fleet/pull-messages", b""),
            ]:
                answer = outside.request(method, path, content=body, headers=PROTOBUF)
                assert answer.status_code == 401, path
                assert join.decode(answer.content, join.Refusal).code == "no certificate"
    finally:
        withdraw(here, "late")


def withdraw(here: Served, name: str) -> None:
    """Use up the open invitation of a name by letting it end."""
    here.federation.state.invite(name, "0" * 64, time.time() - 1, time.time() - 2)


def test_an_invitation_is_good_for_one_key_and_cannot_be_guessed(
    here: Served, tmp_path: Path
) -> None:
    invitation = enrolment.invite(here.federation, "once", time.time())
    guess = Invitation(
        address=invitation.address, authority=invitation.authority, secret=new_secret()
    )
    root = here.federation.root()

    def knock(one: Invitation) -> join.Joined:
        request = authority.certificate_request(authority.new_key())
        end = time.monotonic() + 30
        while True:
            try:
                return join_door(one, request, "0", root, Ed25519PrivateKey.generate())
            except (CutOff, DoorRefused) as error:  # it has not seen the invitation yet
                closed = isinstance(error, CutOff) or error.code == CLOSED
                if not closed or time.monotonic() > end:
                    raise
                time.sleep(0.1)

    with pytest.raises(DoorRefused, match="unknown, used or expired") as wrong:
        knock(guess)
    assert knock(invitation).site == "once"
    with pytest.raises(ProtocolError) as used:
        enrolment.join(
            here.federation,
            join.Join(
                secret=invitation.secret,
                request=authority.certificate_request(authority.new_key()).decode(),
                version="0",
            ),
            time.time(),
            lambda key: 0,
        )
    assert str(wrong.value).endswith(str(used.value))
    here.federation.state.arrived("once")
    enrolment.revoke(here.federation, "once")


def test_the_secret_goes_to_nobody_but_the_authority_that_was_named(here: Served) -> None:
    other = Invitation(address=here.address, authority="0" * 64, secret=new_secret())

    with pytest.raises(ProtocolError, match="not the coordinator that invited you"):
        pinned(other)


def test_certificates_of_other_authorities_are_refused(
    here: Served, anna: Identity, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    foreign, key = authority.new_authority("heart", [HOST], now), authority.new_key()
    twin = foreign.site(key.public_key(), "st-anna", now)

    with (
        client(own(here, key, twin, tmp_path), here) as outside,
        pytest.raises(httpx.TransportError),
    ):
        outside.get(join.HELLO)


def test_an_expired_certificate_is_refused(here: Served, anna: Identity, tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(days=2)
    old = here.federation.authority().site(anna.key().public_key(), "st-anna", before, 1)

    with (
        client(own(here, anna.key(), old, tmp_path), here) as outside,
        pytest.raises(httpx.TransportError),
    ):
        outside.get(join.HELLO)


def test_the_servers_own_certificate_is_none_of_a_site(here: Served, tmp_path: Path) -> None:
    key, now = authority.new_key(), datetime.now(UTC)
    server = here.federation.authority().server(key.public_key(), [HOST], now)

    with (
        client(own(here, key, server, tmp_path), here) as outside,
        pytest.raises(httpx.TransportError),
    ):
        outside.get(join.HELLO)


def test_a_key_that_is_not_in_the_roster_is_refused(here: Served, tmp_path: Path) -> None:
    key, now = authority.new_key(), datetime.now(UTC)
    stray = here.federation.authority().site(key.public_key(), "st-anna", now)

    with client(own(here, key, stray, tmp_path), here) as outside:
        answer = outside.get(join.HELLO)

    assert answer.status_code == 403
    assert join.decode(answer.content, join.Refusal).code == "not registered"


def test_nothing_older_than_tls_1_3_is_spoken(here: Served, anna: Identity) -> None:
    context = anna.context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    with client(context, here) as downgraded, pytest.raises(httpx.TransportError):
        downgraded.get(join.HELLO)


def test_nothing_is_said_in_the_clear(here: Served) -> None:
    host, _, port = here.address.rpartition(":")
    with socket.create_connection((host, int(port)), 60) as plain:
        plain.sendall(b"GET /site/hello HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            said = plain.recv(1000)
        except ConnectionResetError:
            said = b""

    assert b"HTTP" not in said


def signed(identity: Identity) -> dict[str, str]:
    """Return Flower's headers of a node, as somebody in between would see them."""
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    seen: dict[str, str] = {}

    class Stop(Exception):
        pass

    def call(context: object) -> httpx.Response:
        seen.update(context.request.headers)  # type: ignore[attr-defined]
        raise Stop

    from flwr.supercore.protobuf.client import ProtobufRequestContext

    key = identity.key()
    request = httpx.Request("POST", "https://x/", headers=PROTOBUF)
    about = ProtobufRequestContext("x", PullMessagesRequest(), request)
    with pytest.raises(Stop):
        NodeAuthHttpInterceptor(key, key.public_key()).intercept(about, call)
    return {
        name: value for name, value in seen.items() if name.startswith("flwr") or "type" in name
    }


def test_the_headers_of_one_node_are_of_no_use_to_another(
    here: Served, anna: Identity, mary: Identity
) -> None:
    stolen, body = signed(anna), PullMessagesRequest(node=Node(node_id=1)).SerializeToString()

    with client(mary.context(), here) as inside:
        answer = inside.post("/v1/fleet/pull-messages", content=body, headers=stolen)
        bare = inside.post("/v1/fleet/pull-messages", content=body, headers=PROTOBUF)

    assert answer.status_code == bare.status_code == 412
    assert join.decode(answer.content, join.Refusal).code == "another key"


def test_two_keys_in_the_headers_are_refused(here: Served, anna: Identity, mary: Identity) -> None:
    pem = (
        anna.key()
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    both = [*signed(mary).items(), ("flwr-public-key", base64.b64encode(pem).decode())]

    with client(mary.context(), here) as inside:
        answer = inside.post("/v1/fleet/pull-messages", content=b"", headers=both)

    assert answer.status_code == 412


def test_a_node_cannot_ask_for_anothers_messages(
    here: Served, anna: Identity, mary: Identity
) -> None:
    nodes = {one.name: one.node for one in here.federation.state.sites()}
    fleet = Fleet(here.address, mary.context(), mary.key())
    fleet.node = nodes["st-anna"] or 0
    assert fleet.node
    try:
        with pytest.raises(Refused):
            fleet.receive()
    finally:
        fleet.node = 0
        fleet.close()


def test_a_revoked_site_is_out_at_its_next_request(here: Served) -> None:
    identity = here.join("fallen")
    door = Door(identity)
    fleet = Fleet(here.address, identity.context(), identity.key())
    assert door.hello().federation == "heart"
    fleet.connect()

    enrolment.revoke(here.federation, "fallen", "its machine was stolen")

    with pytest.raises(DoorRefused, match="revoked by the coordinator: its machine was stolen"):
        door.hello()
    with pytest.raises(Refused, match="revoked"):
        fleet.receive()
    fleet.node = 0
    fleet.close()
    door.close()


def test_large_bodies_are_refused_before_they_are_read(here: Served, anna: Identity) -> None:
    with client(anna.context(), here) as inside:
        declared = inside.post(join.REPORT, content=b" " * (join.MAX_BODY + 1))
        chunks = (b" " * 65536 for _ in range(3))
        streamed = inside.post(join.REPORT, content=chunks)

    assert declared.status_code == streamed.status_code == 413


def test_bytes_that_are_no_request_of_ours_are_refused(here: Served, anna: Identity) -> None:
    with client(anna.context(), here) as inside:
        for body in (b"", b"{", b"[]", b'{"boot": 1}', b"\xff\xfe", b"[" * 10_000):
            assert inside.post(join.REPORT, content=body).status_code == 400


def raw(here: Served, identity: Identity, text: bytes) -> bytes:
    """Send bytes over a site's TLS connection; return what comes back until it is closed."""
    host, _, port = here.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 60) as plain,
        identity.context().wrap_socket(plain, server_hostname=host) as secure,
    ):
        parts = []
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            secure.sendall(text)
            while part := secure.recv(65536):
                parts.append(part)
        return b"".join(parts)


POST = b"POST /site/report HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "head",
    [
        POST + b"Content-Length: 2\r\nContent-Length: 4\r\n\r\n{}",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        b"GET /site/hello HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"\x16\x03\x01garbage\r\n\r\n",
        b"GET /site/hello\r\n\r\n",
    ],
)
def test_malformed_http_is_answered_with_400_and_the_end(
    here: Served, anna: Identity, head: bytes
) -> None:
    said = raw(here, anna, head)

    assert said.startswith(b"HTTP/1.1 400") or said == b""


def test_a_request_that_is_not_finished_is_cut_off(
    here: Served, anna: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PeerProtocol.most >= 1
    said = raw(here, anna, b"GET /site/hello HTTP/1.1\r\nHost: x\r\n")  # and no more

    assert said == b""


def test_the_superlink_has_no_port_and_its_socket_is_the_owners(here: Served) -> None:
    folder = here.supervisor.socket.parent
    assert folder.stat().st_mode & 0o777 == 0o700
    process = here.supervisor.children["superlink"].process
    assert process is not None
    sockets = set()
    for target in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            if (name := target.readlink().name).startswith("socket:"):
                sockets.add(name)
    listening = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    theirs = [row for row in listening if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    assert theirs == []


def test_refusals_are_in_the_audit_log(here: Served, anna: Identity) -> None:
    with client(anna.context(), here) as inside:
        inside.post("/v1/fleet/pull-messages", content=b"", headers=PROTOBUF)

    assert b'"peer-refused"' in (here.federation.folder / "audit.jsonl").read_bytes()


def test_a_port_that_nobody_serves_is_named(anna: Identity, tmp_path: Path) -> None:
    fleet = Fleet(f"{HOST}:{free_port()}", anna.context(), anna.key())
    from anabranch.client.fleet import Unreachable

    with pytest.raises(Unreachable, match="no connection to the coordinator"):
        fleet.connect()
    fleet.close()
