"""A gateway for tests of the device: real gRPC over TLS on loopback, and as bad as one asks."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgspec

from anabranch.edge.gateway.authority import Authority, make_authority
from anabranch.edge.generated import edge_pb2, edge_pb2_grpc
from anabranch.edge.runtime.backoff import Backoff
from anabranch.edge.runtime.enrol import Enrolled, Invitation
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.transport import Gateway, Patience, connect, tls_channel
from anabranch.protocols.identity.authority import (
    certificate_pem,
    certificate_request,
    fingerprint,
    key_pem,
    new_key,
)

CHUNK = 1000  # bytes
SECRET = "s" * 43
QUICK = Patience(call_s=60.0, stream_s=60.0, attempts=3, backoff=Backoff(base_s=0.001, cap_s=0.002))
State = edge_pb2.UploadStatus


@dataclass
class FakeGateway(edge_pb2_grpc.EdgeGatewayServicer):
    """Serves files and takes uploads. `cut`: chunks after which a stream breaks, once."""

    authority: Authority
    files: dict[str, bytes] = field(default_factory=dict)
    cut: int | None = None
    chunk: Callable[[edge_pb2.Chunk], edge_pb2.Chunk] = lambda chunk: chunk
    endless: bool = False
    codes: list[grpc.StatusCode] = field(default_factory=list)  # of the next unary calls
    replies: list[edge_pb2.CheckInReply] = field(default_factory=list)
    forged: dict[str, Any] = field(default_factory=dict)  # fields of the next UploadStatus
    verdict: tuple[bool, str] = (True, "")
    fetched: list[tuple[str, int]] = field(default_factory=list)
    sent: int = 0  # bytes of downloads
    uploads: dict[str, bytearray] = field(default_factory=dict)
    received: list[tuple[int, int]] = field(default_factory=list)  # (offset, length)
    committed: list[str] = field(default_factory=list)
    aborted: list[tuple[str, str]] = field(default_factory=list)
    asked: list[edge_pb2.CheckInRequest] = field(default_factory=list)
    enrolled: list[edge_pb2.EnrollRequest] = field(default_factory=list)
    reply: Callable[[edge_pb2.EnrollReply], edge_pb2.EnrollReply] = lambda reply: reply
    address: str = ""

    def put(self, data: bytes, name: str = "file") -> edge_pb2.FileRef:
        sha = hashlib.sha256(data)
        self.files[sha.hexdigest()] = data
        return edge_pb2.FileRef(name=name, sha256=sha.digest(), size=len(data))

    def Enroll(self, request: edge_pb2.EnrollRequest, context: Any) -> edge_pb2.EnrollReply:
        self._refuse(context)
        self.enrolled.append(request)
        certificate = self.authority.issue(request.certificate_request, "d-1", 90)
        pem = certificate_pem(certificate)
        return self.reply(
            edge_pb2.EnrollReply(
                device="d-1",
                certificate=pem,
                authority=self.authority.pem,
                bundle_keys=[b"k" * 32],
                gateway=self.address,
            )
        )

    def CheckIn(self, request: edge_pb2.CheckInRequest, context: Any) -> edge_pb2.CheckInReply:
        self._refuse(context)
        self.asked.append(request)
        if self.replies:
            return self.replies.pop(0)
        window = edge_pb2.RetryWindow(min_seconds=60, max_seconds=180)
        return edge_pb2.CheckInReply(retry=window)

    def Fetch(self, request: edge_pb2.FetchRequest, context: Any) -> Iterator[edge_pb2.Chunk]:
        sha = request.sha256.hex()
        self.fetched.append((sha, request.offset))
        if sha not in self.files:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such file")
        data, at, count = self.files[sha], request.offset, 0
        while at < len(data) or self.endless:
            if self.cut == count:
                self.cut = None
                context.abort(grpc.StatusCode.UNAVAILABLE, "going down")
            part = data[at : at + CHUNK] or b"x" * CHUNK
            self.sent += len(part)
            yield self.chunk(edge_pb2.Chunk(offset=at, data=part, crc32=zlib.crc32(part)))
            at, count = at + len(part), count + 1

    def BeginUpload(
        self, request: edge_pb2.BeginUploadRequest, context: Any
    ) -> edge_pb2.UploadStatus:
        self._refuse(context)
        name = f"{request.task}/{request.sha256.hex()}/{request.size}"
        self.uploads.setdefault(name, bytearray())
        status = self._status(name)
        for field_, value in self.forged.items():
            setattr(status, field_, value)
        return status

    def Upload(self, chunks: Iterator[edge_pb2.UploadChunk], context: Any) -> edge_pb2.UploadStatus:
        name = ""
        for count, chunk in enumerate(chunks):
            name = chunk.upload
            if self.cut == count:
                self.cut = None
                context.abort(grpc.StatusCode.UNAVAILABLE, "going down")
            there = self.uploads[name]
            if zlib.crc32(chunk.data) != chunk.crc32:
                context.abort(grpc.StatusCode.DATA_LOSS, "crc32")
            if chunk.offset != len(there):
                context.abort(grpc.StatusCode.OUT_OF_RANGE, "a gap")
            there += chunk.data
            self.received.append((chunk.offset, len(chunk.data)))
        return self._status(name)

    def Commit(self, request: edge_pb2.CommitRequest, context: Any) -> edge_pb2.CommitReply:
        self._refuse(context)
        if request.upload not in self.committed:
            self.committed.append(request.upload)
        accepted, reason = self.verdict
        window = edge_pb2.RetryWindow(min_seconds=60, max_seconds=180)
        return edge_pb2.CommitReply(accepted=accepted, reason=reason, next=window)

    def Abort(self, request: edge_pb2.AbortRequest, context: Any) -> edge_pb2.AbortReply:
        self.aborted.append((request.task, request.reason))
        window = edge_pb2.RetryWindow(min_seconds=60, max_seconds=180)
        return edge_pb2.AbortReply(next=window)

    def _status(self, name: str) -> edge_pb2.UploadStatus:
        size, there = int(name.rsplit("/", 1)[1]), len(self.uploads[name])
        state = State.COMPLETE if there == size else State.OPEN
        return edge_pb2.UploadStatus(upload=name, committed=there, state=state, chunk_bytes=1024)

    def _refuse(self, context: Any) -> None:
        if self.codes:
            context.abort(self.codes.pop(0), "as the test wants")


@contextmanager
def served(fake: FakeGateway, *, mutual: bool = True) -> Iterator[str]:
    """Yield host:port of a server with TLS, with client certificates if `mutual`."""
    key, certificate = fake.authority.server_credentials(["127.0.0.1"])
    server = grpc.server(ThreadPoolExecutor(4))
    edge_pb2_grpc.add_EdgeGatewayServicer_to_server(fake, server)
    pem = fake.authority.pem
    credentials = grpc.ssl_server_credentials(
        [(key, certificate + pem)], pem if mutual else None, mutual
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    fake.address = f"127.0.0.1:{port}"
    try:
        yield fake.address
    finally:
        server.stop(0).wait(5)


@contextmanager
def gateway_of(fake: FakeGateway) -> Iterator[Gateway]:
    """Yield a device's end of a connection to a fresh server."""
    with (
        served(fake, mutual=False) as address,
        Gateway(tls_channel(address, fake.authority.pem), patience=QUICK) as gateway,
    ):
        yield gateway


@contextmanager
def enrolled_at(fake: FakeGateway, home: Home) -> Iterator[Gateway]:
    """Yield the same for an enrolled device with mutual TLS."""
    write_identity(fake.authority, home)
    with served(fake) as address:
        home.gateway.write_bytes(msgspec.json.encode(Enrolled(device="d-1", address=address)))
        with connect(home, patience=QUICK) as gateway:
            yield gateway


def write_identity(authority: Authority, home: Home, days: int = 90) -> None:
    """Write key, certificate and authority of an enrolled device."""
    key = new_key()
    home.folder.mkdir(parents=True, exist_ok=True)
    home.device_key.write_bytes(key_pem(key))
    certificate = authority.issue(certificate_request(key), "d-1", days)
    home.certificate.write_bytes(certificate_pem(certificate))
    home.authority.write_bytes(authority.pem)


def invitation_of(fake: FakeGateway) -> Invitation:
    authority = fingerprint(fake.authority.certificate)
    return Invitation(address=fake.address, authority=authority, secret=SECRET)


def new_authority(folder: Path) -> Authority:
    return make_authority(folder, "test")
