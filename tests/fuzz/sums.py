"""Messages of a secure sum, and what members and coordinator do with them first."""

from __future__ import annotations

import msgspec

from anabranch.protocols import messages
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.member import Member
from anabranch.protocols.secagg.messages import (
    Adverts,
    Agreed,
    Agreement,
    Delivery,
    Invite,
    Masked,
    Reveal,
    Shares,
    Survivors,
)
from anabranch.protocols.secagg.terms import Advert
from tests.protocols.secagg.rig import Cohort, key_of, random_of

NAME = "site-0001"


def _played() -> tuple[dict[str, msgspec.Struct], Cohort]:
    found: dict[str, msgspec.Struct] = {}
    cohort = Cohort.of(3)

    def keep(name: str, one: msgspec.Struct) -> None:
        if name == NAME:
            found[type(one).__name__] = one

    def ask(name: str, request: object) -> object:
        keep(name, request)  # type: ignore[arg-type]
        return request

    def hear(name: str, answer: object) -> object:
        keep(name, answer.reply)  # type: ignore[attr-defined]
        return answer

    cohort.asking, cohort.answering = ask, hear  # type: ignore[assignment]
    cohort.run({"site-0002": "mask"})
    return found, cohort


SAMPLES, PLAYED = _played()
KINDS = (Invite, Advert, Adverts, Shares, Delivery, Masked, Survivors, Agreed, Agreement, Reveal)
INVITE = messages.encode(SAMPLES["Invite"])
ADVERTS = messages.encode(SAMPLES["Adverts"])
ADVERT = messages.encode(SAMPLES["Advert"])


def invited(data: bytes) -> None:
    """What a member does with an invite."""
    Member(NAME, key_of(NAME), messages.decode(data, Invite), random=random_of(NAME))


def shown_adverts(data: bytes) -> None:
    """What a member does with the keys of all."""
    invite = messages.decode(INVITE, Invite)
    member = Member(NAME, key_of(NAME), invite, random=random_of(NAME))
    member.answer(messages.decode(data, Adverts))


def sent_advert(data: bytes) -> None:
    """What a coordinator does with the keys of one."""
    aggregation = Aggregation(PLAYED.terms, PLAYED.roster)
    aggregation.take(NAME, messages.decode(data, Advert))
