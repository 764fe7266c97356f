"""The gRPC service of protocols/edge.proto: requests in, replies out, refusals as status codes.

Every call, before its first message is waited for: the peer's certificate names the device
(authority.py), which must be known and not revoked; the deadline is at most call_s; quotas are
checked (limits.py). So every method takes an iterator of messages. No field of a request says who
the device is. What the gateway refuses comes back as the status of its Refusal, any other
mistake of a peer as INVALID_ARGUMENT; the text of an unforeseen error stays in the log. Payloads,
tokens and certificates are never logged.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from cryptography.hazmat.primitives import serialization

from anabranch.edge.gateway.authority import (
    Authority,
    key_digest,
    new_device,
    request_key,
    token_hash,
)
from anabranch.edge.gateway.config import GatewayFile
from anabranch.edge.gateway.limits import EVERYBODY, Quotas
from anabranch.edge.gateway.offers import task_of
from anabranch.edge.gateway.published import Shelf
from anabranch.edge.gateway.refusals import Denied, Exhausted, Malformed
from anabranch.edge.gateway.replies import (
    MAX_TEXT,
    Failed,
    answered,
    at,
    boundary,
    end,
    only,
    require_capabilities,
    require_deadline,
    require_text,
    until_broken,
    window,
)
from anabranch.edge.gateway.rounds import Rounds
from anabranch.edge.gateway.secure import read_plan
from anabranch.edge.gateway.spool import Spool
from anabranch.edge.gateway.store import Enrolment, Store
from anabranch.edge.gateway.summing import Asked, Sums
from anabranch.edge.gateway.tasks import Retry, Status
from anabranch.edge.generated import edge_pb2, edge_pb2_grpc
from anabranch.protocols.errors import AnabranchError
from anabranch.protocols.identity.authority import fingerprint
from anabranch.protocols.identity.peer import Announced, require_possessed
from anabranch.protocols.spec import shown

COUNT_EVERY = 16 << 20  # bytes of a download between two notes of them
DOOR_S = 60.0  # longest deadline of a call without a certificate

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """All that the service works with."""

    file: GatewayFile
    authority: Authority
    store: Store
    shelf: Shelf
    spool: Spool
    rounds: Rounds
    sums: Sums
    quotas: Quotas


class Door:
    """Enrolment: the one call without a certificate."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def enroll(
        self, requests: Iterator[edge_pb2.EnrollRequest], context: Any
    ) -> edge_pb2.EnrollReply:
        """Exchange a token and a certificate request for a certificate."""

        def enroll() -> edge_pb2.EnrollReply:
            require_deadline(context, min(DOOR_S, self._parts.file.limits.call_s))
            with self._parts.quotas.call(EVERYBODY):
                return self._enroll(only(requests))

        return answered("Enroll", context, enroll)

    def _enroll(self, request: edge_pb2.EnrollRequest) -> edge_pb2.EnrollReply:
        require_text("token", request.token)
        require_text("platform", request.platform)
        key = key_digest(request_key(request.certificate_request))
        wanted = Enrolment(new_device(), key, shown(request.platform, MAX_TEXT))
        device = self._parts.store.enrol(token_hash(request.token), wanted, time.time())
        log.info("device %s enrolled", device)
        return _certified(self._parts, device, request.certificate_request)


