"""Flower around a site: records in, records out. No training in this file.

A message's content (a Flower RecordDict) holds

    "message"  ConfigRecord {"kind": str, "json": bytes}      always; protocols/messages.py
    "frame"    ArrayRecord  {"frame": Array}                  with an adapter or a delta
    "metrics"  MetricRecord {"num-examples": int}             trained, evaluated: for Flower's logs

The adapter travels packed: one frame (docs/wire-format.md) in one Array of dtype "uint8",
shape [n] and serialisation type FRAME_TYPE. Flower moves every Array as several objects, each
with its own request, so that 448 tensors take ten times as long as the same bytes in one;
and Flower's own tools refuse a type that they do not know, as they should.

    coordinator → site            site → coordinator
    "query.describe"  describe    described | refused
    "train"           assignment  trained + delta | refused
    "evaluate"        assignment  evaluated | refused

Whatever goes wrong comes back as `refused`. Flower would send the text of an exception to the
coordinator as it is; the text of an unforeseen one may hold a record, so only its type leaves.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sized
from typing import Annotated, Protocol, cast

import msgspec
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from anabranch.protocols import messages, wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import (
    AnabranchError,
    ConfigError,
    DataError,
    MalformedMessage,
    ModelError,
    PolicyError,
    PrivacyError,
    ProtocolError,
)
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.messages import Assignment, Evaluated, Reason, Refused, Trained
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec, require_same_spec, shown
from anabranch.protocols.tables import Count, Name, Uplink

FRAME_TYPE = "anabranch.frame/1"
DESCRIBE = "query.describe"  # Flower's message type: a query, by name
COUNT = "num-examples"  # the key that Flower's own strategies and logs look for

REASONS: dict[type[AnabranchError], Reason] = {
    ConfigError: "config",
    DataError: "data",
    ModelError: "model",
    PrivacyError: "privacy",
    PolicyError: "policy",
    ProtocolError: "protocol",
}

log = logging.getLogger(__name__)


class Describe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who are you, and do your records keep this run's contract?"""

    run: str
    config: RunConfig
    signed: Signed | None = None


class Described(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A site that can take part, and how many records it would train and evaluate on."""

    site: Name
    num_examples: Annotated[int, msgspec.Meta(ge=0, le=wire.MAX_EXAMPLES)]
    held_out: Annotated[int, msgspec.Meta(ge=0, le=wire.MAX_EXAMPLES)]
    max_rank: Count | None = None  # highest LoRA rank it trains; None: any


class SiteLike(Protocol):
    """What a site must offer to be reached through Flower."""

    @property
    def name(self) -> str:
        """Its name in this run."""

    @property
    def max_rank(self) -> int | None:
        """The highest LoRA rank it trains; None: any."""

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        """Raise PolicyError if this run may not ask anything here; called before `sizes`."""

    def sizes(self, config: RunConfig) -> tuple[Sized, Sized]:
        """Return (training, held-out) records to be counted, or raise DataError."""

    def train(self, assignment: Assignment, adapter: Adapter) -> tuple[Trained, bytes]:
        """Return what it learned from `adapter`, the delta as one frame."""

    def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
        """Return metrics of `adapter` on held-out records."""


SiteFor = Callable[[Context], SiteLike]
Work = Callable[[SiteLike, RecordDict], RecordDict]


def client_app(site_for: SiteFor) -> ClientApp:
    """Return the ClientApp of the site that `site_for` finds for a Flower context."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, site_for, _train, "training")

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, site_for, _evaluate, "evaluation")

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return answer(message, context, site_for, _describe, "the data check")

    return app


