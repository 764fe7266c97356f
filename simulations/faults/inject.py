"""A plan put into a run: what happens to messages, and when answers come.

    FaultyJourneys     lost-request, late                 when the answer to a message is there
    FaultyMessages     lost-request, lost-answer, crash,  what client and coordinator get
                       duplicate, corrupt, clock-skew,
                       sign-flip, scale
    conduct.py         label-flip, backdoor, crash,       what a client of a population does
                       sign-flip, scale where deltas are masked

What strikes a message depends on the plan, the client, the round and the kind of question, and
on nothing else: not on the engine, the order or the time. Where several faults strike one
message they do so in the order lie, clock, corruption, duplicate; what is lost is lost.

A lying client sends a valid message: its delta is read, changed and written again, by the rules
of the run. With [secure_aggregation] no delta travels: see conduct.py. Corruption changes bytes as
they travel, so a delta that was handed over in this process is written first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from anabranch.client.contents import KEPT
from anabranch.client.flower import (
    DESCRIBE,
    FRAME_TYPE,
    Handed,
    hand_over,
    pack_trained,
    unpack_assignment,
    unpack_trained,
)
from anabranch.client.sums.stages import STAGE_TYPES
from anabranch.protocols import messages, wire
from anabranch.protocols.codecs.codec import CodecName
from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.messages import Refused, Trained
from anabranch.simulations.faults.attacks import LARGEST, rng_of, scaled
from anabranch.simulations.faults.conduct import factor_of
from anabranch.simulations.faults.plan import (
    Asked,
    Backdoor,
    ClockSkew,
    Corrupt,
    Crash,
    Duplicate,
    Fault,
    FaultPlan,
    LabelFlip,
    Late,
    LostAnswer,
    LostRequest,
    Restart,
    Scale,
    SignFlip,
)
from anabranch.simulations.grid import around
from anabranch.simulations.virtual_grid import Bookkeeping, Journeys

ASKED: Mapping[str, Asked] = {
    DESCRIBE: "describe",
    "train": "train",
    "evaluate": "evaluate",
    **{kind: stage for stage, kind in STAGE_TYPES.items()},
}

# The largest value that a codec surely holds (protocols/codecs).
HELD: Mapping[CodecName, float] = {
    "fp32": LARGEST,
    "top-k": LARGEST,
    "fp16": 65504.0,
    "int8": 127 * 2.0**119,
    "int4": 7 * 2.0**119,
}

Place = tuple[int, int, str]  # client, round, kind of question


@dataclass(frozen=True, eq=False)
class Struck:
    """The faults of a plan, found by what they strike."""

    plan: FaultPlan

    @cached_property
    def _by_place(self) -> dict[Place, list[Fault]]:
        found: dict[Place, list[Fault]] = {}
        for fault in self.plan.faults:
            if isinstance(fault, LabelFlip | Backdoor | Restart) or fault.round is None:
                continue
            asked = getattr(fault, "asked", "train")
            found.setdefault((fault.client, fault.round, asked), []).append(fault)
        return found

    @cached_property
    def _always(self) -> dict[int, list[Fault]]:
        found: dict[int, list[Fault]] = {}
        for fault in self.plan.of(ClockSkew, SignFlip, Scale):
            if fault.round is None:
                found.setdefault(fault.client, []).append(fault)
        return found

    def at(self, client: int, message: Message) -> Sequence[Fault]:
        """Return what strikes this request and its answer, in the order of the plan."""
        metadata = message.metadata
        asked = ASKED.get(metadata.message_type)
        if asked is None:
            return ()
        number = int(metadata.group_id) if metadata.group_id.isdecimal() else 0
        always = self._always.get(client, []) if asked == "train" else []
        return [*always, *self._by_place.get((client, number, asked), ())]


@dataclass(frozen=True, eq=False)
class FaultyJourneys:
    """The journeys of `inner` with a plan's lost and late messages; None: everybody answers."""

    inner: Journeys | None
    struck: Struck
    clients: int

    def reachable(self, now: float) -> Sequence[int]:
        """Return the indices of the clients that are connected."""
        return range(self.clients) if self.inner is None else self.inner.reachable(now)

    def answered_at(self, client: int, message: Message, now: float) -> float | None:
        """Return when the answer to a message that leaves now will be there; None: never."""
        faults = self.struck.at(client, message)
        if any(isinstance(fault, LostRequest) for fault in faults):
            return None
        at = now if self.inner is None else self.inner.answered_at(client, message, now)
        if at is None:
            return None
        return at + sum(fault.seconds for fault in faults if isinstance(fault, Late))

    def next_change(self, now: float) -> float:
        """Return when somebody connects or leaves next, above `now`; infinity: never."""
        return math.inf if self.inner is None else self.inner.next_change(now)

    def spared(self, client: int, message: Message) -> Message | None:
        """Return what `inner` says of a client that need not train."""
        return self.inner.spared(client, message) if isinstance(self.inner, Bookkeeping) else None

    def computed(self, message: Message) -> None:
        """Tell `inner`."""
        if isinstance(self.inner, Bookkeeping):
            self.inner.computed(message)

    def listening(self, clock: Callable[[], float], event: Any) -> Any:
        """Let `inner` hear what the round engine tells."""
        return self.inner.listening(clock, event) if isinstance(self.inner, Bookkeeping) else event


