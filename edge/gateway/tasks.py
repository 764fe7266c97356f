"""What gateway and device say about a task, and what the delta of a round must be."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import msgspec

from anabranch.edge.gateway.asking import Mechanism
from anabranch.edge.gateway.store import Row
from anabranch.protocols import wire
from anabranch.protocols.adapter import Delta
from anabranch.protocols.codecs.choose import codec_for
from anabranch.protocols.messages import Assignment, decode
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Uplink

SPARE = 1 << 16  # bytes of a frame beside its values: header and checksum
HANDED, COUNTED, REFUSED, ABORTED = "handed", "counted", "refused", "aborted"
TRAINED = "trained"  # of a secure round: the device keeps its delta for the sum


@dataclass(frozen=True)
class Retry:
    """Come back between `least` and `most` seconds from now."""

    least: int
    most: int
    reason: str


@dataclass(frozen=True)
class Offer:
    """A task and its round."""

    task: Row
    round: Row


@dataclass(frozen=True)
class Status:
    """Of one upload."""

    upload: str
    committed: int
    state: str  # OPEN, COMPLETE, NOT_WANTED
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """Of one commit."""

    accepted: bool
    reason: str = ""


@dataclass(frozen=True)
class Asked:
    """What a delta of a round must be."""

    assignment: Assignment
    spec: AdapterSpec
    mechanism: Mechanism | None

    @property
    def uplink(self) -> Uplink:
        """Return the codec."""
        return self.assignment.config.uplink

    @property
    def max_bytes(self) -> int:
        """Return the most bytes that a frame of this part and codec has."""
        chosen = codec_for(self.uplink.codec, self.uplink.keep)
        shapes = self.assignment.part.shapes(self.spec)
        ranks = 16 * len(self.assignment.part.ranks or ())
        return SPARE + ranks + sum(chosen.size(math.prod(shape)) for shape in shapes.values())

    def decode(self, frame: bytes) -> Delta:
        """Return the delta in a device's frame; raises as wire.decode_delta does."""
        return wire.decode_delta(
            frame,
            self.spec,
            self.assignment.part,
            codec=self.uplink.codec,
            keep=self.uplink.keep,
        )


def why_not(task: Row, row: Row) -> str:
    """Return why a delta of this task is not wanted."""
    if task["state"] in (REFUSED, ABORTED):
        return f"the task was {task['state']}" + (f": {task['reason']}" if task["reason"] else "")
    return "the round has ended"


def asked_of(row: Row) -> Asked:
    """Return what a delta of this round must be."""
    return _asked(bytes(row["assignment"]), bytes(row["spec"]), mechanism_of(row))


def mechanism_of(row: Row) -> Mechanism | None:
    """Return the record-level mechanism of a round, if it has one."""
    found = row["mechanism"]
    return None if found is None else msgspec.json.decode(bytes(found), type=Mechanism)


@functools.lru_cache(maxsize=8)
def _asked(assignment: bytes, spec: bytes, mechanism: Mechanism | None) -> Asked:
    return Asked(
        decode(assignment, Assignment), msgspec.json.decode(spec, type=AdapterSpec), mechanism
    )
