"""Attack: members that the coordinator made up, so that all but the victim are its own.

Douceur 2002, "The Sybil Attack"; against secure sums e.g. Boenisch et al. 2023 (arXiv:2301.04017).

Why it fails: who may be a member is on the roster, which every member pins (what a site approves
names its digest). A coordinator cannot add a name, give a name another key, or one key two names.
What it can do is choose among the roster, and it may have friends there: the terms say how many
(`colluding`), and the member's own floors how many at least.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from anabranch.protocols.errors import MalformedMessage, ProtocolError
from anabranch.protocols.secagg.member import Member
from anabranch.protocols.secagg.messages import Adverts, Invite
from anabranch.protocols.secagg.terms import Peer, Roster, advertise
from tests.attacks.lying import Spy
from tests.protocols.secagg.rig import Cohort, key_of, names_of, roster_of, terms_of

NAMES = names_of(4)
ROSTER = roster_of(NAMES)


def test_made_up_members_would_open_an_update() -> None:
    """On a roster of the coordinator's choice all are its own but the victim."""
    cohort = Cohort.of(5)
    victim, *sybils = cohort.terms.members
    cohort.until("reveal")
    spy = Spy(cohort)
    spy.collude(sybils)

    found = spy.unmasked(victim)
    assert found is not None
    assert np.array_equal(found, cohort.vectors[victim])


def test_members_that_are_not_on_the_roster_are_refused() -> None:
    terms = terms_of((*NAMES, "sybil"), ROSTER)
    with pytest.raises(ProtocolError, match="terms: 'sybil' is not on the roster"):
        Member("site-0000", key_of("site-0000"), Invite(terms=terms, roster=ROSTER))


def test_a_roster_that_is_not_the_terms_own_is_refused() -> None:
    more = roster_of((*NAMES, "sybil"))
    terms = terms_of((*NAMES, "sybil"), ROSTER)
    with pytest.raises(ProtocolError, match=r"the terms name roster .* came with them"):
        Member("site-0000", key_of("site-0000"), Invite(terms=terms, roster=more))


def test_a_roster_with_another_key_for_the_member_is_refused() -> None:
    fake = Roster.of([*ROSTER.peers[1:], Peer(name="site-0000", key="ab" * 32)])
    terms = terms_of(NAMES, fake)
    with pytest.raises(ProtocolError, match="roster does not have site-0000 with its own key"):
        Member("site-0000", key_of("site-0000"), Invite(terms=terms, roster=fake))


@pytest.mark.parametrize("there", [True, False], ids=["on-the-roster", "not-on-it"])
def test_an_advert_of_somebody_who_is_not_in_the_terms_is_refused(there: bool) -> None:
    """Signed with a good key, and shown in the place of a member that fell silent."""
    cohort = Cohort.of(4)
    if there:
        roster = roster_of((*NAMES, "sybil"))
        cohort = Cohort(terms_of(NAMES, roster), roster, cohort.vectors)
    cohort.until("share", {"site-0003": "advertise"})
    request = cohort.aggregation.requests()["site-0000"]
    assert isinstance(request, Adverts)
    sybil = advertise("sybil", b"\x21" * 32, b"\x22" * 32, cohort.terms.digest, key_of("sybil"))
    shown = msgspec.structs.replace(request, adverts=(*request.adverts, sybil))

    assert cohort.ask("site-0000", shown) is None
    assert "'sybil' is not in the terms" in str(cohort.errors["site-0000"])
    with pytest.raises(ProtocolError, match="'sybil' was not asked"):
        Cohort.of(4).aggregation.take("sybil", sybil)


def test_two_names_with_one_key_are_no_roster() -> None:
    key = key_of("site-0001").public_key().public_bytes_raw().hex()
    with pytest.raises(MalformedMessage, match="roster: two names have one key"):
        Roster.of([Peer(name="a", key=key), Peer(name="b", key=key)])
    with pytest.raises(MalformedMessage, match="roster: two names have one key"):
        msgspec.json.decode(
            b'{"peers":[{"name":"a","key":"%b"},{"name":"b","key":"%b"}]}'
            % (key.encode(), key.encode()),
            type=Roster,
        )


def test_one_member_cannot_advertise_for_two_names() -> None:
    cohort = Cohort.of(4)
    advert = advertise(
        "site-0001", b"\x21" * 32, b"\x22" * 32, cohort.terms.digest, key_of("site-0001")
    )
    cohort.aggregation.take("site-0001", advert)
    copied = advertise(
        "site-0002", b"\x23" * 32, b"\x22" * 32, cohort.terms.digest, key_of("site-0002")
    )
    with pytest.raises(ProtocolError, match="a key that is in use already"):
        cohort.aggregation.take("site-0002", copied)
    with pytest.raises(ProtocolError, match="sent the advert of 'site-0001'"):
        cohort.aggregation.take("site-0003", advert)

    cohort = Cohort.of(4)  # of a coordinator that takes them all the same
    cohort.until("share")
    request = cohort.aggregation.requests()["site-0000"]
    assert isinstance(request, Adverts)
    first, _, _, last = request.adverts
    shown = msgspec.structs.replace(request, adverts=(first, advert, copied, last))
    assert cohort.ask("site-0000", shown) is None
    assert "two members have one key" in str(cohort.errors["site-0000"])
