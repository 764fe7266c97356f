"""Devices for a gateway, without models: they enrol, fetch, send a delta that is made up.

Tests use them too, also those that are slow, die, repeat themselves or lie.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from anabranch.edge.gateway.config import GatewayFolder
from anabranch.edge.gateway.operator import invite
from anabranch.edge.generated import edge_pb2, edge_pb2_grpc
from anabranch.edge.runtime.enrol import Invitation

HOST = "localhost"
CALL_S = 60.0


class Died(Exception):
    """A device was switched off in the middle of something."""


@dataclass
class Device:
    """One device; every method is one call, or the chunks of one."""

    key: ec.EllipticCurvePrivateKey
    certificate: bytes
    authority: bytes
    name: str
    address: str
    examples: int = 10
    task: edge_pb2.Task | None = None
    channels: list[grpc.Channel] = field(default_factory=list)

    @classmethod
    def enrol(
        cls, invitation: str, enroll_port: int, port: int, host: str = HOST, **facts: Any
    ) -> Device:
        key = ec.generate_private_key(ec.SECP256R1())
        secret = Invitation.parse(invitation).secret
        authority = facts.pop("authority")
        credentials = grpc.ssl_channel_credentials(authority)
        with grpc.secure_channel(f"{host}:{enroll_port}", credentials) as channel:
            reply = edge_pb2_grpc.EdgeGatewayStub(channel).Enroll(
                edge_pb2.EnrollRequest(
                    token=secret, certificate_request=request_of(key), platform="test"
                ),
                timeout=CALL_S,
            )
        return cls(key, reply.certificate, reply.authority, reply.device, f"{host}:{port}", **facts)

    @property
    def stub(self) -> Any:
        """The calls, over one channel."""
        if not self.channels:
            pem = self.key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            credentials = grpc.ssl_channel_credentials(self.authority, pem, self.certificate)
            options = (("grpc.use_local_subchannel_pool", 1),)
            self.channels.append(grpc.secure_channel(self.address, credentials, options))
        return edge_pb2_grpc.EdgeGatewayStub(self.channels[0])

    def hang_up(self) -> None:
        """Close the connection."""
        while self.channels:
            self.channels.pop().close()

    def check_in(self) -> edge_pb2.CheckInReply:
        said = edge_pb2.Capabilities(runtime="load", engines=["joint"], examples=self.examples)
        reply: edge_pb2.CheckInReply = self.stub.CheckIn(
            edge_pb2.CheckInRequest(capabilities=said), timeout=CALL_S
        )
        self.task = reply.task if reply.WhichOneof("outcome") == "task" else None
        return reply

    def fetch(self, sha256: bytes, offset: int = 0) -> bytes:
        request = edge_pb2.FetchRequest(sha256=sha256, offset=offset)
        data = b""
        for chunk in self.stub.Fetch(request, timeout=CALL_S):
            if chunk.offset != offset + len(data) or zlib.crc32(chunk.data) != chunk.crc32:
                raise RuntimeError("fetch: a chunk is not what it should be")
            data += chunk.data
        return data

    def begin(self, frame: bytes) -> edge_pb2.UploadStatus:
        digest = hashlib.sha256(frame).digest()
        request = edge_pb2.BeginUploadRequest(task=self._task().id, sha256=digest, size=len(frame))
        reply: edge_pb2.UploadStatus = self.stub.BeginUpload(request, timeout=CALL_S)
        return reply

    def upload(
        self, frame: bytes, *, die_after: int | None = None, pause_s: float = 0.0
    ) -> edge_pb2.UploadStatus:
        """Send what the gateway does not have; `die_after`: so many chunks, then Died."""
        status = self.begin(frame)
        if status.state != edge_pb2.UploadStatus.OPEN or status.committed == len(frame):
            return status
        pieces = chunks_of(frame, status, die_after=die_after, pause_s=pause_s)
        try:
            reply: edge_pb2.UploadStatus = self.stub.Upload(pieces, timeout=CALL_S)
        except grpc.RpcError:
            if die_after is not None:
                raise Died from None
            raise
        return reply

    def commit(self, frame: bytes, *, examples: int | None = None) -> edge_pb2.CommitReply:
        digest = hashlib.sha256(frame).digest()
        task = self._task().id
        name = hashlib.sha256(f"{task}/{len(frame)}/".encode() + digest).hexdigest()[:32]
        request = edge_pb2.CommitRequest(
            upload=name,
            task=task,
            sha256=digest,
            examples=self.examples if examples is None else examples,
            steps=3,
        )
        reply: edge_pb2.CommitReply = self.stub.Commit(request, timeout=CALL_S)
        return reply

    def send(self, frame: bytes, **how: Any) -> edge_pb2.CommitReply:
        """Upload and commit."""
        self.upload(frame, **how)
        return self.commit(frame)

    def _task(self) -> edge_pb2.Task:
        if self.task is None:
            raise RuntimeError("this device has no task")
        return self.task


def chunks_of(
    frame: bytes,
    status: edge_pb2.UploadStatus,
    *,
    die_after: int | None = None,
    pause_s: float = 0.0,
) -> Iterator[edge_pb2.UploadChunk]:
    """Yield chunks from where the gateway is."""
    starts = range(status.committed, len(frame), status.chunk_bytes)
    for number, offset in enumerate(starts):
        if number == die_after:
            raise Died
        data = frame[offset : offset + status.chunk_bytes]
        yield edge_pb2.UploadChunk(
            upload=status.upload, offset=offset, data=data, crc32=zlib.crc32(data)
        )
        time.sleep(pause_s)


def request_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a certificate request of a key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def enrol_many(
    folder: GatewayFolder, server: Any, count: int, host: str = HOST, *, at_once: int = 4
) -> list[Device]:
    """Return that many devices of a running gateway."""
    authority = (folder.authority / "ca.pem").read_bytes()

    def enrol(text: str) -> Device:
        device: Device = patiently(
            lambda: Device.enrol(text, server.enroll_port, server.port, host, authority=authority)
        )
        return device

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(enrol, invite(folder.folder, count=count)))


def patiently(work: Callable[[], Any], attempts: int = 40, wait_s: float = 0.1) -> Any:
    """Return what `work` returns, once the gateway takes it."""
    later = (
        grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.OUT_OF_RANGE,
    )  # fmt: skip
    for attempt in range(attempts):
        try:
            return work()
        except grpc.RpcError as error:
            if error.code() not in later or attempt == attempts - 1:
                raise
            time.sleep(wait_s * (1 + attempt % 5))
    raise RuntimeError("no attempt was made")
