"""Attack: the coordinator hands out keys of its own in the place of members' keys.

Seen in Flower's SecAgg+ (1.42.0), whose server relays unsigned public keys: it shares every mask
with every client. Bonawitz et al. 2017 (section 6.1) ask for a public-key infrastructure.

Why it fails: an advert counts if the key that the roster has for its name signed it, for exactly
these terms; and a public key of small order, with which everybody agrees on the same "secret",
is no key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.secagg import keys
from anabranch.protocols.secagg.masks import Expander
from anabranch.protocols.secagg.member import Member
from anabranch.protocols.secagg.messages import Adverts, Delivery, Shares
from anabranch.protocols.secagg.plan import Plan, length
from anabranch.protocols.secagg.shamir import combine
from anabranch.protocols.secagg.terms import Advert, advertise
from tests.attacks.test_different_models import Careless
from tests.protocols.secagg.rig import Cohort, key_of

SMALL = (  # RFC 7748 section 6.1; the points of order 1, 2, 4 and 8, and p + 0, p + 1
    bytes(32),
    b"\1" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
)


def known(purpose: bytes, name: str) -> bytes:
    """Return a private key that the coordinator makes for a name."""
    return hashlib.sha256(purpose + name.encode()).digest()


def own_keys(advert: Advert) -> Advert:
    """Return the advert with keys whose private halves the coordinator knows."""
    sealing, masking = (keys.public_of(known(use, advert.name)) for use in (b"seal", b"mask"))
    return msgspec.structs.replace(advert, sealing=sealing.hex(), masking=masking.hex())


def swapped(kind: type[Member]) -> tuple[Cohort, Adverts]:
    """Show the victim, first of three, keys of the coordinator's in the place of the others'."""
    cohort = Cohort.of(3)
    cohort.kind = kind
    cohort.until("share")
    request = cohort.aggregation.requests()["site-0000"]
    assert isinstance(request, Adverts)
    first, *others = request.adverts
    return cohort, msgspec.structs.replace(request, adverts=(first, *map(own_keys, others)))


def test_unsigned_keys_would_open_an_update() -> None:
    cohort, adverts = swapped(Careless)
    victim, *others = cohort.terms.members
    answer = cohort.ask(victim, adverts)
    assert answer is not None
    assert isinstance(answer.reply, Shares)
    plan, advert = Plan(cohort.terms, adverts.adverts), adverts.adverts[0]
    boxes, shares = {}, {}
    for index, name in enumerate(others, start=1):
        pair = known(b"seal", name), bytes.fromhex(advert.sealing), plan.context
        shares[index], _ = keys.unseal(*pair, victim, name, answer.reply.sealed[name])
        boxes[name] = keys.seal(*pair, name, victim, bytes(66))
    masked = cohort.ask(victim, Delivery(instance=cohort.terms.instance, sealed=boxes))
    assert masked is not None

    vector = plan.ring.unpack(masked.data, length(cohort.terms)).copy()
    expander = Expander(cohort.terms.keystream, plan.ring, len(vector))
    expander.subtract(keys.self_key(combine(shares), plan.context, victim), vector)
    for name in others:
        pair = known(b"mask", name), bytes.fromhex(advert.masking), plan.context
        expander.subtract(keys.mask_key(*pair, victim, name), vector)
    assert np.array_equal(vector, cohort.vectors[victim])


def test_swapped_keys_are_refused_before_anything_is_shared() -> None:
    cohort, adverts = swapped(Member)

    assert cohort.ask("site-0000", adverts) is None
    with pytest.raises(ProtocolError, match="keys of 'site-0001': not signed with its key on the"):
        raise cohort.errors["site-0000"]
    assert cohort.members["site-0000"].stage == "share"
    assert cohort.seen.shares == {}


def resigned(advert: Advert, **changes: Any) -> Advert:
    changed = msgspec.structs.replace(advert, **changes)
    signature = key_of(advert.name).sign(changed.signed_bytes("ab" * 32)).hex()
    return msgspec.structs.replace(changed, signature=signature)


FORGERIES: dict[str, Callable[[Advert, Cohort], Advert]] = {
    "sealing key alone": lambda one, _: msgspec.structs.replace(one, sealing="21" * 32),
    "masking key alone": lambda one, _: msgspec.structs.replace(one, masking="21" * 32),
    "keys exchanged": lambda one, _: msgspec.structs.replace(
        one, sealing=one.masking, masking=one.sealing
    ),
    "signed for other terms": lambda one, _: resigned(one),
    "signed by a stranger": lambda one, cohort: advertise(
        one.name, b"\x21" * 32, b"\x22" * 32, cohort.terms.digest, key_of("eve")
    ),
    "signed by another member": lambda one, cohort: advertise(
        one.name, b"\x21" * 32, b"\x22" * 32, cohort.terms.digest, key_of("site-0002")
    ),
    "empty signature": lambda one, _: msgspec.structs.replace(one, signature="0" * 128),
    "another member's, renamed": lambda one, cohort: msgspec.structs.replace(
        cohort.seen.adverts["site-0002"], name=one.name
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_adverts_are_refused_by_members_and_by_the_coordinator(forgery: str) -> None:
    cohort = Cohort.of(4)
    cohort.until("share")
    request = cohort.aggregation.requests()["site-0000"]
    assert isinstance(request, Adverts)
    first, second, *rest = request.adverts
    forged = FORGERIES[forgery](second, cohort)

    assert (
        cohort.ask("site-0000", Adverts(instance=request.instance, adverts=(first, forged, *rest)))
        is None
    )
    refused = str(cohort.errors["site-0000"])
    assert "keys of 'site-0001': not signed" in refused or "two members have one key" in refused

    other = Cohort.of(4)
    with pytest.raises(ProtocolError, match="keys of 'site-0001': not signed"):
        other.aggregation.take("site-0001", forged)
    assert "site-0001" in other.aggregation.waiting()


@pytest.mark.parametrize("point", SMALL, ids=lambda point: point.hex()[:6])
@pytest.mark.parametrize("use", ["sealing", "masking"])
def test_points_of_small_order_are_refused_by_the_coordinator_and_by_members(
    point: bytes, use: str
) -> None:
    """They are signed here by a member that helps; the others' masks with it would be known."""
    cohort = Cohort.of(3)
    pair = {"sealing": b"\x21" * 32, "masking": b"\x22" * 32} | {use: point}
    terms, key = cohort.terms, key_of("site-0001")
    advert = advertise("site-0001", pair["sealing"], pair["masking"], terms.digest, key)
    with pytest.raises(ProtocolError, match=r"key of '?site-0001'?: a point of small order"):
        cohort.aggregation.take("site-0001", advert)

    cohort.until("share")
    request = cohort.aggregation.requests()["site-0000"]
    assert isinstance(request, Adverts)
    first, _, third = request.adverts
    shown = msgspec.structs.replace(request, adverts=(first, advert, third))
    if use == "sealing":
        assert cohort.ask("site-0000", shown) is None
        assert "a point of small order" in str(cohort.errors["site-0000"])
        return
    private = b"\x07" * 32
    with pytest.raises(ProtocolError, match="a point of small order"):
        keys.mask_key(private, point, bytes(32), "site-0000", "site-0001")
