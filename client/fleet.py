"""A site's calls to the coordinator's SuperLink: the clients' one module of Flower-private calls.

Flower's own SuperNode sleeps between looks, has no client certificate, opens a port on the site's
machine and starts a process for every message. The agent (agent/agent.py) is the node itself:

    connect ─► receive ─► fetch (objects, one by one) ─► answer (objects, one by one)
       └ beat, every BEAT_S, from another thread

Objects are pieces of at most 1 MiB, named by their SHA-256: a transfer that was cut goes on with
the next piece. Flower delivers a message once; one that is lost is asked again by the coordinator.

Checked against flwr 1.41 and 1.42; tests/client/test_fleet.py tells when a release breaks it.
"""

from __future__ import annotations

import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import httpx
import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import array, remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import DecodeError

from anabranch.client.flower import TYPES
from anabranch.protocols.errors import ProtocolError, RunError

# Of an array in one object: the door takes no more. (Flower reads its environment when it is
# imported, which may have been before this module is.)
vars(array)["FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"] = 1 << 20
BEAT_S = 4.0
INTERVAL_S = 10.0  # that Flower is told; it takes a node for gone after twice this
CALL_S = 60.0  # one piece over a slow link: 1 MiB at 0.15 Mbit/s
OVER = 2007  # Flower's code: the run is not running any more
MAX_ANSWER = 16 << 20  # bytes of one answer; a piece of an array has 1 MiB
MAX_OBJECTS = 4096  # of one message: 4 GiB in pieces
HASH = re.compile(r"[0-9a-f]{64}")  # of a message, or of an app

T = TypeVar("T")


class Unreachable(RunError):
    """The coordinator cannot be reached now; to be tried again."""


class Over(RunError):
    """Flower's run has ended: nobody waits for this message's answer any more."""


class Refused(ProtocolError):
    """The coordinator does not accept this node: the text says why."""


@dataclass(frozen=True)
class Announced:
    """A message that is there for this node, without its objects."""

    message: Any  # protobuf
    tree: Any

    @property
    def id(self) -> str:
        """Return Flower's id of the message."""
        return str(self.message.metadata.message_id)

    @property
    def run(self) -> int:
        """Return Flower's id of the run."""
        return int(self.message.metadata.run_id)


@dataclass(eq=False)
class _Upload:
    """A reply on its way."""

    id: str
    session: str
    left: list[str]  # objects that are still to be sent, in order