@dataclass(frozen=True, eq=False)
class FaultyMessages:
    """A plan's faults in requests and answers (simulations/virtual_grid.py, Tampering)."""

    struck: Struck

    def request(self, client: int, message: Message) -> list[Message]:
        """Return the request as the client gets it: not at all, once, or twice."""
        faults = self.struck.at(client, message)
        if any(isinstance(fault, LostRequest) for fault in faults):
            return []
        for fault in faults:
            if isinstance(fault, Corrupt) and fault.of == "request":
                message = self._corrupted(message, fault)
        twice = any(isinstance(fault, Duplicate) and fault.of == "request" for fault in faults)
        return [message, message] if twice else [message]

    def reply(self, client: int, reply: Message, request: Message) -> list[Message]:
        """Return the reply as the coordinator gets it: not at all, once, or twice."""
        faults = self.struck.at(client, request)
        if any(isinstance(fault, LostAnswer | Crash) for fault in faults):
            return []
        if reply.has_error():
            return [reply]
        factor = float(np.prod([factor_of(fault) for fault in faults]))
        if factor != 1.0:
            reply = around(reply, lied(reply.content, request.content, factor))
        for fault in faults:
            if isinstance(fault, ClockSkew):
                reply = _skewed(reply, fault.seconds)
        for fault in faults:
            if isinstance(fault, Corrupt) and fault.of == "answer":
                reply = self._corrupted(reply, fault)
        twice = any(isinstance(fault, Duplicate) and fault.of == "answer" for fault in faults)
        return [reply, reply] if twice else [reply]

    def _corrupted(self, message: Message, fault: Corrupt) -> Message:
        plan, text = self.struck.plan, msgspec.json.encode(fault).decode()
        return around(message, corrupted(message.content, fault, rng_of(plan.seed, text)))


def lied(content: RecordDict, request: RecordDict, factor: float) -> RecordDict:
    """Return an answer to "train" whose delta is `factor` times what it was.

    What is no delta (a refusal, the word that one is kept for a secure sum, a message that the
    coordinator will refuse) stays as it is.
    """
    if isinstance(content, Handed):
        return hand_over(content.trained, scaled(content.delta, factor))
    try:
        assignment, adapter = unpack_assignment(request)
        uplink = assignment.config.uplink
        got = unpack_trained(content, adapter.spec, assignment.part, uplink)
    except ProtocolError:
        return content
    if isinstance(got, Refused):
        return content
    trained, delta = got
    lie = scaled(delta, factor, HELD[uplink.codec])
    rng = rng_of(assignment.config.seed, "lie", trained.site, assignment.round)
    return pack_trained(trained, wire.encode(lie, codec=uplink.codec, keep=uplink.keep, rng=rng))


def corrupted(content: RecordDict, fault: Corrupt, rng: np.random.Generator) -> RecordDict:
    """Return a content with other bytes in the part that `fault` names; `content` is as it was."""
    if isinstance(content, Handed):
        content = content.written()
    records = {**content}
    frame = content.array_records.get("frame")
    if fault.part == "frame" and frame is not None:
        data = damaged(frame["frame"].data, fault.how, rng)
        array = Array(dtype="uint8", shape=(len(data),), stype=FRAME_TYPE, data=data)
        records["frame"] = ArrayRecord({"frame": array})
        return RecordDict(records)
    record = content.config_records.get("message")
    if record is None:  # no message of ours
        return content
    text = record["json"]
    assert isinstance(text, bytes)
    json = damaged(text, fault.how, rng)
    records["message"] = ConfigRecord({**record, "json": json})
    return RecordDict(records)


def damaged(data: bytes, how: str, rng: np.random.Generator) -> bytes:
    """Return data with one bit flipped, cut anywhere, or as many random bytes; never the same."""
    match how:
        case "flip":
            at, bit = divmod(int(rng.integers(8 * len(data))), 8)
            return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        case "cut":
            return data[: int(rng.integers(len(data)))]
        case _:
            garbage = rng.bytes(len(data))
            return garbage if garbage != data else garbage[::-1] + b"\0"


def _skewed(reply: Message, seconds: float) -> Message:
    """Return an answer of a client whose clock is off: when it was made, and how long it took."""
    skewed = around(reply, _timed(reply.content, seconds))
    skewed.metadata.created_at += seconds
    return skewed


def _timed(content: RecordDict, seconds: float) -> RecordDict:
    """Return the content with another training time, if it says one; never below 0."""
    if isinstance(content, Handed):
        return hand_over(_later(content.trained, seconds), content.delta)
    record = content.config_records.get("message")
    if record is None or record.get("kind") not in ("trained", KEPT):
        return content
    text = record["json"]
    assert isinstance(text, bytes)
    try:
        trained = messages.decode(text, Trained)
    except ProtocolError:  # no message of ours: the coordinator's to refuse
        return content
    json = messages.encode(_later(trained, seconds))
    return RecordDict({**content, "message": ConfigRecord({**record, "json": json})})


def _later(trained: Trained, seconds: float) -> Trained:
    return msgspec.structs.replace(trained, seconds=max(0.0, trained.seconds + seconds))
