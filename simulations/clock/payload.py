"""How many bytes a request to a device has, and its answer, before there is one.

What is counted is what the coordinator counts: frames (docs/wire-format.md) and the JSON beside
them, without Flower's own overhead. The frame of a delta has the size that its part and codec
give it, whatever its values.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from flwr.app import RecordDict

from anabranch.client.flower import payload_bytes, unpack_assignment
from anabranch.protocols import wire
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Uplink

REPORT_BYTES: Final = 256  # of the JSON beside a delta, and of metrics
KEPT: Final = 64  # contents whose sizes are known: a round has one per part


class Payloads:
    """Sizes of the messages of one run, each content read once."""

    def __init__(self, uplink: Uplink) -> None:
        self._uplink = uplink
        # By identity: the content is held, so that no other one gets its id.
        self._known: dict[tuple[int, bool], tuple[RecordDict, int, int]] = {}
        self._frames: dict[tuple[str, Part], int] = {}

    def of(self, content: RecordDict, *, trains: bool) -> tuple[int, int]:
        """Return the bytes of a request and of its answer.

        The answer of another ServerApp's client is taken to be as large as the request.
        """
        key = id(content), trains
        if key not in self._known:
            if len(self._known) >= KEPT:
                self._known.clear()
            down = payload_bytes(content)
            up = self._answer(content, down) if trains else REPORT_BYTES
            self._known[key] = content, down, up
        return self._known[key][1:]

    def _answer(self, content: RecordDict, down: int) -> int:
        try:
            assignment, adapter = unpack_assignment(content)
        except ProtocolError:
            return down
        key = adapter.spec.digest(), assignment.part
        if key not in self._frames:
            self._frames[key] = frame_bytes(adapter.spec, assignment.part, self._uplink)
        return REPORT_BYTES + self._frames[key]


def frame_bytes(spec: AdapterSpec, part: Part, uplink: Uplink) -> int:
    """Return the bytes of the frame of a delta of `part` in the run's codec.

    To a few bytes: the header holds the numbers of records and steps, in digits.
    """
    arrays = {name: np.zeros(shape, np.float32) for name, shape in part.shapes(spec).items()}
    delta = Delta(spec, arrays, num_examples=100, part=part, steps=10)
    rng = np.random.default_rng(0)
    return len(wire.encode(delta, codec=uplink.codec, keep=uplink.keep, rng=rng))
