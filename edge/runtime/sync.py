"""What a device says to its gateway: check in, send a delta, give a task back.

    BeginUpload ─► OPEN, committed = k ─► Upload from k ─► COMPLETE ─► Commit ─► accepted | refused
              └──► COMPLETE ──────────────────────────────────────────┘
              └──► NOT_WANTED: the gateway's last word

Sending can be cut off anywhere and called again: the gateway says what it has, and counts a
delta once however often it is sent. A gateway that answers with nonsense (more bytes than there
are, no progress) is a ProtocolError; the delta stays in the spool until its deadline.
"""

from __future__ import annotations

import csv
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np

from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime.backoff import Window
from anabranch.edge.runtime.bundle_manifest import MANIFEST
from anabranch.edge.runtime.data import LABELS
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.spool import Entry, Spool
from anabranch.edge.runtime.transport import Gateway, GatewayUnavailable
from anabranch.protocols.errors import DataError, ProtocolError
from anabranch.protocols.identity.peer import Announced
from anabranch.storage.files import digest_of

CHUNK = 64 << 10  # bytes, unless the gateway says otherwise
MAX_CHUNK, MIN_CHUNK = 1 << 20, 1 << 10
MAX_BUNDLES = 64  # digests of manifests that a check-in tells
MAX_REASON = 200  # characters
_State = edge_pb2.UploadStatus


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The gateway's last word on a delta."""

    accepted: bool
    reason: str
    window: Window | None  # when to ask for the next task


class Source(Protocol):
    """Where the bytes of an entry are: the spool, or memory."""

    def chunks(self, entry: Entry, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) from `offset` on."""


def window_of(window: edge_pb2.RetryWindow) -> Window:
    """Return a server's window; nonsense in it is cut to what is sensible."""
    return Window(min_s=window.min_seconds, max_s=window.max_seconds)


def check_in(
    gateway: Gateway,
    capabilities: edge_pb2.Capabilities,
    resume: str = "",
    peer: Announced | None = None,
) -> edge_pb2.Task | Window:
    """Return a task, or when to ask again. Raises ProtocolError for an answer that is neither."""
    request = edge_pb2.CheckInRequest(capabilities=capabilities, resume_task=resume)
    if peer is not None:
        request.peer_key, request.peer_proof = map(bytes.fromhex, (peer.key, peer.proof))
    reply = gateway.check_in(request)
    outcome = reply.WhichOneof("outcome")
    if outcome == "task":
        return reply.task
    if outcome == "retry":
        return window_of(reply.retry)
    raise ProtocolError("check-in: the gateway answered with neither a task nor a time")


def abort(gateway: Gateway, task: str, reason: str) -> Window:
    """Give a task back and say why."""
    reply = gateway.abort(edge_pb2.AbortRequest(task=task, reason=reason[:MAX_REASON]))
    return window_of(reply.next)


def send(gateway: Gateway, spool: Spool, entry: Entry) -> Verdict:
    """Send a delta and return the gateway's last word on it. The entry stays in the spool.

    Guarantees: bytes that the gateway has are not sent again; a delta that changed on the disk
    is not sent at all.

    Raises GatewayUnavailable if it does not come further (a later call goes on), GatewayRefused,
    ProtocolError for an answer that cannot be.
    """
    if not spool.is_whole(entry):
        return Verdict(accepted=False, reason="damaged on this device's disk", window=None)
    status = transferred(gateway, spool, entry)
    if status.state == _State.NOT_WANTED:
        return Verdict(accepted=False, reason=status.reason or "not wanted", window=None)
    return _committed(gateway, entry, status.upload)


def transferred(gateway: Gateway, source: Source, entry: Entry) -> edge_pb2.UploadStatus:
    """Send what the gateway does not have of an entry's bytes; COMPLETE or NOT_WANTED at the end.

    Raises as `send`.
    """
    status = _announced(gateway, entry)
    failures = 0
    while status.state == _State.OPEN:
        before = status.committed
        try:
            _upload(gateway, source, entry, status)
        except GatewayUnavailable as error:
            last: GatewayUnavailable | None = error
        else:
            last = None
        status = _announced(gateway, entry)
        failures = 0 if status.committed > before else failures + 1
        if status.state == _State.OPEN and failures >= gateway.patience.attempts:
            raise last or ProtocolError(
                f"task {entry.task}: the gateway stays at {status.committed} of {entry.size} bytes"
            )
        if failures:
            gateway.wait(failures)
    return status


def _announced(gateway: Gateway, entry: Entry) -> edge_pb2.UploadStatus:
    """Return how much of a delta the gateway has."""
    status = gateway.begin_upload(
        edge_pb2.BeginUploadRequest(
            task=entry.task, sha256=bytes.fromhex(entry.sha256), size=entry.size
        )
    )
    if status.committed > entry.size or status.state == _State.STATE_UNSPECIFIED:
        raise ProtocolError(
            f"task {entry.task}: the gateway says that it has {status.committed} of {entry.size} "
            f"bytes, state {status.state}"
        )
    return status


def _upload(gateway: Gateway, source: Source, entry: Entry, status: edge_pb2.UploadStatus) -> None:
    size = min(max(status.chunk_bytes or CHUNK, MIN_CHUNK), MAX_CHUNK)

    def chunks() -> Iterator[edge_pb2.UploadChunk]:
        for offset, data in source.chunks(entry, status.committed, size):
            yield edge_pb2.UploadChunk(
                upload=status.upload, offset=offset, data=data, crc32=zlib.crc32(data)
            )

    gateway.upload(chunks())


def _committed(gateway: Gateway, entry: Entry, upload: str) -> Verdict:
    reply = gateway.commit(
        edge_pb2.CommitRequest(
            upload=upload,
            task=entry.task,
            sha256=bytes.fromhex(entry.sha256),
            examples=entry.examples,
            steps=entry.steps,
        )
    )
    window = window_of(reply.next) if reply.HasField("next") else None
    return Verdict(accepted=reply.accepted, reason=reply.reason, window=window)


def capabilities(home: Home, examples: int) -> edge_pb2.Capabilities:
    """Return what this device tells of itself at a check-in."""
    import psutil

    engines = ["joint"] if _version("onnxruntime") or _training() else []
    engines += ["ort-training"] if _training() else []
    manifests = sorted(home.folder.glob("bundles/*/*/" + MANIFEST))[:MAX_BUNDLES]
    home.folder.mkdir(parents=True, exist_ok=True)
    return edge_pb2.Capabilities(
        runtime=f"anabranch {_version('anabranch')}",
        onnxruntime=_version("onnxruntime") or _training(),
        engines=engines,
        memory_bytes=psutil.virtual_memory().total,
        disk_bytes=shutil.disk_usage(home.folder).free,
        examples=examples,
        bundles=[digest_of(path) for path in manifests],
    )


def count_records(path: Path) -> int:
    """Return how many records a data file has, without reading what is in them.

    Raises DataError if the file is of no kind that a device reads, or cannot be read.
    """
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return len(arrays[LABELS])
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                return sum(1 for line in file if line.strip())
            if path.suffix.lower() == ".csv":
                return max(sum(1 for row in csv.reader(file) if row) - 1, 0)
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__})") from None
    raise DataError(f"{path}: expected a .jsonl, .csv or .npz file")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _training() -> str:
    return _version("onnxruntime-training-cpu") or _version("onnxruntime-training")
