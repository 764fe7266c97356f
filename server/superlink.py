"""Flower's SuperLink behind a Unix socket: the coordinator's one module of Flower-private calls.

Stock Flower serves Fleet, Control and Runtime API on one port, and asks nothing of whoever calls
the last two. So this one opens no port: its socket lies in a folder that only the coordinator's
user can enter, sites reach the Fleet calls through the door (coordinator/door.py), and Control and
Runtime are for this machine's coordinator alone. State is in SQLite; no app's code is run
(isolation "process", and nobody but `attach` takes the task of a run).

    serve(socket, database)        the process
    SuperLink(socket)              its client: nodes, and `attach`, a run of ours as a Flower Grid

Checked against flwr 1.41 and 1.42; tests/server/test_superlink_socket.py tells when a release
breaks it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto import control_pb2, message_pb2, runtime_pb2
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from google.protobuf.message import DecodeError

from anabranch.protocols.errors import RunError
from anabranch.server import unix_http
from anabranch.storage.files import locked

BASE = "http://superlink"  # what stands in requests; the socket decides where they go
CALL_S = 30.0
BEAT_S = 8.0
CHUNK = str(1 << 20)  # bytes of an array in one object: what a slow link repeats at most
SESSION_S = 180.0  # Flower's own limit between two objects of one reply

log = logging.getLogger(__name__)

CONCERNS = {  # Flower's middleware -> the paths it looks at; a millisecond for all other requests
    "ControlSensitiveResponseMiddleware": "/v1/control/",
    "ControlAuthenticationMiddleware": "/v1/control/",
    "ControlLicenseMiddleware": "/v1/control/",
    "ControlEventLogMiddleware": "/v1/control/",
    "RuntimeTracingMiddleware": "/v1/runtime/",
    "NodeAuthMiddleware": "/v1/fleet/",
    "FleetEventLogMiddleware": "/v1/fleet/",
}

C = TypeVar("C", bound=ProtobufClient)
T = TypeVar("T")


class SuperLinkGone(RunError):
    """The SuperLink cannot be reached now, or knows this run no longer: attach again."""


def environment() -> dict[str, str]:
    """Return what Flower reads from the environment, set so that nothing calls out."""
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": CHUNK,
    }


def serve(path: Path, database: Path) -> None:
    """Serve a SuperLink at the socket `path`, its state in `database`, until the process ends.

    The folder of the socket must be the owner's alone.
    """
    os.environ.update(environment())
    import uvicorn
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app
    from starlette.middleware import Middleware

    config = SuperLinkLifespanConfig(
        host="127.0.0.1", port=0, control_address="127.0.0.1:0", health_server_address=None,
        fleet_api_address=None, fleet_api_type="grpc-rere",
        insecure=True, certificates=None,  # TLS is the door's
        ssl_ca_certfile=None, ssl_certfile=None, ssl_keyfile=None,
        enable_supernode_auth=True, superexec_auth_secret=None,
        authn_plugin=NoOpControlAuthnPlugin(), enable_event_log=False, event_log_plugin=None,
        fleet_event_log_plugin=None, database=str(database), artifact_provider=None,
        simulation=False, isolation="process", runtime_dependency_install=False,
    )  # fmt: skip
    logging.getLogger("flwr").setLevel(logging.WARNING)
    flower = create_app(config, SuperLinkLifespan)
    flower.user_middleware = [
        Middleware(unix_http.Only, inner=one, prefix=CONCERNS[name])
        if (name := getattr(one.cls, "__name__", "")) in CONCERNS
        else one
        for one in flower.user_middleware
    ]
    app = unix_http.whole_bodies(flower)
    uvicorn.run(app, uds=str(path), log_level="warning", access_log=False)


@dataclass(frozen=True)
class SuperLink:
    """The SuperLink at a socket. Every call raises SuperLinkGone if it cannot be reached."""

    socket: Path

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            with self._http(timeout=5.0) as http:
                return http.get("/health").is_success
        except httpx.TransportError:
            return False

    def wait_ready(self, timeout_s: float) -> None:
        """Return when it answers; SuperLinkGone if it does not within `timeout_s`."""
        end = time.monotonic() + timeout_s
        while not self.ready():
            if time.monotonic() > end:
                raise SuperLinkGone(
                    f"the SuperLink does not answer within {timeout_s:g} s; see superlink.log"
                )
            time.sleep(0.05)

    def register(self, public_key: bytes) -> int:
        """Return the node id of a site's public key (PEM), registering it if it is new."""
        for node, key in self.nodes().items():
            if key == public_key:
                return node
        request = control_pb2.RegisterNodeRequest(public_key=public_key)
        with self._control() as control:
            reply = _call(control.RegisterNode, request)
        return int(reply.node_id)

    def unregister(self, node: int) -> None:
        """Remove a node; one that is not there is no error."""
        with self._control() as control:
            try:
                control.UnregisterNode(control_pb2.UnregisterNodeRequest(node_id=node))
            except httpx.HTTPStatusError as error:
                if error.response.status_code != 404:
                    raise _gone(error) from None
            except httpx.HTTPError as error:
                raise _gone(error) from None

    def nodes(self) -> dict[int, bytes]:
        """Return the registered nodes: id -> public key (PEM)."""
        with self._control() as control:
            reply = _call(control.ListNodes, control_pb2.ListNodesRequest())
        return {
            one.node_id: one.public_key for one in reply.nodes_info if one.status != "unregistered"
        }

    @contextmanager
    def attach(self, app: bytes, *, stale: int | None = None) -> Iterator[SuperLinkGrid]:
        """Begin a Flower run of the app bundle `app` and yield its Grid; end the run afterwards.

        `stale` is the Flower run of a process that is gone: it is ended first, so that nobody is
        sent its messages any more.
        """
        with locked(self.socket):  # whoever takes the oldest task takes its own
            if stale is not None:
                self._stop(stale)
            with self._control() as control:
                fab = Fab(hashlib.sha256(app).hexdigest(), app, {})
                request = control_pb2.StartRunRequest(fab=fab_to_proto(fab))
                started = _call(control.StartRun, request)
            token = self._claim(int(started.run_id))
        grid = SuperLinkGrid(self, int(started.run_id), token)
        try:
            grid.begin()
            yield grid
        finally:
            grid.close()

    def _claim(self, run: int) -> str:
        """Return the token of the task of `run`; tasks of runs whose process is gone end."""
        with self._client(RuntimeHttpClient) as runtime:
            while True:
                request = runtime_pb2.AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
                got = _call(runtime.AcquireTask, request)
                if not got.token:
                    raise SuperLinkGone(f"the SuperLink gives no task for its run {run}")
                if got.task.run_id == run:
                    return str(got.token)
                self._stop(got.task.run_id)

    def _stop(self, run: int) -> None:
        with self._control() as control:
            try:
                control.StopRun(control_pb2.StopRunRequest(run_id=run))
            except httpx.HTTPStatusError:
                return  # it has ended, or was never there
            except httpx.HTTPError as error:
                raise _gone(error) from None

    def _control(self) -> ControlHttpClient:
        return self._client(ControlHttpClient)

    def _client(self, kind: type[C], token: str | None = None) -> C:
        interceptors = [] if token is None else [RuntimeTokenHttpInterceptor(token=token)]
        client = kind(BASE, interceptors=interceptors, verify=False, timeout=CALL_S)
        client._client.close()
        client._client = self._http(timeout=CALL_S)
        return client

    def _http(self, timeout: float) -> httpx.Client:
        return unix_http.client(self.socket, BASE, timeout)


