"""Whatever the network sends, a parser returns or raises what it declares. Past findings as well.

`python -m tests.fuzz.parsers` does the same for as long as one likes.
"""

from __future__ import annotations

import base64
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client import flower
from anabranch.protocols import messages
from anabranch.protocols.errors import ProtocolError
from anabranch.server.flower import Failure, read_described
from tests.fuzz import mutate
from tests.fuzz.parsers import PARSERS, Parser

pytestmark = [
    pytest.mark.filterwarnings("ignore:Parsed a serial number"),
    pytest.mark.filterwarnings("ignore:.*[Cc]urve"),
]
BY_NAME = {parser.name: parser for parser in PARSERS}
each = pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)


@each
def test_samples_are_valid(parser: Parser) -> None:
    """Damage to what was never taken would show nothing."""
    parser.parse(parser.samples[0])


@each
@given(data=st.binary(max_size=300))
@settings(max_examples=30)
def test_any_bytes(parser: Parser, data: bytes) -> None:
    parser.try_one(data)


@each
@given(seed=st.integers(0, 2**64))
@settings(max_examples=60)
def test_damaged_samples(parser: Parser, seed: int) -> None:
    rng = random.Random(seed)
    parser.try_one(mutate.changed(parser.samples, parser.aware, rng))


def _unknown_curve() -> bytes:
    """A public key of a curve that OpenSSL does not know: P-256's number with another beginning."""
    pem = base64.b64decode(BY_NAME["node-key"].samples[0])
    der = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
    changed = der.replace(bytes.fromhex("06082a8648ce3d0301"), bytes.fromhex("0608118648ce3d0301"))
    text = base64.encodebytes(changed)
    return base64.b64encode(
        b"-----BEGIN PUBLIC KEY-----\n%b-----END PUBLIC KEY-----\n" % text,
    )


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("node-key", _unknown_curve()),
        ("contract", b"name = " + b"9" * 5000),
        ("contract", b"a" * 20 + b" = " + b"[" * 20_000),
        ("report", b'{"round":' + b"9" * 5000 + b"}"),
        ("assignment", b'{"config":' + b"[" * 100_000),
    ],
)
def test_what_was_found_once(name: str, data: bytes) -> None:
    parser = BY_NAME.get(name) or BY_NAME[f"site-{name}"]
    with pytest.raises(parser.declared):
        parser.parse(data)


def test_no_control_character_of_a_site_reaches_a_terminal() -> None:
    refused = messages.Refused(
        site="a\x1b[2J", reason="data", message="b\x9b31m\x00" + "c" * 20_000
    )
    failure = read_described(flower.pack_refused(refused), 1)

    assert isinstance(failure, Failure)
    assert (failure.site + failure.message).isprintable()
    assert len(failure.message) == 10_000


@each
def test_damage_is_reproducible_and_changes_something(parser: Parser) -> None:
    """A finding is repeated by its seed, and a mutation that did nothing would prove nothing."""
    made, again = (
        [mutate.changed(parser.samples, parser.aware, random.Random(seed)) for seed in range(60)]
        for _ in range(2)
    )
    assert made == again
    assert len(set(made) - set(parser.samples)) > 30


def test_damaged_frames_are_read_beyond_their_checksum() -> None:
    parser = BY_NAME["delta-int8"]
    said = set()
    for seed in range(400):
        try:
            parser.parse(mutate.frame(parser.samples[0], random.Random(seed)))
        except ProtocolError as error:
            said.add(str(error).split(":")[0].split(" ")[0])
    assert "SHA-256" not in said
    assert len(said) > 4
