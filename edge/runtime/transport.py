"""Calls to the gateway over gRPC with mutual TLS: deadlines, size limits, retries, errors.

    what the call returned                                        becomes            retried here
    UNAVAILABLE  DEADLINE_EXCEEDED                                GatewayUnavailable idempotent ones
    ABORTED  DATA_LOSS  OUT_OF_RANGE  RESOURCE_EXHAUSTED
    CANCELLED  INTERNAL  UNKNOWN                                  GatewayUnavailable no
    NOT_FOUND  INVALID_ARGUMENT  and the rest                     GatewayRefused     no
    PERMISSION_DENIED  UNAUTHENTICATED  UNIMPLEMENTED             NotAdmitted        no
    a handshake with another certificate authority                NotAdmitted        no

GatewayUnavailable means "later": the caller waits (backoff.py) and goes on where it stopped.
GatewayRefused means that the same call will be refused again; NotAdmitted, that every call will,
until somebody does something about the device's enrolment. Every call has a deadline, so a
gateway that says nothing costs seconds. CheckIn, BeginUpload, Commit, Stage and Abort are
idempotent by protocols/edge.proto, Enroll for one token and key; Fetch and Upload are resumed by
their callers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from cryptography import x509

from anabranch.edge.runtime.agent import plain
from anabranch.edge.runtime.backoff import Backoff
from anabranch.protocols.errors import DeviceError

if TYPE_CHECKING:
    from anabranch.edge.generated import edge_pb2
    from anabranch.edge.runtime.home import Home

MAX_MESSAGE = 2 << 20  # bytes: the largest chunk, 1 MiB, and a task with room to spare
_SHOWN = 300  # characters of a gateway's message that are repeated
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.enable_retries", 0),  # retried here, and only what may be
    ("grpc.initial_reconnect_backoff_ms", 200),  # the waiting is done here, too
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.use_local_subchannel_pool", 1),  # no two channels share a broken connection
)
_RETRIED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})
_LATER = _RETRIED | {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}
_CLOSED = frozenset(
    {
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_ADVICE = {
    grpc.StatusCode.PERMISSION_DENIED: "enrol again with a new token",
    grpc.StatusCode.UNAUTHENTICATED: "enrol again with a new token",
    grpc.StatusCode.UNIMPLEMENTED: "bring device and gateway to one version",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "the gateway limits this device; it is asked later",
    grpc.StatusCode.UNAVAILABLE: "check the network and the gateway; it is asked later",
    grpc.StatusCode.DEADLINE_EXCEEDED: "the network or the gateway is slow; it is asked later",
}

T = TypeVar("T")


class GatewayUnavailable(DeviceError):
    """The gateway cannot be reached, or cannot take this now: the same call later may succeed."""


class GatewayRefused(DeviceError):
    """The gateway refuses this call, and would refuse it again."""


class NotAdmitted(DeviceError):
    """The gateway does not talk to this device, or this is not the device's gateway."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a device waits for its gateway, in seconds, and how often it tries."""

    call_s: float = 30.0  # deadline of a unary call
    stream_s: float = 300.0  # deadline of one Fetch or Upload; a longer transfer is resumed
    attempts: int = 4  # of an idempotent call, and of a transfer that makes no progress
    backoff: Backoff = field(default_factory=lambda: Backoff(base_s=0.5, cap_s=20.0))