@dataclass(eq=False)
class _Arriving:
    """A reply whose objects are not all here yet."""

    proto: Any
    ids: list[str]
    contents: dict[str, bytes]
    heard: float  # of time.monotonic(): when its last object came


class SuperLinkGrid(HttpGrid):
    """The Grid of one Flower run. No call waits for a site; SuperLinkGone if the SuperLink went.

    A reply is announced before its objects are uploaded, and Flower's own grid then blocks until
    they are there: this one goes on and looks again at the next call. A reply that stops arriving
    for SESSION_S comes back as Flower's error 4.
    """

    def __init__(self, link: SuperLink, flower_run: int, token: str) -> None:
        super().__init__(runtime_api_address="superlink", insecure=True, token=token)
        self._link, self.flower_run = link, flower_run
        self._arriving: dict[str, _Arriving] = {}  # by reply
        self._closed = threading.Event()
        self._lost = False  # the SuperLink took the task for dead

    def begin(self) -> None:
        """Take over the task of the run, and keep it alive."""
        client = self._runtime_client
        task = _call(client.PullTaskInput, runtime_pb2.PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        self.set_run(run_from_proto(task.run))
        threading.Thread(target=self._beat, name="task", daemon=True).start()

    def close(self) -> None:
        """End the Flower run; a SuperLink that is gone ends it itself."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._client is None:
            return
        request = runtime_pb2.PushTaskOutputRequest(sub_status=SubStatus.COMPLETED)
        with suppress(httpx.HTTPError):
            self._client.PushTaskOutput(request)
        super().close()

    def get_nodes(self) -> Any:
        """Return Flower's view of the nodes that are connected."""
        return self._guarded(super().get_nodes)

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        """Push messages; "" in the place of one that was not taken."""
        return list(self._guarded(lambda: super(SuperLinkGrid, self).push_messages(messages)))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these messages that are whole by now."""
        coming = {one.proto.metadata.reply_to_message_id for one in self._arriving.values()}
        wanted = [one for one in message_ids if one not in coming]  # Flower announces once
        if wanted:
            self._announced(wanted)
        done = [self._fetched(key, one) for key, one in list(self._arriving.items())]
        return [message for message in done if message is not None]

    def _announced(self, wanted: list[str]) -> None:
        """Take note of the replies that are announced."""
        request = runtime_pb2.PullAppMessagesRequest(message_ids=wanted)
        reply = self._guarded(lambda: self._runtime_client.PullMessages(request))
        for proto, tree in zip(reply.messages_list, reply.message_object_trees, strict=True):
            ids = [one.object_id for one in iterate_object_tree(tree)]
            self._arriving[proto.metadata.message_id] = _Arriving(proto, ids, {}, time.monotonic())

    def arriving(self) -> Mapping[str, tuple[int, int]]:
        """Return message -> (objects here, objects in all) of replies under way."""
        return {
            one.proto.metadata.reply_to_message_id: (len(one.contents), len(one.ids))
            for one in self._arriving.values()
        }

    def _beat(self) -> None:
        """Keep the task alive. (Flower's own heartbeat interrupts the process instead.)"""
        with self._link._client(RuntimeHttpClient, self._token) as client:
            while not self._closed.wait(BEAT_S):
                try:
                    alive = client.SendTaskHeartbeat(runtime_pb2.SendTaskHeartbeatRequest()).success
                except httpx.TransportError:
                    continue  # it is away; the calls of the grid say so
                except httpx.HTTPStatusError as error:
                    alive = error.response.status_code not in (401, 403, 404)
                if not alive:
                    self._lost = True
                    return

    def _connect(self) -> None:
        self._client = self._link._client(RuntimeHttpClient, self._token)

    def _fetched(self, key: str, one: _Arriving) -> Message | None:
        """Fetch what is there of a reply; return it when it is whole."""
        for object_id in one.ids:
            if object_id in one.contents:
                continue
            got = self._pull(object_id)
            if not got.object_found or not got.object_available:
                if got.object_found and time.monotonic() - one.heard < SESSION_S:
                    return None
                del self._arriving[key]
                return _lost(one.proto)
            one.contents[object_id], one.heard = got.object_content, time.monotonic()
        request = message_pb2.ConfirmMessageReceivedRequest(
            node=self.node, run_id=self.flower_run, message_object_id=key
        )
        self._guarded(lambda: self._runtime_client.ConfirmMessageReceived(request))
        del self._arriving[key]
        return _whole(one.proto, one.contents) or _lost(one.proto)

    def _pull(self, object_id: str) -> Any:
        request = message_pb2.PullObjectRequest(
            node=self.node, run_id=self.flower_run, object_id=object_id
        )
        return self._guarded(lambda: self._runtime_client.PullObject(request))

    def _guarded(self, call: Callable[[], T]) -> T:
        if self._lost:
            raise SuperLinkGone("the SuperLink took this run for dead; it is attached again")
        try:
            return call()
        except httpx.HTTPError as error:
            raise _gone(error) from None


def _whole(proto: Any, contents: dict[str, bytes]) -> Message | None:
    """Return the message that these objects are; None if they are not the one announced.

    A site's bytes: Flower's parsers declare no errors, and what the objects say of their source is
    not what the SuperLink has checked.
    """
    about = proto.metadata
    try:
        message = inflate_object_from_contents(about.message_id, contents)
        if not isinstance(message, Message):
            raise TypeError("not a message")
        said = message.metadata
        if (said.run_id, said.src_node_id, said.reply_to_message_id) != (
            about.run_id, about.src_node_id, about.reply_to_message_id,
        ):  # fmt: skip
            raise ValueError("another message than the one announced")
        said.__dict__["_message_id"] = about.message_id
        message.has_error() or message.content  # reads it
    except (
        ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
        MemoryError, DecodeError,
    ) as error:  # fmt: skip
        log.warning("an answer that cannot be read: %s", type(error).__name__)
        return None
    return message


def _lost(proto: Any) -> Message:
    """Return Flower's error for a reply that was not uploaded in time, or cannot be read."""
    about = proto.metadata
    metadata = Metadata(
        run_id=about.run_id,
        message_id="",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=SUPERLINK_NODE_ID,
        message_type=SYSTEM_MESSAGE_TYPE,
        group_id="",
        ttl=0,
        reply_to_message_id=about.reply_to_message_id,
        created_at=time.time(),
    )
    return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, "not uploaded"))


def _call(method: Callable[[Any], T], request: Any) -> T:
    try:
        return method(request)
    except httpx.HTTPError as error:
        raise _gone(error) from None


def _gone(error: httpx.HTTPError) -> SuperLinkGone:
    if isinstance(error, httpx.HTTPStatusError):
        said = f"HTTP {error.response.status_code}: {error.response.text[:200]}"
        return SuperLinkGone(f"the SuperLink refuses {error.request.url.path}: {said}")
    return SuperLinkGone(f"the SuperLink cannot be reached ({type(error).__name__})")
