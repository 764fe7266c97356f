"""What sites and the coordinator's door say to each other beside Flower's calls: JSON over HTTPS.

    POST /site/join     Join → Joined      the one call without a client certificate
    POST /site/renew    Renew → Renewed    a new certificate for the same key
    POST /site/report   Report → Heard     what the site is doing, every few seconds
    POST /site/leave    Leave → Heard      the site is removed, by its own wish
    GET  /site/hello    → Hello            the coordinator's clock and version

A refusal is HTTP 4xx with {"code": word, "message": safe sentence} (Refusal). Decoders refuse
unknown fields, control characters (what a peer says is shown in terminals; lines and tabs may be),
numbers that no clock or counter has, and, unread, bodies over MAX_BODY.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from anabranch.protocols.errors import MalformedMessage
from anabranch.protocols.identity.peer import Announced
from anabranch.protocols.identity.proposal import Hex, Short
from anabranch.protocols.messages import M
from anabranch.protocols.tables import Name

JOIN, RENEW, REPORT, LEAVE, HELLO = (
    f"/site/{word}" for word in ("join", "renew", "report", "leave", "hello")
)
MAX_BODY = 64 << 10  # bytes of any of these
MAX_CONTRACT = 32 << 10  # characters of a run.toml that comes with Joined

PLAIN = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*\Z"
Text = Annotated[str, msgspec.Meta(max_length=500, pattern=PLAIN)]
Word = Annotated[str, msgspec.Meta(max_length=200, pattern=PLAIN)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Time = Annotated[float, msgspec.Meta(ge=0, le=1e11)]  # seconds since 1970, UTC; to the year 5138
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Pem = Annotated[str, msgspec.Meta(max_length=8192)]

Activity = Literal[
    "starting",  # not ready for messages yet
    "idle",  # nothing to do
    "receiving",  # a message's adapter is on its way here
    "waiting",  # for the owner: a run is to be approved; or for the hours of the policy
    "preparing",  # records are read and encoded, the base model is loaded
    "training",  # `step` of `steps`
    "evaluating",
    "uploading",  # the answer is on its way
    "paused",  # by its owner
]


class Join(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Take me in: the secret of the invitation, and a request for a certificate of my key."""

    secret: Annotated[str, msgspec.Meta(min_length=43, max_length=43)]
    request: Pem  # PKCS #10; its key is also the key of Flower's node
    version: Short  # of anabranch
    peer: Announced | None = None  # the key that other sites know this one by; None: it has none


class Joined(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """You are in."""

    site: Name  # the name that the coordinator's operator gave
    federation: Name
    certificate: Pem
    authority: Pem
    authors: dict[Name, Hex]  # who may propose runs: name -> Ed25519 public key
    version: Short  # of anabranch at the coordinator
    app: Hex  # hash of the Flower app that messages will name
    time: Time
    contract: Annotated[str, msgspec.Meta(max_length=MAX_CONTRACT)] = ""  # a run.toml; "": none yet


class Renew(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request for a new certificate of the key that the connection proves."""

    request: Pem
    peer: Announced | None = None  # as in Join: how a site that had none announces one


class Renewed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The new certificate."""

    certificate: Pem


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the site is doing now. Nothing here is computed from the contents of records."""

    boot: Hex  # random, new at each start: what an earlier process held is lost
    activity: Activity
    since: Time
    run: Word = ""
    round: Number = 0
    step: Number = 0
    steps: Number = 0
    message: Word = ""  # Flower's id of the message in work
    reason: Text = ""  # why it waits: a safe sentence
    ready: bool = False  # every preflight check passed
    checks: tuple[Text, ...] = ()  # those that did not, a sentence each
    seconds_per_round: Seconds | None = None  # estimate of the preflight
    version: Word = ""


class Heard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Taken note of."""

    time: Time
    renew: bool = False  # a new certificate is to be asked for now


class Leave(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Remove me."""

    reason: Text = ""


class Hello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who answers here."""

    federation: Name
    version: Short
    time: Time


class Refusal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """No, and why. `code` is for programs, `message` for people."""

    code: Annotated[str, msgspec.Meta(max_length=64, pattern=PLAIN)]
    message: Text


def plain(text: str, most: int = 500) -> str:
    """Return text as these messages may carry it: no control characters, at most `most` long."""
    clean = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def encode(message: msgspec.Struct) -> bytes:
    """Return the JSON of one of these."""
    return msgspec.json.encode(message)


def decode(data: bytes, kind: type[M]) -> M:
    """Return the message, or raise MalformedMessage saying what is wrong with it."""
    if len(data) > MAX_BODY:
        raise MalformedMessage(f"{kind.__name__}: {len(data)} bytes, at most {MAX_BODY} allowed")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"{kind.__name__}: {error}") from None
    except RecursionError:
        raise MalformedMessage(f"{kind.__name__}: nested too deeply") from None