def answer(message: Message, context: Context, site_for: SiteFor, work: Work, what: str) -> Message:
    """Return what `work` says, or a refusal; the text of an unforeseen error stays here.

    The one boundary of a site: whatever fails becomes a reply with a reason.
    """
    name = f"node-{context.node_id}"
    try:
        site = site_for(context)
        name = site.name
        content = work(site, message.content)
    except AnabranchError as error:
        if not isinstance(error, PolicyError):  # it has been told by the policy (client/policy)
            log.warning("%s refuses %s: %s", name, what, error)
        content = pack_refused(Refused(site=name, reason=reason_of(error), message=str(error)))
    except Exception as error:  # the boundary: Flower would send its text
        log.exception("%s failed in %s", name, what)
        text = f"{type(error).__name__} in {what}: see the site's log"
        content = pack_refused(Refused(site=name, reason="internal", message=text))
    return Message(content, reply_to=message)


def reason_of(error: AnabranchError) -> Reason:
    """Return the word for an error in a Refused."""
    return next((word for kind, word in REASONS.items() if isinstance(error, kind)), "internal")


def _train(site: SiteLike, content: RecordDict) -> RecordDict:
    return pack_trained(*site.train(*unpack_assignment(content)))


def _evaluate(site: SiteLike, content: RecordDict) -> RecordDict:
    return pack_evaluated(site.evaluate(*unpack_assignment(content)))


def _describe(site: SiteLike, content: RecordDict) -> RecordDict:
    describe = _unpack(content, Describe)
    site.admit(describe.run, describe.config, describe.signed)
    train, held_out = site.sizes(describe.config)
    return _pack(
        Described(
            site=site.name,
            num_examples=len(train),
            held_out=len(held_out),
            max_rank=site.max_rank,
        )
    )


def pack_describe(describe: Describe) -> RecordDict:
    """Return the content of a "query.describe" message."""
    return _pack(describe)


def pack_assignment(assignment: Assignment, frame: bytes) -> RecordDict:
    """Return the content of a "train" or "evaluate" message; `frame` holds the adapter."""
    return _pack(assignment, frame=frame)


class Handed(RecordDict):
    """The content of a reply to "train" as objects, not as bytes: it has no records.

    For a site that is simulated in the coordinator's own process. The bytes would say the same,
    in full precision, and are counted as if they had been sent; `written` makes them. Nothing
    that Flower decodes from a network is ever of this type.
    """

    trained: Trained
    delta: Delta

    def written(self) -> RecordDict:
        """Return the same content as it would travel."""
        return pack_trained(self.trained, wire.encode(self.delta))


def pack_trained(trained: Trained, frame: bytes) -> RecordDict:
    """Return the content of the reply to "train"; `frame` holds the delta."""
    return _pack(trained, frame=frame, count=trained.num_examples)


def hand_over(trained: Trained, delta: Delta) -> Handed:
    """Return the content of the reply to "train" for a coordinator in this process."""
    content = Handed()
    content.trained, content.delta = trained, delta
    return content


def pack_evaluated(evaluated: Evaluated) -> RecordDict:
    """Return the content of the reply to "evaluate"."""
    return _pack(evaluated, count=evaluated.num_examples)


def pack_refused(refused: Refused) -> RecordDict:
    """Return the content of any reply that says no."""
    return _pack(refused)


def unpack_assignment(content: RecordDict) -> tuple[Assignment, Adapter]:
    """Return the assignment and its adapter, neither to be changed.

    This and every other unpack raises MalformedMessage for a content that no pack makes, and
    IncompatibleAdapter for a frame with another spec or with values that are not finite.
    """
    return _unpack(content, Assignment), wire.decode_adapter(_frame(content))


def unpack_trained(
    content: RecordDict, spec: AdapterSpec, part: Part, uplink: Uplink
) -> tuple[Trained, Delta] | Refused:
    """Return what a site learned, or why it did not.

    It must be a delta of exactly `part` of `spec`, written with the codec of `uplink`.
    """
    if isinstance(content, Handed):
        return content.trained, _handed(content.delta, spec, part, uplink)
    if _kind(content) == "refused":
        return _unpack(content, Refused)
    trained, frame = _unpack(content, Trained), _frame(content)
    return trained, wire.decode_delta(frame, spec, part, codec=uplink.codec, keep=uplink.keep)