class Fleet:
    """One connection of a node; every call may raise Unreachable, Over or Refused.

    `address` is host:port; `context` presents the certificate of `key`, which is the node's, too.
    `heard(done, total)` is told how many objects of a message have been moved.
    """

    def __init__(self, address: str, context: ssl.SSLContext, key: ec.EllipticCurvePrivateKey):
        public = key.public_key()
        self._public = public_key_to_bytes(public)
        self._client = FleetHttpClient(
            f"https://{address}",
            interceptors=[_Version(), NodeAuthHttpInterceptor(key, public)],
            verify=context,
            timeout=CALL_S,
        )
        self._client._client.close()
        self._client._client = httpx.Client(
            transport=_Bounded(verify=context), timeout=CALL_S, follow_redirects=False
        )
        self.node = 0
        self._upload: _Upload | None = None
        self._app = (0, "")  # the run that was asked for last, and the hash of its app

    def connect(self, known: int = 0) -> int:
        """Return the node's id; `known` is what an earlier process was told, if any."""
        if known:
            self.node = known
            self.beat()
            return known
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=INTERVAL_S)
        self.node = int(_call(self._client.ActivateNode, request).node_id)
        return self.node

    def beat(self) -> None:
        """Say that the node is here; Refused if the coordinator does not know it."""
        request = SendNodeHeartbeatRequest(node=self._me, heartbeat_interval=INTERVAL_S)
        if not _call(self._client.SendNodeHeartbeat, request).success:
            raise Refused("the coordinator does not know this node; join again")

    def receive(self) -> Announced | None:
        """Return the next message for this node, if there is one."""
        reply = _call(self._client.PullMessages, PullMessagesRequest(node=self._me))
        if not reply.messages_list:
            return None
        if not reply.message_object_trees:
            raise Refused("a message that names no objects")
        announced = Announced(reply.messages_list[0], reply.message_object_trees[0])
        if HASH.fullmatch(announced.id) is None:
            raise Refused("a message without a name")
        return announced

    def app(self, run: int) -> str:
        """Return the hash of the app that a run wants to be run; a run's never changes."""
        if self._app[0] != run:
            reply = _call(self._client.GetRun, GetRunRequest(node=self._me, run_id=run))
            wants = str(reply.run.fab_hash)
            if HASH.fullmatch(wants) is None:
                raise Refused("a run that names no app")
            self._app = (run, wants)
        return self._app[1]

    def fetch(
        self,
        one: Announced,
        max_bytes: int,
        heard: Callable[[int, int], None],
        pieces: dict[str, bytes] | None = None,
    ) -> Message:
        """Return the whole message. Refused if it is larger than `max_bytes`.

        What has arrived is put into `pieces`, and what is there already is not fetched again: a
        call that was cut off, or a message that is sent again, goes on from it.
        """
        ids = list(dict.fromkeys(tree.object_id for tree in iterate_object_tree(one.tree)))
        if len(ids) > MAX_OBJECTS:
            raise Refused(f"a message of {len(ids)} objects, at most {MAX_OBJECTS} are taken")
        contents = {} if pieces is None else pieces
        for gone in contents.keys() - set(ids):  # of another message
            del contents[gone]
        size = sum(map(len, contents.values()))
        for number, object_id in enumerate(ids):
            heard(number, len(ids))
            if object_id in contents:
                continue
            contents[object_id] = self._pull(one.run, object_id)
            size += len(contents[object_id])
            if size > max_bytes:
                raise Refused(f"a message of more than {max_bytes} bytes, the policy's limit")
        request = ConfirmMessageReceivedRequest(
            node=self._me, run_id=one.run, message_object_id=one.id
        )
        _call(self._client.ConfirmMessageReceived, request)
        message = _inflated(one.id, dict(contents))
        contents.clear()
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, one.run, self.node
        return message

    def bare(self, one: Announced) -> Message:
        """Return the message without its content, to be answered with an error."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, one.run, self.node
        with _readable():
            return message_from_proto(one.message)

    def answer(self, reply: Message, seconds: float, heard: Callable[[int, int], None]) -> None:
        """Send a reply; `seconds` is what it took. Called again, it goes on where it was cut off.

        Over if nobody waits for it any more: Flower gives an upload 180 s between two objects.
        """
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = get_all_nested_objects(reply)
            if self._upload is None or self._upload.id != reply.object_id:
                self._upload = self._announce(reply, seconds)
            upload, run = self._upload, reply.metadata.run_id
            total = len(upload.left)
            while upload.left:
                heard(total - len(upload.left), total)
                content = objects[upload.left[0]].deflate()
                self._push(run, upload.session, upload.left[0], content)
                del upload.left[0]
        self._upload = None

    def _announce(self, reply: Message, seconds: float) -> _Upload:
        """Tell of a reply; return which of its objects are to be sent, and in which session."""
        tree = get_object_tree(reply)
        request = PushMessagesRequest(
            node=self._me,
            messages_list=[message_to_proto(_without_content(reply))],
            message_object_trees=[tree],
            clientapp_runtime_list=[seconds],
        )
        told = _call(self._client.PushMessages, request)
        wanted = set(told.objects_to_push)
        order = dict.fromkeys(one.object_id for one in iterate_object_tree(tree))
        return _Upload(reply.object_id, told.session_id, [one for one in order if one in wanted])

    def close(self) -> None:
        """Say good-bye if that is possible, and close the connection."""
        with suppress(httpx.HTTPError):  # it lapses by itself
            if self.node:
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node))
        self._client.close()

    @property
    def _me(self) -> Node:
        return Node(node_id=self.node)

    def _pull(self, run: int, object_id: str) -> bytes:
        end, pause = time.monotonic() + CALL_S, 0.02
        while True:
            request = PullObjectRequest(node=self._me, run_id=run, object_id=object_id)
            got = _call(self._client.PullObject, request)
            if got.object_available:
                content = bytes(got.object_content)
                if get_object_id(content) != object_id:
                    raise Refused(f"object {object_id[:12]}… has another content than its name")
                return content
            if not got.object_found or time.monotonic() > end:
                raise Over(f"object {object_id[:12]}… of the message is not there any more")
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _push(self, run: int, session: str, object_id: str, content: bytes) -> None:
        request = PushObjectRequest(
            node=self._me,
            run_id=run,
            object_id=object_id,
            object_content=content,
            session_id=session,
        )
        if not _call(self._client.PushObject, request).stored:
            self._upload = None
            raise Over("the upload took too long; the coordinator asks again")


class _Bounded(httpx.HTTPTransport):
    """Reads no answer beyond MAX_ANSWER, and none that is to be unpacked. No proxies, either."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; its answer's body is bounded."""
        request.headers["accept-encoding"] = "identity"
        answer = super().handle_request(request)
        if answer.headers.get("content-encoding", "identity") != "identity":
            answer.close()
            raise httpx.RemoteProtocolError("an answer in an encoding that was not asked for")
        body = cast(httpx.SyncByteStream, answer.stream)
        return httpx.Response(
            answer.status_code, headers=answer.headers, stream=_Reading(body), request=request
        )


