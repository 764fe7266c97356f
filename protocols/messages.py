"""What coordinator and client say to each other in a round, beside the adapter itself.

The adapter or delta travels as one frame (docs/wire-format.md); these structs travel as
JSON beside it. Decoders refuse unknown fields.
"""

from __future__ import annotations

import functools
from typing import Annotated, Literal, TypeVar, cast

import msgspec

from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.config import RunConfig, not_finite
from anabranch.protocols.errors import ConfigError, MalformedMessage
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Engine, Name, NotNegative

MAX_JSON = 4 << 20  # bytes
MAX_ACCUSED = 1024  # neighbours of one member of a secure sum, at most

Reason = Literal["config", "data", "model", "privacy", "policy", "protocol", "internal"]


class Assignment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Train (or evaluate) the adapter that comes with this message."""

    run: str  # identity of the run
    round: Annotated[int, msgspec.Meta(ge=1)]
    config: RunConfig
    part: Part = WHOLE  # what to train and send
    signed: Signed | None = None  # what sites with a policy approve; None: a run without sites


class Trained(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Comes back with a delta. In a private run nothing here is computed from the records
    except `num_examples`, which is listed as not covered.
    """

    site: str
    num_examples: Annotated[int, msgspec.Meta(ge=0)]
    steps: Annotated[int, msgspec.Meta(ge=0)]
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    loss: float | None = None  # mean training loss of the last epoch; None in a private run
    epsilon: NotNegative | None = None  # spent on this data set so far, all runs composed
    delta: NotNegative | None = None
    noise_multiplier: NotNegative | None = None
    sample_rate: NotNegative | None = None
    engine: Engine | None = None  # that computed the clipped gradients
    ledger: str | None = None  # head of the site's hash-chained ledger after this round (hex)


class Evaluated(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Metrics of the adapter on a site's held-out records."""

    site: str
    num_examples: Annotated[int, msgspec.Meta(ge=0)]
    metrics: dict[str, float]


class Refused(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The client did not do it, and why: a safe sentence, never a record's content."""

    site: str
    reason: Reason
    message: str
    accused: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_ACCUSED)] = ()  # see BadBoxes


M = TypeVar("M", bound=msgspec.Struct)


def encode(message: msgspec.Struct) -> bytes:
    """Return the JSON of a message; ValueError for NaN or infinity, which JSON cannot carry."""
    bad = not_finite(message)
    if bad is not None:
        raise ValueError(f"{type(message).__name__}.{bad} is NaN or infinite: leave it out")
    return msgspec.json.encode(message)


def decode(data: bytes, kind: type[M]) -> M:
    """Return the message, or raise MalformedMessage saying what is wrong with it."""
    if len(data) > MAX_JSON:
        raise MalformedMessage(f"{kind.__name__}: {len(data)} bytes, at most {MAX_JSON} allowed")
    try:
        if kind is Assignment:
            return cast(M, _assignment(data))
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, ConfigError) as error:
        raise MalformedMessage(f"{kind.__name__}: {error}") from None
    except RecursionError:
        raise MalformedMessage(f"{kind.__name__}: nested too deeply") from None


class _Raw(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An Assignment whose configuration has not been read."""

    run: str
    round: Annotated[int, msgspec.Meta(ge=1)]
    config: msgspec.Raw
    part: Part = WHOLE
    signed: Signed | None = None


def _assignment(data: bytes) -> Assignment:
    raw = msgspec.json.decode(data, type=_Raw)
    try:
        config = _config(bytes(raw.config))
    except msgspec.DecodeError:
        return msgspec.json.decode(data, type=Assignment)  # says where in the message
    return Assignment(run=raw.run, round=raw.round, config=config, part=raw.part, signed=raw.signed)


@functools.lru_cache(maxsize=4)
def _config(text: bytes) -> RunConfig:
    """Read a configuration, which is long, and the same in every round of a run."""
    return msgspec.json.decode(text, type=RunConfig)
