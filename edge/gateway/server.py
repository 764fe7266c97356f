"""The gateway's gRPC process: two ports, one closer, bounded in every direction.

    enroll_port   TLS without client certificates: Enroll, and health
    port          mutual TLS: everything else, and health

Threads of a pool answer calls, at most `calls` at once; what comes on top is refused at once with
RESOURCE_EXHAUSTED, not queued. A stream is read one message at a time, so a slow reader or writer
holds one chunk (HTTP/2 flow control does the rest). Memory: calls · (message + thread), and two
deltas being checked, and one sum.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import msgspec
from grpc_health.v1 import health_pb2

from anabranch.edge.gateway.asking import Mechanism, Opener
from anabranch.edge.gateway.authority import open_authority
from anabranch.edge.gateway.closing import AGAIN_S, Closer
from anabranch.edge.gateway.config import GatewayFile, GatewayFolder
from anabranch.edge.gateway.limits import Quotas
from anabranch.edge.gateway.published import Shelf
from anabranch.edge.gateway.refusals import Malformed
from anabranch.edge.gateway.replies import at, end, only, reading, require_deadline
from anabranch.edge.gateway.rounds import Rounds
from anabranch.edge.gateway.secure import Plan
from anabranch.edge.gateway.service import DOOR_S, Door, Parts, Service
from anabranch.edge.gateway.spool import Spool
from anabranch.edge.gateway.store import Store
from anabranch.edge.gateway.summing import Sums
from anabranch.edge.generated import edge_pb2
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.secagg.messages import REPLIES
from anabranch.protocols.spec import AdapterSpec

NAME = edge_pb2.DESCRIPTOR.services_by_name["EdgeGateway"].full_name
CLOSE_EVERY_S = 0.25
# What calls decode. msgspec looks at a type when it is first decoded, and crashes if many threads
# do so at once; so one thread does, before calls are served.
DECODED: tuple[Any, ...] = (RunConfig, Assignment, AdapterSpec, Mechanism, Plan, *REPLIES.values())
DOOR_CALLS = 8  # of enrol_port at once: an Enroll takes a millisecond

log = logging.getLogger(__name__)


@dataclass
class Gateway:
    """A running gateway. `close` ends calls after a grace period."""

    folder: GatewayFolder
    file: GatewayFile
    parts: Parts
    closer: Closer
    port: int
    enroll_port: int
    servers: list[grpc.Server]
    stopping: threading.Event
    ending: threading.Thread

    @property
    def opener(self) -> Opener:
        """Return what opens rounds in this process."""
        return Opener(self.folder, self.file, self.parts.store, self.parts.shelf)

    def close(self, grace_s: float = 2.0) -> None:
        """Stop; what was begun goes on when the gateway is started again."""
        self.stopping.set()
        stopped = [server.stop(grace_s) for server in self.servers]
        for event in stopped:
            event.wait(grace_s + 5)
        self.ending.join(30)
        self.parts.store.close()

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parts_of(folder: GatewayFolder, file: GatewayFile) -> Parts:
    """Open everything in a gateway's folder; raises as its files do."""
    store = Store(folder.state)
    keys = [bytes.fromhex(key) for key in file.bundle_keys]
    spool = Spool(folder.spool, store)
    shelf = Shelf(folder.bundles(file), keys, folder.files)
    return Parts(
        file=file,
        authority=open_authority(folder.authority),
        store=store,
        shelf=shelf,
        spool=spool,
        rounds=Rounds(file, store, spool),
        sums=Sums(file, store, spool, shelf),
        quotas=Quotas(file.limits, store),
    )


