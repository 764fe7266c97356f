"""Flower around a site: records in, records out. No training in this file.

What a message's content (a Flower RecordDict) holds is in contents.py. The adapter travels
packed: one frame (docs/wire-format.md) in one Array of dtype "uint8", shape [n] and serialisation
type FRAME_TYPE. Flower moves every Array as several objects, each with its own request, so that
448 tensors take ten times as long as the same bytes in one; and Flower's own tools refuse a type
that they do not know, as they should.

    coordinator → site            site → coordinator
    "query.describe"  describe    described | refused
    "train"           assignment  trained + delta | kept | refused
    "evaluate"        assignment  evaluated | refused

In a run with [secure_aggregation] a delta is kept at the site (the answer is "kept": a Trained and
nothing else), and the five stages of a secure sum follow, each with the assignment that it is about
(docs/secure-aggregation.md):

    "query.advertise" invite      advert | refused
    "query.share"     adverts     shares | refused
    "query.mask"      delivery    masked + vector | refused
    "query.agree"     survivors   agreed | refused
    "query.reveal"    agreement   reveal | refused

Whatever goes wrong comes back as `refused`. Flower would send the text of an exception to the
coordinator as it is; the text of an unforeseen one may hold a record, so only its type leaves.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Annotated

import msgspec
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from anabranch.client.contents import COUNT as COUNT
from anabranch.client.contents import FRAME_TYPE as FRAME_TYPE
from anabranch.client.contents import KEPT, frame_of, kind_of
from anabranch.client.contents import pack as _pack
from anabranch.client.contents import unpack as _unpack
from anabranch.client.site_like import NO_LIMITS as NO_LIMITS
from anabranch.client.site_like import Rostered as Rostered
from anabranch.client.site_like import SiteLike as SiteLike
from anabranch.client.site_like import SummingSite as SummingSite
from anabranch.client.sums.stages import STAGE_TYPES, pack_reply, unpack_request
from anabranch.protocols import messages, wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import (
    AnabranchError,
    BadBoxes,
    ConfigError,
    DataError,
    MalformedMessage,
    ModelError,
    PolicyError,
    PrivacyError,
    ProtocolError,
)
from anabranch.protocols.identity.proposal import Hex, Signed
from anabranch.protocols.messages import Assignment, Evaluated, Reason, Refused, Trained
from anabranch.protocols.part import Part
from anabranch.protocols.secagg.messages import STAGES, Stage
from anabranch.protocols.secagg.terms import Roster
from anabranch.protocols.spec import AdapterSpec, require_same_spec, shown
from anabranch.protocols.tables import Count, Name, Uplink

DESCRIBE = "query.describe"  # Flower's message type: a query, by name
TYPES = frozenset({"train", "evaluate", DESCRIBE, *STAGE_TYPES.values()})  # what sites are sent

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
    roster: Roster | None = None  # that the proposal names: for the owner, who approves the run


class Described(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A site that can take part, and how many records it would train and evaluate on."""

    site: Name
    num_examples: Annotated[int, msgspec.Meta(ge=0, le=wire.MAX_EXAMPLES)]
    held_out: Annotated[int, msgspec.Meta(ge=0, le=wire.MAX_EXAMPLES)]
    max_rank: Count | None = None  # highest LoRA rank it trains; None: any
    peer_key: Hex | None = None  # Ed25519, that other sites know it by in secure sums


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

    for stage in STAGES:
        app.query(stage)(_stage(site_for, stage))
    return app


def _stage(site_for: SiteFor, stage: Stage) -> Callable[[Message, Context], Message]:
    """Return what answers one stage of secure sums."""

    def secure(message: Message, context: Context) -> Message:
        return answer(
            message,
            context,
            site_for,
            lambda site, content: _secure(site, content, stage),
            f"the secure sum ({stage})",
        )

    return secure


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
        accused = error.senders if isinstance(error, BadBoxes) else ()
        refused = Refused(site=name, reason=reason_of(error), message=str(error), accused=accused)
        content = pack_refused(refused)
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
    describe = _unpack(content, Describe, decode=_describe_of)
    if describe.roster is not None and isinstance(site, Rostered):
        site.show_roster(describe.roster)
    site.admit(describe.run, describe.config, describe.signed)
    train, held_out = site.sizes(describe.config)
    return _pack(
        Described(
            site=site.name,
            num_examples=len(train),
            held_out=len(held_out),
            max_rank=site.max_rank,
            peer_key=peer_key_of(site, describe.run, describe.config),
        )
    )


def _secure(site: SiteLike, content: RecordDict, stage: Stage) -> RecordDict:
    assignment, request = unpack_request(content, stage)
    if not isinstance(site, SummingSite):
        raise ProtocolError(f"{site.name} takes part in no secure sums")
    return pack_reply(site.secure(assignment, request))


def peer_key_of(site: SiteLike, run: str, config: RunConfig) -> str | None:
    """Return a site's key in the secure sums of a run; None: the run has none, or the site."""
    if config.secure_aggregation is None or not isinstance(site, SummingSite):
        return None
    return site.peer_key(run, config)


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
    """Return the content of the reply to "train"; `frame` holds the delta; b"": it was kept."""
    if not frame:
        return _pack(trained, count=trained.num_examples, kind=KEPT)
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
    return _unpack(content, Assignment), wire.decode_adapter(frame_of(content))


def unpack_trained(
    content: RecordDict, spec: AdapterSpec, part: Part, uplink: Uplink
) -> tuple[Trained, Delta] | Refused:
    """Return what a site learned, or why it did not.

    It must be a delta of exactly `part` of `spec`, written with the codec of `uplink`.
    """
    if isinstance(content, Handed):
        return content.trained, _handed(content.delta, spec, part, uplink)
    if kind_of(content) == "refused":
        return _unpack(content, Refused)
    trained, frame = _unpack(content, Trained), frame_of(content)
    return trained, wire.decode_delta(frame, spec, part, codec=uplink.codec, keep=uplink.keep)


def unpack_evaluated(content: RecordDict) -> Evaluated | Refused:
    """Return a site's metrics, or why there are none."""
    if kind_of(content) == "refused":
        return _unpack(content, Refused)
    return _unpack(content, Evaluated)


def unpack_described(content: RecordDict) -> Described | Refused:
    """Return who the site is, or why it cannot take part."""
    if kind_of(content) == "refused":
        return _unpack(content, Refused)
    return _unpack(content, Described)


def payload_bytes(content: RecordDict) -> int:
    """Return the bytes of frame and message in a content, without Flower's own overhead."""
    if isinstance(content, Handed):
        return wire.size(content.delta) + len(msgspec.json.encode(content.trained))
    arrays = sum(len(a.data) for record in content.array_records.values() for a in record.values())
    values = (v for record in content.config_records.values() for v in record.values())
    return arrays + sum(len(v) for v in values if isinstance(v, bytes))


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
def _describe_of(text: bytes, kind: type[Describe]) -> Describe:
    """Read an invitation, which every client of a simulated population gets."""
    return messages.decode(text, kind)