class Service(edge_pb2_grpc.EdgeGatewayServicer):
    """The calls that need a certificate."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def Enroll(
        self, requests: Iterator[edge_pb2.EnrollRequest], context: Any
    ) -> edge_pb2.EnrollReply:
        """Renew the certificate of a device that has one: no token."""

        def renew(device: str, request: edge_pb2.EnrollRequest) -> edge_pb2.EnrollReply:
            if request.token:
                raise Malformed("token: must be empty here; a token is for the enrolment port")
            key = key_digest(request_key(request.certificate_request))
            self._parts.store.renew(device, key)
            return _certified(self._parts, device, request.certificate_request)

        return self._unary("Enroll", context, lambda device: renew(device, only(requests)))

    def CheckIn(
        self, requests: Iterator[edge_pb2.CheckInRequest], context: Any
    ) -> edge_pb2.CheckInReply:
        """Return a task, or when to ask again."""

        def check_in(device: str, request: edge_pb2.CheckInRequest) -> edge_pb2.CheckInReply:
            said = request.capabilities
            require_capabilities(said, self._parts.file.limits.max_examples)
            require_text("resume_task", request.resume_task)
            self._pin(device, request)
            got = self._parts.rounds.check_in(
                device,
                examples=said.examples,
                runtime=shown(said.runtime, MAX_TEXT),
                resume=request.resume_task,
            )
            if isinstance(got, Retry):
                return edge_pb2.CheckInReply(retry=window(got))
            plan = read_plan(self._parts.store, got.round)
            offered = task_of(self._parts.file, self._parts.shelf, got, plan)
            return edge_pb2.CheckInReply(task=offered)

        return self._unary("CheckIn", context, lambda device: check_in(device, only(requests)))

    def _pin(self, device: str, request: edge_pb2.CheckInRequest) -> None:
        """Keep the key that a device signs with in secure sums, if it holds it."""
        key, proof = request.peer_key, request.peer_proof
        if not key or self._parts.store.peer(device) == key:
            return
        if (len(key), len(proof)) != (32, 64):
            raise Malformed("peer_key: expected 32 bytes, and 64 of peer_proof")
        certificate = fingerprint(self._parts.authority.certificate)
        announced = Announced(key=key.hex(), proof=proof.hex())
        require_possessed(announced, device.encode(), certificate)
        self._parts.store.pin_peer(device, key)

    def Fetch(
        self, requests: Iterator[edge_pb2.FetchRequest], context: Any
    ) -> Iterator[edge_pb2.Chunk]:
        """Yield a file from an offset; one chunk is held at a time."""
        try:
            with boundary("Fetch"), self._admitted(context) as device:
                yield from self._chunks(device, only(requests))
        except (AnabranchError, Failed) as error:
            end(context, error)

    def _chunks(self, device: str, request: edge_pb2.FetchRequest) -> Iterator[edge_pb2.Chunk]:
        if len(request.sha256) != 32:
            raise Malformed(f"sha256: expected 32 bytes, got {len(request.sha256)}")
        file = self._parts.shelf.find(request.sha256.hex())
        if request.offset > file.size:
            raise Malformed(f"offset: {request.offset} is beyond the file's {file.size} bytes")
        left, waiting = self._parts.quotas.require_bytes(device), 0
        try:
            with file.path.open("rb") as source:
                source.seek(request.offset)
                offset = request.offset
                while data := source.read(self._parts.file.limits.chunk_bytes):
                    left, waiting = left - len(data), waiting + len(data)
                    if left < 0:
                        raise Exhausted("bytes: today's are used up; come back after midnight UTC")
                    yield edge_pb2.Chunk(offset=offset, data=data, crc32=zlib.crc32(data))
                    offset += len(data)
                    if waiting >= COUNT_EVERY:
                        self._parts.quotas.count_bytes(device, waiting)
                        waiting = 0
                        self._parts.store.require_device(device)
                        left = self._parts.quotas.require_bytes(device)
        finally:
            self._parts.quotas.count_bytes(device, waiting)

    def BeginUpload(
        self, requests: Iterator[edge_pb2.BeginUploadRequest], context: Any
    ) -> edge_pb2.UploadStatus:
        """Say how many bytes of an upload are there."""

        def begin(device: str, request: edge_pb2.BeginUploadRequest) -> edge_pb2.UploadStatus:
            require_text("task", request.task)
            self._parts.quotas.require_bytes(device)
            got = self._parts.rounds.begin(device, request.task, request.sha256, request.size)
            return self._status(got)

        return self._unary("BeginUpload", context, lambda device: begin(device, only(requests)))

    def Upload(self, chunks: Iterator[edge_pb2.UploadChunk], context: Any) -> edge_pb2.UploadStatus:
        """Append chunks to one upload; what is safe stays when the stream breaks."""

        def upload(device: str) -> edge_pb2.UploadStatus:
            return self._status(self._append(device, chunks))

        return self._unary("Upload", context, upload)

    def _append(self, device: str, chunks: Iterator[edge_pb2.UploadChunk]) -> Status:
        writer, left, came = None, self._parts.quotas.require_bytes(device), 0
        try:
            for chunk in until_broken(chunks):
                require_text("upload", chunk.upload)
                if len(chunk.data) > self._parts.file.limits.chunk_bytes:
                    most = self._parts.file.limits.chunk_bytes
                    raise Malformed(f"chunk: {len(chunk.data)} bytes, at most {most} allowed")
                if writer is None:
                    writer = self._parts.spool.open(chunk.upload, device)
                elif chunk.upload != writer.upload:
                    raise Malformed("upload: one stream carries one upload")
                left, came = left - len(chunk.data), came + len(chunk.data)
                if left < 0:
                    raise Exhausted("bytes: today's are used up; come back after midnight UTC")
                writer.add(chunk.offset, chunk.data, chunk.crc32)
            if writer is None:
                raise Malformed("upload: a stream without chunks")
        finally:
            if writer is not None:
                try:
                    writer.checkpoint()
                finally:
                    writer.close()
                    again = came - writer.counted  # what was there already, or was damaged
                    if again > 0:
                        self._parts.quotas.count_bytes(device, again)
        state = "COMPLETE" if writer.complete else "OPEN"
        return Status(writer.upload, writer.committed, state)

    def Commit(
        self, requests: Iterator[edge_pb2.CommitRequest], context: Any
    ) -> edge_pb2.CommitReply:
        """Count a delta, once."""

        def commit(device: str, request: edge_pb2.CommitRequest) -> edge_pb2.CommitReply:
            require_text("task", request.task)
            require_text("upload", request.upload)
            got = self._parts.rounds.commit(
                device,
                request.task,
                request.upload,
                request.sha256,
                examples=request.examples,
                steps=request.steps,
            )
            after = window(self._parts.rounds.retry("come back for the next round"))
            return edge_pb2.CommitReply(accepted=got.accepted, reason=got.reason, next=after)

        return self._unary("Commit", context, lambda device: commit(device, only(requests)))

    def Abort(self, requests: Iterator[edge_pb2.AbortRequest], context: Any) -> edge_pb2.AbortReply:
        """Take a task back."""

        def abort(device: str, request: edge_pb2.AbortRequest) -> edge_pb2.AbortReply:
            require_text("task", request.task)
            require_text("reason", request.reason)
            self._parts.rounds.abort(device, request.task, shown(request.reason, MAX_TEXT))
            return edge_pb2.AbortReply(next=window(self._parts.rounds.retry("task given back")))

        return self._unary("Abort", context, lambda device: abort(device, only(requests)))

    def Stage(self, requests: Iterator[edge_pb2.StageRequest], context: Any) -> edge_pb2.StageReply:
        """Take an answer in a secure sum, and say what comes next."""

        def stage(device: str, request: edge_pb2.StageRequest) -> edge_pb2.StageReply:
            require_text("task", request.task)
            require_text("stage", request.stage)
            got = self._parts.sums.stage(
                device,
                request.task,
                stage=request.stage,
                reply=request.reply,
                sha=request.sha256,
            )
            if isinstance(got, Retry):
                return edge_pb2.StageReply(wait=window(got))
            if isinstance(got, Asked):
                asked = edge_pb2.SumRequest(stage=got.stage, content=got.content)
                return edge_pb2.StageReply(request=asked)
            after = window(self._parts.rounds.retry("come back for the next round"))
            ended = edge_pb2.SumEnd(counted=got.counted, reason=got.reason, next=after)
            return edge_pb2.StageReply(ended=ended)

        return self._unary("Stage", context, lambda device: stage(device, only(requests)))

    def _unary(self, name: str, context: Any, work: Callable[[str], T]) -> T:
        def admitted() -> T:
            with self._admitted(context) as device:
                return work(device)

        return answered(name, context, admitted)

    @contextmanager
    def _admitted(self, context: Any) -> Iterator[str]:
        """Yield the device that calls, if it may."""
        require_deadline(context, self._parts.file.limits.call_s)
        pem = context.auth_context().get("x509_pem_cert", [])
        if len(pem) != 1:
            raise Denied("certificate: this port needs one; enrol first")
        device = self._parts.authority.device_of(pem[0])
        self._parts.store.require_device(device)
        with self._parts.quotas.call(device):
            yield device

    def _status(self, status: Status) -> edge_pb2.UploadStatus:
        return edge_pb2.UploadStatus(
            upload=status.upload,
            committed=status.committed,
            state=edge_pb2.UploadStatus.State.Value(status.state),
            chunk_bytes=self._parts.file.limits.chunk_bytes,
            reason=status.reason,
        )


def _certified(parts: Parts, device: str, request: bytes) -> edge_pb2.EnrollReply:
    certificate = parts.authority.issue(request, device, parts.file.certificate_days)
    return edge_pb2.EnrollReply(
        device=device,
        certificate=certificate.public_bytes(serialization.Encoding.PEM),
        authority=parts.authority.pem,
        bundle_keys=[bytes.fromhex(key) for key in parts.file.bundle_keys],
        gateway=at(parts.file.hosts[0], parts.file.port),
    )