def start(path: Path) -> Gateway:
    """Serve the gateway in a folder; ConfigError if a port is taken or a file cannot be used."""
    for kind in DECODED:
        msgspec.json.Decoder(kind)
    folder = GatewayFolder(path)
    file = folder.read()
    parts = parts_of(folder, file)
    closer = Closer(folder, file, parts.store, parts.spool, parts.sums)
    closer.recover()
    key, certificate = parts.authority.server_credentials(file.hosts)
    chain = certificate + parts.authority.pem  # a device with a fingerprint looks for the root
    options = _options(file)
    calls = file.limits.calls
    inner = grpc.server(
        ThreadPoolExecutor(calls, "call"), options=options, maximum_concurrent_rpcs=calls
    )
    inner.add_generic_rpc_handlers((_calls(Service(parts)),))
    outer = grpc.server(
        ThreadPoolExecutor(DOOR_CALLS, "enrol"), options=options, maximum_concurrent_rpcs=DOOR_CALLS
    )
    outer.add_generic_rpc_handlers((_door(Door(parts)),))
    for server in (inner, outer):
        server.add_generic_rpc_handlers((_health(),))
    if file.reflection:
        _reflect(inner)
    mutual = grpc.ssl_server_credentials([(key, chain)], parts.authority.pem, True)
    plain = grpc.ssl_server_credentials([(key, chain)])
    port = _bind(inner, at(file.address, file.port), mutual)
    enroll_port = _bind(outer, at(file.address, file.enroll_port), plain)
    stopping = threading.Event()
    ending = threading.Thread(target=_end_rounds, args=(closer, stopping), daemon=True)
    for server in (inner, outer):
        server.start()
    ending.start()
    return Gateway(folder, file, parts, closer, port, enroll_port, [inner, outer], stopping, ending)


def _end_rounds(closer: Closer, stopping: threading.Event) -> None:
    pause = CLOSE_EVERY_S
    while not stopping.wait(pause):
        pause = CLOSE_EVERY_S
        try:
            closer.due()
        except Exception:  # the boundary: the next turn tries again, devices are still served
            log.exception("ending rounds failed")
            pause = AGAIN_S


def _options(file: GatewayFile) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", file.limits.message_bytes),
        ("grpc.max_send_message_length", file.limits.message_bytes),
        ("grpc.max_metadata_size", 8192),
        ("grpc.max_concurrent_streams", 2 * file.limits.calls_at_once),
        ("grpc.so_reuseport", 0),  # a second gateway on the port is a mistake, not a helper
        ("grpc.keepalive_time_ms", 30_000),  # peers that are gone are noticed
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
        ("grpc.max_connection_idle_ms", 120_000),
        ("grpc.http2.bdp_probe", 0),  # windows stay at lookahead_bytes
        ("grpc.http2.lookahead_bytes", 1 << 17),
    ]


def _bind(server: grpc.Server, address: str, credentials: Any) -> int:
    try:
        port: int = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if not port:
        raise ConfigError(f"{address}: cannot be listened on; is another gateway running there?")
    return port


def _calls(service: Service) -> Any:
    """Return the handlers of the service, all for streams of messages.

    On the wire a stream of one message is a unary call. gRPC would wait for that message first,
    for as long as the peer likes, with a thread that no quota knows of.
    """
    handlers = {}
    for method in edge_pb2.DESCRIPTOR.services_by_name["EdgeGateway"].methods:
        kind = grpc.stream_unary_rpc_method_handler
        if method.server_streaming:
            kind = grpc.stream_stream_rpc_method_handler
        handlers[method.name] = kind(
            getattr(service, method.name),
            request_deserializer=reading(getattr(edge_pb2, method.input_type.name)),
            response_serializer=getattr(edge_pb2, method.output_type.name).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(NAME, handlers)


def _door(door: Door) -> Any:
    enroll = grpc.stream_unary_rpc_method_handler(
        door.enroll,
        request_deserializer=reading(edge_pb2.EnrollRequest),
        response_serializer=edge_pb2.EnrollReply.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(NAME, {"Enroll": enroll})


def _health() -> Any:
    """Return grpc.health.v1.Health/Check. Watch, which stays open, is not offered."""

    def check(requests: Iterator[health_pb2.HealthCheckRequest], context: Any) -> Any:
        try:
            require_deadline(context, DOOR_S)
            request = only(requests)
        except Malformed as error:
            end(context, error)
        if request.service not in ("", NAME):
            context.abort(grpc.StatusCode.NOT_FOUND, "service: unknown")
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    handler = grpc.stream_unary_rpc_method_handler(
        check,
        request_deserializer=reading(health_pb2.HealthCheckRequest),
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler})


def _reflect(server: grpc.Server) -> None:
    from grpc_reflection.v1alpha import reflection

    reflection.enable_server_reflection((NAME, reflection.SERVICE_NAME), server)