class Gateway:
    """The gateway as a device calls it; a context manager that closes the channel."""

    def __init__(
        self,
        channel: grpc.Channel,
        *,
        patience: Patience | None = None,
        rng: random.Random | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.patience = patience or Patience()
        self._rng = rng or random.Random()
        self._sleep = sleep
        self._use(channel)

    def enroll(self, request: edge_pb2.EnrollRequest) -> edge_pb2.EnrollReply:
        """Exchange a token, or the certificate of this channel, for a new certificate."""
        reply: edge_pb2.EnrollReply = self._repeated(self._stub.Enroll, request)
        return reply

    def check_in(self, request: edge_pb2.CheckInRequest) -> edge_pb2.CheckInReply:
        """Ask for a task."""
        reply: edge_pb2.CheckInReply = self._repeated(self._stub.CheckIn, request)
        return reply

    def begin_upload(self, request: edge_pb2.BeginUploadRequest) -> edge_pb2.UploadStatus:
        """Announce an upload; the answer says what is there already."""
        reply: edge_pb2.UploadStatus = self._repeated(self._stub.BeginUpload, request)
        return reply

    def commit(self, request: edge_pb2.CommitRequest) -> edge_pb2.CommitReply:
        """Say that an upload is complete; once more is the same as once."""
        reply: edge_pb2.CommitReply = self._repeated(self._stub.Commit, request)
        return reply

    def abort(self, request: edge_pb2.AbortRequest) -> edge_pb2.AbortReply:
        """Give a task back."""
        reply: edge_pb2.AbortReply = self._repeated(self._stub.Abort, request)
        return reply

    def stage(self, request: edge_pb2.StageRequest) -> edge_pb2.StageReply:
        """Take the next step of a secure sum; an answer that is there is not taken twice."""
        reply: edge_pb2.StageReply = self._repeated(self._stub.Stage, request)
        return reply

    def fetch(self, request: edge_pb2.FetchRequest) -> Iterator[edge_pb2.Chunk]:
        """Yield chunks of one file. A caller that has enough closes the iterator."""
        call = self._stub.Fetch(request, timeout=self.patience.stream_s)
        try:
            yield from call
        except grpc.RpcError as error:
            raise as_device_error(error) from None
        finally:
            call.cancel()

    def upload(self, chunks: Iterable[edge_pb2.UploadChunk]) -> edge_pb2.UploadStatus:
        """Send chunks of one upload."""
        try:
            reply: edge_pb2.UploadStatus = self._stub.Upload(
                iter(chunks), timeout=self.patience.stream_s
            )
        except grpc.RpcError as error:
            raise as_device_error(error) from None
        return reply

    def wait(self, failures: int) -> None:
        """Sleep before the next attempt after so many failures in a row."""
        self._sleep(self.patience.backoff.delay_s(failures, self._rng))

    def reconnect(self, home: Home) -> None:
        """Go on with the identity that is in the device's folder now; raises as `connect`."""
        self._channel.close()
        self._use(_identified(home))

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _use(self, channel: grpc.Channel) -> None:
        from anabranch.edge.generated import edge_pb2_grpc

        self._channel = channel
        self._stub: Any = edge_pb2_grpc.EdgeGatewayStub(channel)

    def _once(self, method: Callable[..., T], request: object) -> T:
        try:
            return method(request, timeout=self.patience.call_s)
        except grpc.RpcError as error:
            raise as_device_error(error) from None

    def _repeated(self, method: Callable[..., T], request: object) -> T:
        """Call an idempotent method until it answers, or the attempts are used up."""
        for failures in range(1, self.patience.attempts):
            try:
                return method(request, timeout=self.patience.call_s)
            except grpc.RpcError as error:
                if error.code() not in _RETRIED or _other_authority(error):
                    raise as_device_error(error) from None
            self.wait(failures)
        return self._once(method, request)


def as_device_error(error: grpc.RpcError) -> DeviceError:
    """Return what a failed call means for the device, and what to do (table above)."""
    code, details = error.code(), plain(error.details() or "", _SHOWN)
    if _other_authority(error):
        return NotAdmitted(
            "gateway: its certificate is not one of the certificate authority that this device is "
            f"enrolled with, or is out of date ({details}); check address and clock, or enrol again"
        )
    advice = _ADVICE.get(code, "it is asked later" if code in _LATER else "nothing was changed")
    kind: type[DeviceError] = GatewayUnavailable if code in _LATER else GatewayRefused
    if code in _CLOSED:
        kind = NotAdmitted
    return kind(f"gateway: {code.name}: {details or 'no reason given'}; {advice}")


def _other_authority(error: grpc.RpcError) -> bool:
    details = error.details() or ""
    return error.code() == grpc.StatusCode.UNAVAILABLE and (
        "CERTIFICATE_VERIFY_FAILED" in details or "Hostname Verification Check failed" in details
    )


def tls_channel(
    address: str, authority: bytes, key: bytes | None = None, certificate: bytes | None = None
) -> grpc.Channel:
    """Return a channel to host:port that trusts one certificate authority (PEM) alone."""
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(address, credentials, options=_OPTIONS)


def connect(home: Home, *, patience: Patience | None = None) -> Gateway:
    """Return the gateway that the device is enrolled with. Nothing is sent yet.

    Raises DeviceError if the device is not enrolled, a file of its identity is missing, or its
    certificate is out of date.
    """
    return Gateway(_identified(home), patience=patience)


def _identified(home: Home) -> grpc.Channel:
    """Return a channel with the device's key and certificate."""
    from anabranch.edge.runtime.enrol import read_enrolled

    enrolled = read_enrolled(home)
    try:
        key, certificate = home.device_key.read_bytes(), home.certificate.read_bytes()
        authority = home.authority.read_bytes()
        expires = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise DeviceError(
            f"{home.folder}: the device's identity cannot be read ({error}); enrol again"
        ) from None
    if datetime.now(UTC) >= expires:
        raise DeviceError(
            f"{home.certificate}: this device's certificate ended on {expires:%Y-%m-%d}; "
            "enrol again with a new token and --force"
        )
    return tls_channel(enrolled.address, authority, key, certificate)
