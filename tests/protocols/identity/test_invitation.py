"""An invitation: what is handed over is read back; nothing else is, and no error repeats it."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import MalformedMessage
from anabranch.protocols.identity.invitation import Invitation, new_secret, secret_hash

AUTHORITY = "0123456789abcdef" * 4
SECRET = "s3cret_-" * 5 + "end"
TEXT = f"anabranch:fl.example.org:8443/{AUTHORITY}/{SECRET}"

hosts = (
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}", fullmatch=True)
    | st.ip_addresses(v=4).map(str)
    | st.ip_addresses(v=6).map(lambda ip: f"[{ip}]")
)
alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"
invitations = st.builds(
    lambda host, port, digest, secret: Invitation(
        address=f"{host}:{port}", authority=digest.hex(), secret=secret
    ),
    hosts,
    st.integers(1, 65535),
    st.binary(min_size=32, max_size=32),
    st.text(alphabet, min_size=43, max_size=43),
)


@given(invitations, st.text(" \t\r\n", max_size=3))
def test_an_invitation_is_read_back(invitation: Invitation, space: str) -> None:
    again = Invitation.parse(space + invitation.text() + space)

    assert again == invitation
    assert f"[{again.host}]:{again.port}" == again.address or (
        f"{again.host}:{again.port}" == again.address
    )


@given(st.text(max_size=200) | st.from_regex(r"anabranch:.*", fullmatch=True))
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(MalformedMessage, match="expected anabranch:HOST:PORT/FINGERPRINT/SECRET"):
        Invitation.parse(text)


@given(st.data())
def test_a_damaged_invitation_never_has_its_secret_in_the_error(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(TEXT) - 1))
    damaged = TEXT[:at] + data.draw(st.text(max_size=2)) + TEXT[at + 1 :]

    try:
        found = Invitation.parse(damaged)
    except MalformedMessage as error:
        shown = f"{error!r} {error.__cause__!r}"
    else:
        shown = repr(found)  # another host, fingerprint or secret: still an invitation
    assert SECRET[:20] not in shown
    assert SECRET[-20:] not in shown


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("8443", "0"),
        TEXT.replace("8443", "65536"),
        TEXT.replace(":8443", ""),
        TEXT.replace("0123", "012", 1),
        TEXT.replace("abcdef", "ABCDEF", 1),
        TEXT + "x",
        TEXT[:-1],
        TEXT.removeprefix("anabranch:"),
        TEXT.replace("/", " /"),
        TEXT.replace("fl.example.org", "fl.example.org/x"),
        TEXT.replace("fl.example.org", "user@fl.example.org"),
        TEXT.replace("8443", "٨٤٤٣"),
        TEXT + "\n" + TEXT,
        "",
    ],
)
def test_what_is_almost_an_invitation_is_refused(text: str) -> None:
    with pytest.raises(MalformedMessage, match="in one piece"):
        Invitation.parse(text)


def test_the_parts_of_an_invitation() -> None:
    found = Invitation.parse(TEXT)
    assert (found.host, found.port, found.authority) == ("fl.example.org", 8443, AUTHORITY)
    assert found.secret == SECRET
    assert SECRET not in repr(found)
    six = Invitation.parse(TEXT.replace("fl.example.org", "[2001:db8::7]"))
    assert (six.host, six.port) == ("2001:db8::7", 8443)


def test_secrets_are_new_each_time_and_stored_as_hashes() -> None:
    one, other = new_secret(), new_secret()
    assert one != other
    assert Invitation.parse(TEXT.replace(SECRET, one)).secret == one
    assert secret_hash(one) == hashlib.sha256(one.encode()).hexdigest()
