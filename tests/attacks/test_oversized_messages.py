"""Attack: messages so large that reading them takes the memory or the time of a server.

Any service that decodes before it measures (CWE-400, CWE-770).

Why it fails: bytes are counted before they are parsed, lists and boxes have lengths in their
types, and a masked vector is measured before it is looked at. What is refused changes nothing.
"""

from __future__ import annotations

import base64
import json
import tracemalloc
from typing import Any

import msgspec
import pytest

from anabranch.protocols import messages
from anabranch.protocols.errors import MalformedMessage, ProtocolError
from anabranch.protocols.secagg.messages import (
    SEALED_BYTES,
    Adverts,
    Agreement,
    Delivery,
    Invite,
    Masked,
    Reveal,
    Shares,
    Survivors,
)
from anabranch.protocols.secagg.ring import Ring
from anabranch.protocols.secagg.shamir import SHARE_BYTES
from anabranch.protocols.secagg.terms import MAX_MEMBERS, MAX_VALUES
from tests.protocols.secagg.rig import Cohort, snapshot

INSTANCE = "e0" * 32
MB = 1 << 20


def box(size: int) -> str:
    return base64.b64encode(bytes(size)).decode()


def names(count: int) -> list[str]:
    return [f"{number:05d}" for number in range(count)]


TOO_MANY: dict[type[msgspec.Struct], dict[str, Any]] = {
    Survivors: {"names": names(MAX_MEMBERS + 1)},
    Agreement: {"signatures": dict.fromkeys(names(MAX_MEMBERS + 1), "0" * 128)},
    Shares: {"commitment": INSTANCE, "sealed": dict.fromkeys(names(MAX_MEMBERS + 1), box(82))},
    Delivery: {"sealed": dict.fromkeys(names(MAX_MEMBERS + 1), box(82))},
    Reveal: {"keys": {}, "seeds": dict.fromkeys(names(MAX_MEMBERS + 1), box(33))},
}


@pytest.mark.parametrize("kind", TOO_MANY, ids=lambda kind: kind.__name__)
def test_more_entries_than_there_can_be_members_are_refused(kind: type[msgspec.Struct]) -> None:
    data = json.dumps({"instance": INSTANCE} | TOO_MANY[kind]).encode()
    assert len(data) < messages.MAX_JSON

    with pytest.raises(MalformedMessage, match=r"of length <= 10000"):
        messages.decode(data, kind)


def test_more_adverts_than_there_can_be_members_are_refused() -> None:
    advert = {"name": "a", "sealing": "0" * 64, "masking": "0" * 64, "signature": "0" * 128}
    adverts = [advert | {"name": name} for name in names(MAX_MEMBERS + 1)]
    data = json.dumps({"instance": INSTANCE, "adverts": adverts}, separators=(",", ":")).encode()
    if len(data) <= messages.MAX_JSON:
        with pytest.raises(MalformedMessage, match=r"of length <= 10000"):
            messages.decode(data, Adverts)
    with pytest.raises(msgspec.ValidationError, match=r"of length <= 10000"):
        msgspec.json.decode(data, type=Adverts)


@pytest.mark.parametrize("size", [0, 1, SEALED_BYTES - 1, SEALED_BYTES + 1, 10_000])
def test_boxes_of_another_size_are_refused(size: int) -> None:
    for kind, more in ((Delivery, {}), (Shares, {"commitment": INSTANCE})):
        data = json.dumps({"instance": INSTANCE, "sealed": {"a": box(size)}} | more).encode()
        with pytest.raises(MalformedMessage, match="length"):
            messages.decode(data, kind)


@pytest.mark.parametrize("size", [0, SHARE_BYTES - 1, SHARE_BYTES + 1, 1000])
def test_shares_of_another_size_are_refused(size: int) -> None:
    for field, other in (("seeds", "keys"), ("keys", "seeds")):
        value = {"instance": INSTANCE, field: {"a": box(size)}, other: {}}
        with pytest.raises(MalformedMessage, match="length"):
            messages.decode(json.dumps(value).encode(), Reveal)


def test_json_beyond_its_bound_is_not_parsed() -> None:
    """It would take more than 64 MB as Python objects."""
    data = b'{"instance":[' + b"{}," * (2 * MB) + b"{}]}"
    tracemalloc.start()
    with pytest.raises(MalformedMessage, match=f"{len(data)} bytes, at most {messages.MAX_JSON}"):
        messages.decode(data, Masked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < MB


@pytest.mark.parametrize("bits", [16, 24, 32, 64])
def test_a_masked_vector_of_another_size_is_refused_before_it_is_looked_at(bits: int) -> None:
    cohort = Cohort.of(3, ring=bits)
    cohort.until("mask")
    masked = Masked(instance=cohort.terms.instance)
    before = snapshot(cohort.aggregation)
    huge = bytes(64 * MB)
    good = Ring(bits).width * len(cohort.vectors["site-0000"])  # type: ignore[arg-type]
    tracemalloc.start()
    for data in (b"", huge, bytes(good - 1), bytes(good + 1), bytes(2 * good)):
        with pytest.raises(MalformedMessage, match=f"{good} bytes, got {len(data)}"):
            cohort.aggregation.take("site-0000", masked, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < MB
    assert snapshot(cohort.aggregation) == before
    cohort.run()
    cohort.require_exact()


def test_data_beside_any_other_answer_is_refused() -> None:
    cohort = Cohort.of(3)
    request = cohort.aggregation.requests()["site-0000"]
    answer = cohort.ask("site-0000", request)
    assert answer is not None
    with pytest.raises(ProtocolError, match="Advert of 'site-0000': it comes without data"):
        cohort.aggregation.take("site-0000", answer.reply, b"x")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("values", MAX_VALUES + 1),
        ("values", 0),
        ("values", 1e300),
        ("counters", 4097),
        ("members", names(MAX_MEMBERS + 1)),
        ("ring", 128),
        ("run", "x" * 201),
        ("minimum", 1),
        ("threshold", 1.5),
        ("colluding", 1.0),
        ("limit", 0),
        ("group", 1),
    ],
)
def test_terms_beyond_their_bounds_are_refused(field: str, value: object) -> None:
    cohort = Cohort.of(3)
    invite = msgspec.json.decode(msgspec.json.encode(cohort.aggregation.requests()["site-0000"]))
    invite["terms"][field] = value
    with pytest.raises(MalformedMessage, match=field):
        messages.decode(json.dumps(invite).encode(), Invite)