class _Reading(httpx.SyncByteStream):
    """A body of at most MAX_ANSWER bytes."""

    def __init__(self, inner: httpx.SyncByteStream) -> None:
        self._inner = inner

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self._inner:
            size += len(part)
            if size > MAX_ANSWER:
                raise httpx.RemoteProtocolError(f"an answer of more than {MAX_ANSWER} bytes")
            yield part

    def close(self) -> None:
        """Close the body."""
        self._inner.close()


class _Version:
    """Flower's version in every request's headers. (Its own interceptor may end the process.)"""

    def __init__(self) -> None:
        self._headers = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the headers."""
        add_headers(context.request, self._headers)
        return call_next(context)


def _inflated(message_id: str, contents: dict[str, bytes]) -> Message:
    """Return the message that these objects are; Refused if they are none, or of no type of ours.

    That objects are what their names say is not checked: TLS and the frame's own digest do.
    """
    with _readable(), no_object_id_recompute():
        message = inflate_object_from_contents(message_id, contents)
        if not isinstance(message, Message) or message.metadata.message_type not in TYPES:
            raise ValueError("not a message of ours")
        message.metadata.__dict__["_message_id"] = message_id
        return message


@contextmanager
def _readable() -> Iterator[None]:
    """Whatever Flower's parsers, which declare no errors, do with hostile bytes is a Refused."""
    try:
        yield
    except (
        ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
        DecodeError,
    ) as error:  # fmt: skip
        raise Refused(f"a message that cannot be read ({type(error).__name__})") from None


def _without_content(reply: Message) -> Message:
    return remove_content_from_message(reply) if reply.has_content() else reply


def _call(method: Callable[[Any], T], request: Any) -> T:
    """Call, and say in our own words what went wrong."""
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        code, text = _said(error.response.content)
        if code == OVER:
            raise Over("the run has ended at the coordinator") from None
        if status in (401, 403, 412, 413):
            raise Refused(text or f"the coordinator answers HTTP {status}") from None
        raise Unreachable(f"the coordinator answers HTTP {status}") from None
    except httpx.HTTPError as error:
        raise Unreachable(f"no connection to the coordinator: {error}") from None
    except ValueError as error:
        raise Unreachable(f"the coordinator's answer cannot be read: {error}") from None


class _Said(msgspec.Struct):
    """What Flower and the door have in common when they refuse."""

    code: int | str = ""
    message: str = ""


def _said(body: bytes) -> tuple[int | str, str]:
    try:
        said = msgspec.json.decode(body[:4096], type=_Said)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "", ""
    return said.code, said.message[:500]
