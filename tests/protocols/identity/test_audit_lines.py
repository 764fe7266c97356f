"""Lines of an audit log: what is written is read back, and nothing else passes."""

from __future__ import annotations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.chain import GENESIS
from anabranch.protocols.errors import MalformedMessage, ProtocolError
from anabranch.protocols.identity import audit

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
TIME = "2026-03-01T12:00:00.000+00:00"
FIRST = audit.write_line(
    None,
    audit.OPENED,
    TIME,
    audit.Opening(
        format=1, log="ab" * 16, who="site a of b", key=KEY.public_key().public_bytes_raw().hex()
    ).fields(),
    KEY,
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
names = st.from_regex(r"[a-z][a-z0-9_]{0,12}", fullmatch=True).filter(lambda n: n not in audit.OWN)
fields = st.dictionaries(names, values, max_size=4)


def following(before: bytes, kind: str, **what: object) -> bytes:
    return audit.write_line(audit.read_line(before), kind, TIME, what, KEY)


@given(fields)
def test_a_line_is_read_back_as_it_was_written(what: dict[str, object]) -> None:
    entry = audit.read_line(following(FIRST, "run-approved", **what))

    assert (entry.n, entry.kind, entry.time) == (2, "run-approved", TIME)
    assert entry.fields == msgspec.json.decode(msgspec.json.encode(what))
    assert entry.previous == audit.read_line(FIRST).hash
    audit.require_next(entry, audit.read_line(FIRST))
    audit.require_signed(entry, KEY.public_key())


@given(fields, st.data())
def test_no_byte_of_a_line_can_be_changed(what: dict[str, object], data: st.DataObject) -> None:
    line = bytearray(following(FIRST, "refused", **what))
    at = data.draw(st.integers(0, len(line) - 1))
    line[at] ^= data.draw(st.integers(1, 255))

    with pytest.raises(ProtocolError):
        audit.require_signed(audit.read_line(bytes(line)), KEY.public_key())


@given(st.binary(max_size=400))
def test_what_is_no_line_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        audit.read_line(data)


@given(st.binary(max_size=60))
def test_a_body_with_the_right_hash_that_is_no_line_is_refused(body: bytes) -> None:
    digest = audit._hash(body + b"}").hex().encode()
    line = b'%b,"hash":"%b","signature":"%b"}' % (body, digest, b"0" * 128)

    with pytest.raises(MalformedMessage):
        audit.read_line(line)


def test_a_line_has_this_spelling() -> None:
    line = following(FIRST, "approved", run="r1", epsilon=1.5)
    head, _, tail = line.decode().partition(',"hash":"')

    assert head == (
        f'{{"n":2,"time":"{TIME}","kind":"approved","run":"r1","epsilon":1.5,'
        f'"previous":"{audit.read_line(FIRST).hash}"'
    )
    assert len(tail) == 64 + len('","signature":"') + 128 + len('"}')
    assert audit.read_line(FIRST).previous == GENESIS


def test_a_hash_and_a_signature_of_another_purpose_do_not_fit() -> None:
    entry = audit.read_line(FIRST)
    other = KEY.sign(bytes.fromhex(entry.hash)).hex()  # without its domain
    forged = FIRST.replace(entry.signature.encode(), other.encode())

    with pytest.raises(ProtocolError, match="not signed with this log's key"):
        audit.require_signed(audit.read_line(forged), KEY.public_key())


@pytest.mark.parametrize("kind", ["", "Upper", "two words", "a" * 65, "-x", "x\n"])
def test_a_kind_that_is_no_plain_word_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="expected a lower-case word"):
        following(FIRST, kind)


@pytest.mark.parametrize("name", [*sorted(audit.OWN - {"kind"}), "Site", "a b", ""])
def test_a_field_that_is_the_chains_own_or_no_word_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot have a field"):
        following(FIRST, "x", **{name: 1})


def test_a_value_without_a_form_in_json_is_refused() -> None:
    with pytest.raises(ValueError, match="a line of kind x"):
        following(FIRST, "x", value=object())
    with pytest.raises(ValueError, match="at most 65536"):
        following(FIRST, "x", value="y" * audit.MAX_LINE)


def test_only_the_first_line_opens_a_log() -> None:
    with pytest.raises(ValueError, match="only the first line"):
        following(FIRST, audit.OPENED)
    with pytest.raises(ValueError, match="only the first line"):
        audit.write_line(None, "x", TIME, {}, KEY)


def test_a_line_out_of_its_place_is_refused() -> None:
    first = audit.read_line(FIRST)
    second = audit.read_line(following(FIRST, "a"))
    other = audit.read_line(following(FIRST, "b"))
    third = audit.read_line(following(following(FIRST, "a"), "c"))

    audit.require_next(third, second)
    with pytest.raises(ProtocolError, match="it is line 3: lines were removed, added or moved"):
        audit.require_next(third, first)
    with pytest.raises(ProtocolError, match="does not follow the line before it"):
        audit.require_next(third, other)
    with pytest.raises(ProtocolError, match="it is line 2"):
        audit.require_next(second, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format"),
        ({"key": "zz"}, "key"),
        ({"log": "1"}, "log"),
        ({"who": 3}, "who"),
        ({"more": 1}, "more"),
        ({"lost": [{"log": "1"}]}, "lost"),
    ],
)
def test_a_first_line_of_another_form_is_refused(change: dict[str, object], message: str) -> None:
    what = dict(audit.read_line(FIRST).fields) | change
    line = audit.write_line(None, audit.OPENED, TIME, what, KEY)

    with pytest.raises(ProtocolError, match=f"does not open a log of this format.*{message}"):
        audit.opening_of(audit.read_line(line))


def test_another_line_opens_no_log() -> None:
    with pytest.raises(ProtocolError, match="it is of kind a, expected opened"):
        audit.opening_of(audit.read_line(following(FIRST, "a")))


def test_a_public_key_is_64_hex_digits() -> None:
    assert audit.public_key("00" * 32).public_bytes_raw() == bytes(32)
    for wrong in ("", "00" * 31, "00" * 32 + "\n", "AA" * 32):
        with pytest.raises(ProtocolError, match="64 hex digits"):
            audit.public_key(wrong)
