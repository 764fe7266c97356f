"""A device in a secure sum: the gateway learns the sum of the round's deltas, and no delta.

    Stage() ─► wait ─► … ─► request "advertise" ─► Stage(advert) ─► … ─► ended: counted or not

The delta stays in the spool, and the masked vector in memory; it is uploaded like a delta. What
the terms of the sum say is held against the task that was trained and against device.toml
(protocols/secagg/member.py checks the rest). The secrets of a sum live in this process alone: a
device that is started anew in the middle of one has dropped out of it.

    sums.json    {run: rounds whose delta this device has given to a sum}

It is on the disk before the masked vector leaves: from then on others may open that sum without
this device. A second sum of the same run and round is refused: the difference of two sums of the
same deltas, among others of them, could be one delta.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import sync
from anabranch.edge.runtime.backoff import Window
from anabranch.edge.runtime.device_file import SecureFloors, read_device
from anabranch.edge.runtime.enrol import read_enrolled
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.peer import peer_key
from anabranch.edge.runtime.secure_task import require_allowed, sum_config
from anabranch.edge.runtime.spool import Entry, Spool
from anabranch.edge.runtime.sync import Verdict, window_of
from anabranch.edge.runtime.task import checked
from anabranch.edge.runtime.transport import Gateway
from anabranch.protocols import wire
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import DataError, DeviceError, PolicyError, ProtocolError
from anabranch.protocols.secagg.contribution import contribute, sizes
from anabranch.protocols.secagg.member import Limits, Member
from anabranch.protocols.secagg.messages import REQUESTS, STAGES, Invite, Request
from anabranch.protocols.spec import shown
from anabranch.storage.files import write_atomic

BETWEEN = Window(min_s=1, max_s=3)  # while the gateway's answer says nothing of when

_Round = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class _Given(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """sums.json."""

    format: Literal[1] = 1
    given: dict[str, tuple[_Round, ...]]


@dataclass
class Sum:
    """The part that a device takes in the sum of one task; in memory only."""

    home: Home
    task: edge_pb2.Task
    entry: Entry
    spool: Spool
    random: Callable[[int], bytes] = secrets.token_bytes
    _member: Member | None = field(default=None, init=False, repr=False)
    _vector: bytes = field(default=b"", init=False, repr=False)  # masked

    def __post_init__(self) -> None:
        """Raise DataError for a delta that no sum of this range takes."""
        largest = max(float(np.abs(one).max(initial=0)) for one in self._delta.arrays.values())
        if largest > self.task.secure.range:
            raise DataError(
                f"delta of task {self.task.id}: it has values beyond the range of "
                f"+-{self.task.secure.range:g} of the secure sum: nothing is sent"
            )

    def step(self, gateway: Gateway) -> Window | Verdict:
        """Answer what the gateway asks now; return when to ask again, or its last word.

        Raises PolicyError and ProtocolError for what this device does not take part in: the caller
        gives the task back. GatewayUnavailable: the next step asks first, since the answer may be
        there, and sends the same one if it is not.
        """
        said = blank = edge_pb2.StageRequest(task=self.task.id)
        for _ in range(len(STAGES) + 1):
            if said.sha256 and not self._uploaded(gateway):
                said = blank
            reply = gateway.stage(said)
            outcome = reply.WhichOneof("outcome")
            if outcome == "wait":
                return window_of(reply.wait)
            if outcome == "ended":
                ended = reply.ended
                window = window_of(ended.next) if ended.HasField("next") else None
                return Verdict(accepted=ended.counted, reason=ended.reason, window=window)
            if outcome != "request":
                raise ProtocolError("secure sum: the gateway's answer has neither word nor time")
            answer = self._answer(reply.request)
            if answer is None:
                return BETWEEN
            said = answer
        return BETWEEN

    def _answer(self, asked: edge_pb2.SumRequest) -> edge_pb2.StageRequest | None:
        """Return the answer; None for a sum whose secrets this process does not have."""
        request = _request(asked)
        floors = read_device(self.home.folder).secure_aggregation  # what its owner says now
        require_allowed(self.task, floors, self.home)
        member = self._member
        if isinstance(request, Invite) and (
            member is None or member.terms.instance != request.terms.instance
        ):
            self._member = member = self._joined(request, floors)
        if member is None:
            return None
        member.hold_to(_limits(floors))
        answer = member.answer(request, self._contribution)
        if request.stage == "mask":
            remember_given(self.home, self.task.run, self.task.round)
        said = edge_pb2.StageRequest(
            task=self.task.id, stage=request.stage, reply=msgspec.json.encode(answer.reply)
        )
        if request.stage == "mask":
            self._vector = answer.data
            said.sha256 = hashlib.sha256(answer.data).digest()
        return said

    def _joined(self, invite: Invite, floors: SecureFloors) -> Member:
        """Return a member of the sum that the device is invited to, if it is that of its task."""
        task, terms = self.task, invite.terms
        require_not_given(self.home, task.run, task.round)
        values, counters = sizes(self._delta.spec, self._delta.part, by_rank=False)
        expected: dict[str, Any] = {
            "run": task.run,
            "round": task.round,
            "model": task.adapter.sha256.hex(),
            "config": sum_config(task),
            "limit": task.secure.range,
            "minimum": task.secure.minimum,
            "threshold": task.secure.threshold,
            "colluding": task.secure.colluding,
            "values": values,
            "counters": counters,
            "group": None,
        }
        if task.secure.roster:
            expected["roster"] = task.secure.roster.hex()
        for name, value in expected.items():
            if getattr(terms, name) != value:
                raise ProtocolError(
                    f"secure sum: {name} {shown(str(getattr(terms, name)))}, and the task that was "
                    f"trained has {shown(str(value))}: nothing is sent"
                )
        return Member(
            read_enrolled(self.home).device,
            peer_key(self.home),
            invite,
            limits=_limits(floors),
            random=self.random,
        )

    def _contribution(self) -> NDArray[Any]:
        member = self._member
        if member is None:
            raise ProtocolError("secure sum: not joined")
        return contribute(
            self._delta,
            member.terms,
            self._delta.part,
            weighting="examples" if self.task.secure.weighting == "examples" else "uniform",
            normalize_steps=False,
            by_rank=False,
            random=self.random,
        )

    @property
    def _delta(self) -> Delta:
        """Return the delta in the spool; read each time, so that it is in memory only then."""
        work = checked(self.task)
        start = self.home.cache / self.task.adapter.sha256.hex()
        try:
            frame = start.read_bytes()
            data = b"".join(part for _, part in self.spool.chunks(self.entry, 0, 1 << 20))
        except OSError as error:
            raise DeviceError(
                f"task {self.task.id}: {error.strerror or error}; the device leaves the sum"
            ) from None
        for what, got, expected in (
            ("adapter", frame, self.task.adapter.sha256.hex()),
            ("delta", data, self.entry.sha256),
        ):
            if hashlib.sha256(got).hexdigest() != expected:
                raise DeviceError(f"task {self.task.id}: {what}: damaged on this device's disk")
        return wire.decode_delta(data, wire.decode_adapter(frame).spec, work.part)

    def _uploaded(self, gateway: Gateway) -> bool:
        """Send the masked vector; False: it is not wanted any more, and the gateway says why."""
        entry = Entry(
            task=self.task.id,
            sha256=hashlib.sha256(self._vector).hexdigest(),
            size=len(self._vector),
            examples=0,
            steps=0,
            deadline_unix=self.entry.deadline_unix,
        )
        status = sync.transferred(gateway, _Memory(self._vector), entry)
        return bool(status.state != edge_pb2.UploadStatus.NOT_WANTED)


@dataclass(frozen=True)
class _Memory:
    """A vector that is sent from memory."""

    data: bytes = field(repr=False)

    def chunks(self, entry: Entry, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) from `offset` on."""
        for start in range(offset, len(self.data), size):
            yield start, self.data[start : start + size]


