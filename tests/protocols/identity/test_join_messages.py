"""What sites and the door say: decoders refuse with one error, whatever the bytes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import MalformedMessage
from anabranch.protocols.identity import join

HEX = "ab" * 32
PEER = {"key": HEX, "proof": HEX * 2}
GOOD: dict[type[msgspec.Struct], dict[str, Any]] = {
    join.Join: {"secret": "s" * 43, "request": "PEM", "version": "0.7.0", "peer": PEER},
    join.Joined: {
        "site": "st-anna",
        "federation": "heart",
        "certificate": "PEM",
        "authority": "PEM",
        "authors": {"dr-lee": HEX},
        "version": "0.7.0",
        "app": HEX,
        "time": 1.5,
        "contract": "[task]",
    },
    join.Renew: {"request": "PEM", "peer": PEER},
    join.Renewed: {"certificate": "PEM"},
    join.Report: {
        "boot": HEX,
        "activity": "training",
        "since": 1.5,
        "run": "heart-1",
        "round": 3,
        "step": 4,
        "steps": 10,
        "message": "m",
        "reason": "",
        "ready": True,
        "checks": ["clock: 40 s off"],
        "seconds_per_round": 2.5,
        "version": "0.7.0",
    },
    join.Heard: {"time": 1.5, "renew": True},
    join.Leave: {"reason": "done"},
    join.Hello: {"federation": "heart", "version": "0.7.0", "time": 1.5},
    join.Refusal: {"code": "revoked", "message": "This site was revoked."},
}
KINDS = list(GOOD)
kinds = st.sampled_from(KINDS)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=600),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


def refused_or_read(data: bytes, kind: type[msgspec.Struct]) -> None:
    """Nothing but a message or MalformedMessage comes out."""
    try:
        found = join.decode(data, kind)
    except MalformedMessage:
        return
    assert join.decode(join.encode(found), kind) == found


@given(kinds, st.binary(max_size=300))
def test_any_bytes(kind: type[msgspec.Struct], data: bytes) -> None:
    refused_or_read(data, kind)


@given(kinds, st.data())
def test_any_value_in_any_field(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    values = dict(GOOD[kind])
    values[data.draw(st.sampled_from([*values, "another"]))] = data.draw(json_values)
    refused_or_read(msgspec.json.encode(values), kind)


@given(kinds, st.data())
def test_any_changed_bytes(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    text = bytearray(msgspec.json.encode(GOOD[kind]))
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(begin + 8, len(text))))
    text[begin:end] = data.draw(st.binary(max_size=8))
    refused_or_read(bytes(text), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_read_back(kind: type[msgspec.Struct]) -> None:
    found = msgspec.convert(GOOD[kind], kind)
    assert join.decode(join.encode(found), kind) == found


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_in_the_examples_and_no_other_is_read(kind: type[msgspec.Struct]) -> None:
    assert set(GOOD[kind]) == set(kind.__struct_fields__)
    with pytest.raises(MalformedMessage, match="unknown field `more`"):
        join.decode(msgspec.json.encode(GOOD[kind] | {"more": 1}), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b'"\xff"',
        b'{"\xff": 1}',
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b'{"more":' + b"[" * 60_000,
        b"1" * 60_000,
        b"{}{}",
    ],
)
def test_hostile_json_is_refused(kind: type[msgspec.Struct], data: bytes) -> None:
    if kind is join.Leave and data == b"{}{}":
        assert join.decode(b"{}", kind) == join.Leave()
    with pytest.raises(MalformedMessage, match=rf"\A{kind.__name__}: "):
        join.decode(data, kind)


def test_a_body_that_is_too_large_is_not_parsed() -> None:
    body = join.encode(join.Leave())
    padded = body + b" " * (join.MAX_BODY - len(body))
    assert join.decode(padded, join.Leave) == join.Leave()
    with pytest.raises(MalformedMessage, match="Leave: 65537 bytes, at most 65536 allowed"):
        join.decode(padded + b" ", join.Leave)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (join.Join, "secret", "s" * 42),
        (join.Join, "secret", "s" * 44),
        (join.Join, "request", "x" * 8193),
        (join.Join, "version", "x" * 201),
        (join.Join, "version", ""),
        (join.Joined, "site", "../x"),
        (join.Joined, "site", "a\n"),
        (join.Joined, "authors", {"dr-lee": HEX + "\n"}),
        (join.Joined, "authors", {"Dr Lee": HEX}),
        (join.Joined, "contract", "x" * 32769),
        (join.Joined, "app", HEX[:-1]),
        (join.Report, "boot", ""),
        (join.Report, "activity", "resting"),
        (join.Report, "round", -1),
        (join.Report, "reason", "x" * 501),
        (join.Report, "checks", ["x" * 501]),
        (join.Report, "seconds_per_round", -1.0),
        (join.Report, "since", None),
        (join.Report, "since", 2e11),
        (join.Report, "since", -1.0),
        (join.Report, "step", 2**53 + 1),
        (join.Report, "seconds_per_round", 1e300),
        (join.Report, "reason", "\x1b[2J"),
        (join.Report, "checks", ["disk: \x9b31m"]),
        (join.Report, "version", "0.7\x00"),
        (join.Hello, "version", "0.7\x1b"),
        (join.Hello, "time", 1e300),
        (join.Refusal, "code", "x" * 65),
    ],
)
def test_a_value_beyond_its_limit_is_refused(
    kind: type[msgspec.Struct], field: str, value: object
) -> None:
    with pytest.raises(MalformedMessage, match=field):
        join.decode(msgspec.json.encode(GOOD[kind] | {field: value}), kind)


@given(st.text(st.characters(), max_size=600), st.sampled_from([64, 200, 500]))
def test_any_text_can_be_made_plain(text: str, most: int) -> None:
    kind = join.Leave if most == 500 else join.Report
    field = "reason" if most == 500 else "run"
    clean = join.plain(text, most)

    found = join.decode(msgspec.json.encode(GOOD[kind] | {field: clean}), kind)
    assert getattr(found, field) == clean
    assert len(clean) <= most
    if text.isprintable() and len(text) <= most:
        assert clean == text


def test_times_are_finite() -> None:
    """JSON has no NaN, and a number that overflows is refused: a clock is never infinite."""
    for number in (b"NaN", b"Infinity", b"1e999", b"-1e999"):
        with pytest.raises(MalformedMessage, match="Heard: "):
            join.decode(b'{"time":' + number + b"}", join.Heard)