def unpack_evaluated(content: RecordDict) -> Evaluated | Refused:
    """Return a site's metrics, or why there are none."""
    if _kind(content) == "refused":
        return _unpack(content, Refused)
    return _unpack(content, Evaluated)


def unpack_described(content: RecordDict) -> Described | Refused:
    """Return who the site is, or why it cannot take part."""
    if _kind(content) == "refused":
        return _unpack(content, Refused)
    return _unpack(content, Described)


def payload_bytes(content: RecordDict) -> int:
    """Return the bytes of frame and message in a content, without Flower's own overhead."""
    if isinstance(content, Handed):
        return wire.size(content.delta) + len(msgspec.json.encode(content.trained))
    arrays = sum(len(a.data) for record in content.array_records.values() for a in record.values())
    values = (v for record in content.config_records.values() for v in record.values())
    return arrays + sum(len(v) for v in values if isinstance(v, bytes))


def _pack(
    message: msgspec.Struct, *, frame: bytes | None = None, count: int | None = None
) -> RecordDict:
    text = messages.encode(message)
    kind = type(message).__name__.lower()
    content = RecordDict({"message": ConfigRecord({"kind": kind, "json": text})})
    if frame is not None:
        array = Array(dtype="uint8", shape=(len(frame),), stype=FRAME_TYPE, data=frame)
        content["frame"] = ArrayRecord({"frame": array})
    if count is not None:
        content["metrics"] = MetricRecord({COUNT: count})
    return content


# kind -> the records that come with it
RECORDS: dict[str, set[str]] = {
    "describe": {"message"},
    "described": {"message"},
    "assignment": {"message", "frame"},
    "trained": {"message", "frame", "metrics"},
    "evaluated": {"message", "metrics"},
    "refused": {"message"},
}


def _kind(content: RecordDict) -> str:
    """Return the kind of a content that has exactly the records of that kind."""
    record = content.get("message")
    if not isinstance(record, ConfigRecord) or set(record) != {"kind", "json"}:
        raise MalformedMessage("expected a ConfigRecord 'message' with 'kind' and 'json'")
    kind = record["kind"]
    if not isinstance(kind, str) or kind not in RECORDS:
        raise MalformedMessage(f"expected one of {sorted(RECORDS)}, got {shown(repr(kind))}")
    if set(content) != RECORDS[kind]:
        raise MalformedMessage(
            f"{kind}: expected records {sorted(RECORDS[kind])}, got {shown(repr(sorted(content)))}"
        )
    return kind


def _unpack(content: RecordDict, expected: type[messages.M]) -> messages.M:
    """Return the message, which must be of type `expected`, in a content of its kind."""
    kind, wanted = _kind(content), expected.__name__.lower()
    if kind != wanted:
        raise MalformedMessage(f"expected {wanted!r}, got {kind!r}")
    text = content["message"]["json"]
    if not isinstance(text, bytes):
        raise MalformedMessage(f"{kind}: expected JSON as bytes, got {type(text).__name__}")
    message: messages.M
    if expected is Describe:
        message = cast(messages.M, _describe_of(text))
    else:
        message = messages.decode(text, expected)
    if "metrics" in content:
        metrics = content["metrics"]
        if not isinstance(metrics, MetricRecord) or dict(metrics) != {
            COUNT: getattr(message, "num_examples", None)
        }:
            raise MalformedMessage(f"{kind}: metrics and message differ in num_examples")
    return message


def _handed(delta: Delta, spec: AdapterSpec, part: Part, uplink: Uplink) -> Delta:
    """Return a delta that was handed over, if its frame would be taken."""
    require_same_spec(spec, delta.spec)
    if delta.part != part or uplink.codec != "fp32":
        raise MalformedMessage(
            f"handed over: expected {shown(str(part), 120)} in {uplink.codec}, got "
            f"{shown(str(delta.part), 120)} in fp32"
        )
    return delta


@functools.lru_cache(maxsize=2)
def _describe_of(text: bytes) -> Describe:
    """Read an invitation, which every client of a simulated population gets."""
    return messages.decode(text, Describe)


def _frame(content: RecordDict) -> bytes:
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