def require_not_given(home: Home, run: str, number: int) -> None:
    """Raise PolicyError if this device has given its delta of this run and round to a sum."""
    if number in _given(home).given.get(run, ()):
        raise PolicyError(
            f"this device has given its delta of round {number} of run {shown(run)} to a secure "
            "sum: there is no second one"
        )


def remember_given(home: Home, run: str, number: int) -> None:
    """Write into sums.json that a masked vector is about to leave; durable when it returns."""
    given = dict(_given(home).given)
    given[run] = tuple(sorted({*given.get(run, ()), number}))
    write_atomic(home.sums, msgspec.json.encode(_Given(given=given)), 0o600)


def _given(home: Home) -> _Given:
    try:
        return msgspec.json.decode(home.sums.read_bytes(), type=_Given)
    except FileNotFoundError:
        return _Given(given={})
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DeviceError(
            f"{home.sums}: {error}; without it no secure sum is joined. Restore it, or delete it "
            "if this device has taken part in none"
        ) from None


def _limits(floors: SecureFloors) -> Limits:
    return Limits(minimum=floors.minimum, threshold=floors.threshold, colluding=floors.colluding)


def _request(asked: edge_pb2.SumRequest) -> Request:
    """Return the request in a message, or raise ProtocolError."""
    kind: Any = REQUESTS.get(asked.stage)  # type: ignore[call-overload]
    if kind is None:
        raise ProtocolError(f"secure sum: no stage {shown(repr(asked.stage))}")
    try:
        request: Request = msgspec.json.decode(asked.content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"secure sum: {asked.stage}: {error}") from None
    return request
