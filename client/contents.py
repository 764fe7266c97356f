"""Contents of Flower messages (RecordDict): which records each kind has, and none else.

    "message"  ConfigRecord {"kind": str, "json": bytes}      always
    "about"    ConfigRecord {"kind": str, "json": bytes}      of a stage of a secure sum: its round
    "frame"    ArrayRecord  {"frame": Array}                  an adapter, a delta, a masked vector
    "metrics"  MetricRecord {"num-examples": int}             for Flower's logs

The kind is the name of the message's struct in lower case; "kept" is a Trained whose delta stayed
at the site for a secure sum. client/flower.py says which message is answered with which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import msgspec
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from anabranch.protocols import messages
from anabranch.protocols.errors import MalformedMessage
from anabranch.protocols.spec import shown

FRAME_TYPE = "anabranch.frame/1"
COUNT = "num-examples"  # the key that Flower's own strategies and logs look for
KEPT = "kept"  # the kind of a Trained without a delta

M = TypeVar("M", bound=msgspec.Struct)

# kind -> the records that come with it
RECORDS: dict[str, set[str]] = {
    "describe": {"message"},
    "described": {"message"},
    "assignment": {"message", "frame"},
    "trained": {"message", "frame", "metrics"},
    KEPT: {"message", "metrics"},
    "evaluated": {"message", "metrics"},
    "refused": {"message"},
    # a secure sum (protocols/secagg/messages.py): requests, then answers
    "invite": {"message", "about"},
    "adverts": {"message", "about"},
    "delivery": {"message", "about"},
    "survivors": {"message", "about"},
    "agreement": {"message", "about"},
    "advert": {"message"},
    "shares": {"message"},
    "masked": {"message", "frame"},
    "agreed": {"message"},
    "reveal": {"message"},
}


def pack(
    message: msgspec.Struct,
    *,
    frame: bytes | None = None,
    count: int | None = None,
    about: msgspec.Struct | None = None,
    kind: str | None = None,
) -> RecordDict:
    """Return the content of a message; `kind` None: the name of its struct."""
    content = RecordDict({"message": _record(message, kind)})
    if about is not None:
        content["about"] = _record(about)
    if frame is not None:
        array = Array(dtype="uint8", shape=(len(frame),), stype=FRAME_TYPE, data=frame)
        content["frame"] = ArrayRecord({"frame": array})
    if count is not None:
        content["metrics"] = MetricRecord({COUNT: count})
    return content


def kind_of(content: RecordDict) -> str:
    """Return the kind of a content that has exactly the records of that kind."""
    kind, _ = _read(content, "message")
    if kind not in RECORDS:
        raise MalformedMessage(f"expected one of {sorted(RECORDS)}, got {shown(repr(kind))}")
    if set(content) != RECORDS[kind]:
        raise MalformedMessage(
            f"{kind}: expected records {sorted(RECORDS[kind])}, got {shown(repr(sorted(content)))}"
        )
    return kind


def unpack(
    content: RecordDict,
    expected: type[M],
    *,
    kind: str | None = None,
    record: str = "message",
    decode: Callable[[bytes, type[M]], M] = messages.decode,
) -> M:
    """Return the message, which must be of type `expected`, in a content of its kind.

    `kind` None: the name of its struct. `record` is where it is.
    """
    wanted = kind or expected.__name__.lower()
    kind_of(content)
    got, text = _read(content, record)
    if got != wanted:
        raise MalformedMessage(f"expected {wanted!r}, got {got!r}")
    if not isinstance(text, bytes):
        raise MalformedMessage(f"{got}: expected JSON as bytes, got {type(text).__name__}")
    message = decode(text, expected)
    if record == "message" and "metrics" in content:
        metrics = content["metrics"]
        if not isinstance(metrics, MetricRecord) or dict(metrics) != {
            COUNT: getattr(message, "num_examples", None)
        }:
            raise MalformedMessage(f"{got}: metrics and message differ in num_examples")
    return message


def frame_of(content: RecordDict) -> bytes:
    """Return the bytes of the one frame."""
    record = content.get("frame")
    if not isinstance(record, ArrayRecord) or set(record) != {"frame"}:
        raise MalformedMessage("expected an ArrayRecord 'frame' with the one Array 'frame'")
    array = record["frame"]
    got = (array.dtype, array.stype, tuple(array.shape))
    if got != ("uint8", FRAME_TYPE, (len(array.data),)):
        raise MalformedMessage(
            f"frame: expected uint8, {FRAME_TYPE!r}, shape ({len(array.data)},), "
            f"got {shown(repr(got), 200)}"
        )
    return array.data


def _record(message: msgspec.Struct, kind: str | None = None) -> ConfigRecord:
    text = messages.encode(message)
    return ConfigRecord({"kind": kind or type(message).__name__.lower(), "json": text})


def _read(content: RecordDict, name: str) -> tuple[str, object]:
    record = content.get(name)
    if not isinstance(record, ConfigRecord) or set(record) != {"kind", "json"}:
        raise MalformedMessage(f"expected a ConfigRecord {name!r} with 'kind' and 'json'")
    kind = record["kind"]
    if not isinstance(kind, str):
        raise MalformedMessage(f"expected one of {sorted(RECORDS)}, got {shown(repr(kind))}")
    return kind, cast(object, record["json"])
