"""The five stages of a secure sum as contents of Flower messages (client/contents.py).

Every request comes with the assignment whose deltas are summed: a site's policy decides on every
message of a run, and the site finds its delta by it.
"""

from __future__ import annotations

from typing import Any

from flwr.app import RecordDict

from anabranch.client.contents import KEPT, frame_of, kind_of, pack, unpack
from anabranch.protocols.messages import Assignment, Refused, Trained
from anabranch.protocols.secagg.member import Answer
from anabranch.protocols.secagg.messages import (
    REPLIES,
    REQUESTS,
    STAGES,
    Masked,
    Request,
    Stage,
)

STAGE_TYPES: dict[Stage, str] = {stage: f"query.{stage}" for stage in STAGES}  # Flower's


def pack_request(assignment: Assignment, request: Request) -> RecordDict:
    """Return the content of a stage of a secure sum of the deltas of `assignment`."""
    return pack(request, about=assignment)


def pack_reply(answer: Answer) -> RecordDict:
    """Return the content of the reply to a stage."""
    masked = isinstance(answer.reply, Masked)
    return pack(answer.reply, frame=answer.data if masked else None)


def unpack_request(content: RecordDict, stage: Stage) -> tuple[Assignment, Request]:
    """Return which round a stage is about, and what is asked.

    This and every other unpack raises MalformedMessage for a content that no pack makes.
    """
    request: Any = unpack(content, REQUESTS[stage])
    return unpack(content, Assignment, record="about"), request


def unpack_reply(content: RecordDict, stage: Stage) -> Answer | Refused:
    """Return the answer to a stage, or why there is none."""
    if kind_of(content) == "refused":
        return unpack(content, Refused)
    reply: Any = unpack(content, REPLIES[stage])
    return Answer(reply, frame_of(content) if stage == "mask" else b"")


def unpack_kept(content: RecordDict) -> Trained | Refused:
    """Return what a site says of the delta that it keeps for a sum, or why there is none."""
    if kind_of(content) == "refused":
        return unpack(content, Refused)
    return unpack(content, Trained, kind=KEPT)
