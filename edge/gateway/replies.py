"""What every call has in common: errors become statuses, requests are checked, replies are made.

The text of an AnabranchError is for the peer; that of any other error may hold what it should
not, so the peer hears its type alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from anabranch.edge.gateway.published import Served
from anabranch.edge.gateway.refusals import Malformed, Superseded
from anabranch.edge.gateway.tasks import Retry
from anabranch.edge.generated import edge_pb2
from anabranch.protocols.errors import AnabranchError

MAX_TEXT = 256  # characters of a string that a device sends
MAX_LIST = 64
GARBLED: Any = object()

log = logging.getLogger(__name__)
T = TypeVar("T")


class Failed(Exception):
    """An unforeseen error; its text stays in the log."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"{kind} in {name}: see the gateway's log")


@contextmanager
def boundary(name: str) -> Iterator[None]:
    """Turn what goes wrong inside into a Refusal, an AnabranchError, or Failed; log it."""
    try:
        yield
    except AnabranchError as error:
        log.info("%s refused: %s", name, error)
        raise
    except grpc.RpcError:
        raise Superseded("the call was ended by the device") from None
    except Exception as error:  # gRPC would send its text
        log.exception("%s failed", name)
        raise Failed(type(error).__name__, name) from None


def answered(name: str, context: Any, work: Callable[[], T]) -> T:
    """Return what `work` returns; an error becomes a status, and the call ends."""
    try:
        with boundary(name):
            return work()
    except (AnabranchError, Failed) as error:
        end(context, error)
        raise  # end does not return


def end(context: Any, error: Exception) -> None:
    """End a call with the status of an error; raises what gRPC expects to be raised."""
    status = "INVALID_ARGUMENT" if isinstance(error, AnabranchError) else "INTERNAL"
    context.abort(getattr(grpc.StatusCode, getattr(error, "status", status)), str(error))


def until_broken(chunks: Iterator[edge_pb2.UploadChunk]) -> Iterator[edge_pb2.UploadChunk]:
    """Yield what arrives; a stream that breaks simply ends: nobody hears the answer."""
    try:
        for chunk in chunks:
            yield _read(chunk)
    except grpc.RpcError:
        log.info("Upload broke off")


def reading(kind: Any) -> Callable[[bytes], Any]:
    """Return what reads messages of a kind. Bytes that are none become GARBLED.

    gRPC would write a traceback for each of them into the log, and answer INTERNAL.
    """

    def read(data: bytes) -> Any:
        try:
            return kind.FromString(data)
        except DecodeError:
            return GARBLED

    return read


def _read(message: T) -> T:
    if message is GARBLED:
        raise Malformed("request: no message of the protocol")
    return message


def only(requests: Iterator[T]) -> T:
    """Return the one message of a call, as soon as it is there; Malformed if it ends without."""
    for request in requests:
        return _read(request)
    raise Malformed("request: the call ended without a message")


def at(host: str, port: int) -> str:
    """Return host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def require_deadline(context: Any, most: float) -> None:
    """Raise Malformed for a call without a deadline, or with one too far away."""
    left = context.time_remaining()
    if left is None or left > most + 1:
        raise Malformed(f"deadline: expected one of at most {most:g} s, set a timeout")


def require_text(what: str, text: str) -> None:
    """Raise Malformed for a string that is too long."""
    if len(text) > MAX_TEXT:
        raise Malformed(f"{what}: {len(text)} characters, at most {MAX_TEXT} allowed")


def require_capabilities(said: edge_pb2.Capabilities, most: int) -> None:
    """Raise Malformed for capabilities that no device has."""
    for name in ("runtime", "onnxruntime"):
        require_text(f"capabilities.{name}", getattr(said, name))
    for name in ("engines", "bundles"):
        held = getattr(said, name)
        if len(held) > MAX_LIST:
            raise Malformed(f"capabilities.{name}: {len(held)} of them, at most {MAX_LIST} allowed")
        for text in held:
            require_text(f"capabilities.{name}", text)
    if said.examples > most:
        raise Malformed(f"capabilities.examples: {said.examples}, at most {most} allowed")


def window(retry: Retry) -> edge_pb2.RetryWindow:
    """Return when to come back, for the wire."""
    return edge_pb2.RetryWindow(
        min_seconds=retry.least, max_seconds=retry.most, reason=retry.reason
    )


def reference(file: Served) -> edge_pb2.FileRef:
    """Return a file, for the wire."""
    return edge_pb2.FileRef(name=file.name, sha256=bytes.fromhex(file.sha256), size=file.size)


def seed_of(seed: int, task: str) -> int:
    """Return the seed of a task: 63 bits."""
    digest = hashlib.sha256(f"{seed}/{task}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
