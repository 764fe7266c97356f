"""What sites and the coordinator's door say to each other beside Flower's calls: JSON over HTTPS.

    POST /site/join     Join → Joined      the one call without a client certificate
    POST /site/renew    Renew → Renewed    a new certificate for the same key
    POST /site/report   Report → Heard     what the site is doing, every few seconds
    POST /site/leave    Leave → Heard      the site is removed, by its own wish
    GET  /site/hello    → Hello            the coordinator's clock and version

A refusal is HTTP 4xx with {"code": word, "message": safe sentence} (Refusal). Decoders refuse
unknown fields, and bodies over MAX_BODY are refused unread.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from anabranch.protocols.errors import MalformedMessage
from anabranch.protocols.identity.proposal import Hex, Short
from anabranch.protocols.messages import M
from anabranch.protocols.tables import Name, NotNegative

JOIN, RENEW, REPORT, LEAVE, HELLO = (
    f"/site/{word}" for word in ("join", "renew", "report", "leave", "hello")
)
MAX_BODY = 64 << 10  # bytes of any of these
MAX_CONTRACT = 32 << 10  # characters of a run.toml that comes with Joined

Text = Annotated[str, msgspec.Meta(max_length=500)]
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


class Joined(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """You are in."""

    site: Name  # the name that the coordinator's operator gave
    federation: Name
    certificate: Pem
    authority: Pem
    authors: dict[Name, Hex]  # who may propose runs: name -> Ed25519 public key
    version: Short  # of anabranch at the coordinator
    app: Hex  # hash of the Flower app that messages will name
    time: float  # seconds since 1970, UTC
    contract: Annotated[str, msgspec.Meta(max_length=MAX_CONTRACT)] = ""  # a run.toml; "": none yet


class Renew(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request for a new certificate of the key that the connection proves."""

    request: Pem


class Renewed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The new certificate."""

    certificate: Pem


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the site is doing now. Nothing here is computed from the contents of records."""

    boot: Hex  # random, new at each start: what an earlier process held is lost
    activity: Activity
    since: float  # seconds since 1970, UTC
    run: Annotated[str, msgspec.Meta(max_length=200)] = ""
    round: Annotated[int, msgspec.Meta(ge=0)] = 0
    step: Annotated[int, msgspec.Meta(ge=0)] = 0
    steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    message: Annotated[str, msgspec.Meta(max_length=200)] = ""  # Flower's id of the message in work
    reason: Text = ""  # why it waits: a safe sentence
    ready: bool = False  # every preflight check passed
    checks: tuple[Text, ...] = ()  # those that did not, a sentence each
    seconds_per_round: NotNegative | None = None  # estimate of the preflight
    version: Annotated[str, msgspec.Meta(max_length=200)] = ""


class Heard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Taken note of."""

    time: float  # seconds since 1970, UTC
    renew: bool = False  # a new certificate is to be asked for now


class Leave(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Remove me."""

    reason: Text = ""


class Hello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who answers here."""

    federation: Name
    version: Short
    time: float


class Refusal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """No, and why. `code` is for programs, `message` for people."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    message: Text


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
