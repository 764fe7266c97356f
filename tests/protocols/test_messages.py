import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.config import parse
from anabranch.protocols.errors import MalformedMessage
from anabranch.protocols.messages import (
    MAX_JSON,
    Assignment,
    Evaluated,
    Refused,
    Trained,
    decode,
    encode,
)
from anabranch.protocols.part import Part

CONFIG = parse(
    """
    name = "chest-clinic"
    task = { kind = "text-classification", labels = ["asthma", "other"] }
    data = { columns = { note = { type = "text" }, code = { type = "label" } } }
    model = { base = "minilm" }
    federation = { rounds = 5 }
    """,
    source="run.toml",
)

finite = st.floats(allow_nan=False, allow_infinity=False)
not_negative = st.floats(0, 1e300)
counts = st.integers(0, 2**53)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
maybe = st.none() | not_negative
MESSAGES: dict[type[msgspec.Struct], st.SearchStrategy[msgspec.Struct]] = {
    Assignment: st.builds(
        Assignment,
        run=texts,
        round=st.integers(1, 2**53),
        config=st.just(CONFIG),
        part=st.builds(
            Part,
            factors=st.sampled_from(["A", "B", "both", "none"]),
            ranks=st.none() | st.lists(st.integers(0, 9), unique=True).map(tuple),
            dense=st.booleans(),
        ),
    ),
    Trained: st.builds(
        Trained,
        site=texts,
        num_examples=counts,
        steps=counts,
        seconds=not_negative,
        loss=st.none() | finite,
        epsilon=maybe,
        delta=maybe,
        noise_multiplier=maybe,
        sample_rate=maybe,
    ),
    Evaluated: st.builds(
        Evaluated, site=texts, num_examples=counts, metrics=st.dictionaries(texts, finite)
    ),
    Refused: st.builds(
        Refused, site=texts, reason=st.sampled_from(["data", "privacy", "internal"]), message=texts
    ),
}
KINDS = list(MESSAGES)
GOOD: dict[type[msgspec.Struct], dict[str, Any]] = {
    Assignment: {"run": "r", "round": 1, "config": msgspec.to_builtins(CONFIG)},
    Trained: {"site": "north", "num_examples": 40, "steps": 10, "seconds": 1.5, "loss": 0.7},
    Evaluated: {"site": "north", "num_examples": 8, "metrics": {"accuracy": 0.75}},
    Refused: {"site": "north", "reason": "data", "message": "age: not a number: row 2"},
}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_what_is_encoded_is_decoded(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    message = data.draw(MESSAGES[kind])

    assert decode(encode(message), kind) == message


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_no_message_is_taken_for_another(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    sent = encode(data.draw(MESSAGES[kind]))

    for other in KINDS:
        if other is not kind:
            with pytest.raises(MalformedMessage, match=rf"^{other.__name__}: "):
                decode(sent, other)


@pytest.mark.parametrize("kind", KINDS)
@given(
    data=st.binary()
    | st.recursive(
        st.none() | st.booleans() | finite | texts,
        lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    ).map(lambda value: json.dumps(value).encode())
)
def test_anything_else_is_one_clear_error(kind: type[msgspec.Struct], data: bytes) -> None:
    with pytest.raises(MalformedMessage, match=rf"^{kind.__name__}: "):
        decode(data, kind)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_cut_message_is_refused(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    sent = encode(msgspec.convert(GOOD[kind], kind))
    cut = data.draw(st.integers(0, len(sent) - 1))

    with pytest.raises(MalformedMessage, match=rf"^{kind.__name__}: "):
        decode(sent[:cut], kind)


def test_an_assignment_carries_the_identity_of_its_configuration() -> None:
    arrived = decode(encode(Assignment(run="r", round=3, config=CONFIG)), Assignment)

    assert arrived.config == CONFIG
    assert arrived.config.digest() == CONFIG.digest()


REFUSED: list[tuple[type[msgspec.Struct], dict[str, Any], str]] = [
    (Assignment, {"round": 0}, r"Assignment: Expected `int` >= 1 - at `\$\.round`"),
    (Assignment, {"round": True}, r"Assignment: Expected `int`, got `bool`"),
    (Assignment, {"run": None}, r"Assignment: Expected `str`, got `null`"),
    (Assignment, {"config": {}}, r"missing required field `name` - at `\$\.config`"),
    (Assignment, {"part": {"factors": "C"}}, r"Invalid enum value 'C' - at `\$\.part\.factors`"),
    (Assignment, {"part": {"ranks": ["1"]}}, r"Expected `int`, got `str` - at `\$\.part\.ranks"),
    (Assignment, {"part": {"rank": 1}}, r"unknown field `rank` - at `\$\.part`"),
    (Assignment, {"shell": "rm"}, "Assignment: Object contains unknown field `shell`"),
    (Trained, {"num_examples": -3}, r"Expected `int` >= 0 - at `\$\.num_examples`"),
    (Trained, {"num_examples": 1.5}, r"Expected `int`, got `float` - at `\$\.num_examples`"),
    (Trained, {"seconds": -0.1}, r"Expected `float` >= 0\.0 - at `\$\.seconds`"),
    (Trained, {"epsilon": -1.0}, r"Expected `float` >= 0\.0 - at `\$\.epsilon`"),
    (Trained, {"sample_rate": -1.0}, r"Expected `float` >= 0\.0 - at `\$\.sample_rate`"),
    (Evaluated, {"metrics": {"accuracy": None}}, r"Expected `float`, got `null`"),
    (Evaluated, {"metrics": {"accuracy": "1"}}, r"Expected `float`, got `str`"),
    (Evaluated, {"metrics": [0.5]}, r"Expected `object`, got `array` - at `\$\.metrics`"),
    (Refused, {"reason": "mood"}, r"Refused: Invalid enum value 'mood' - at `\$\.reason`"),
]


@pytest.mark.parametrize(("kind", "change", "says"), REFUSED)
def test_a_wrong_field_is_refused_by_name(
    kind: type[msgspec.Struct], change: dict[str, Any], says: str
) -> None:
    assert decode(json.dumps(GOOD[kind]).encode(), kind) == msgspec.convert(GOOD[kind], kind)

    with pytest.raises(MalformedMessage, match=says):
        decode(json.dumps({**GOOD[kind], **change}).encode(), kind)


def test_an_assignment_without_a_part_means_the_whole_adapter() -> None:
    arrived = decode(json.dumps(GOOD[Assignment]).encode(), Assignment)

    assert arrived.part == WHOLE


def test_a_configuration_that_contradicts_itself_is_a_malformed_message() -> None:
    """Not a ConfigError: the peer is wrong, not a file of ours."""
    sent = encode(Assignment(run="r", round=1, config=CONFIG))
    twice = sent.replace(b'["asthma","other"]', b'["asthma","asthma"]')

    with pytest.raises(MalformedMessage, match=r"Assignment: task\.labels: every label may appear"):
        decode(twice, Assignment)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b"1e999", "Number out of range"),
        (b"NaN", "malformed"),
        (b"Infinity", "malformed"),
        (b"null", "Expected `float`, got `null`"),
    ],
)
def test_no_figure_that_arrives_is_infinite_or_no_number(value: bytes, says: str) -> None:
    data = b'{"site":"north","num_examples":1,"metrics":{"loss":%s}}' % value

    with pytest.raises(MalformedMessage, match=f"Evaluated: .*{says}"):
        decode(data, Evaluated)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_figure_that_leaves_is_infinite_or_no_number(value: float) -> None:
    """msgspec writes null, which would arrive as "not given", or not at all."""
    evaluated = Evaluated(site="north", num_examples=1, metrics={"accuracy": 1.0, "loss": value})
    trained = Trained(site="north", num_examples=1, steps=1, seconds=1.0, loss=value)

    with pytest.raises(ValueError, match=r"Evaluated\.metrics\.loss is NaN or infinite"):
        encode(evaluated)
    with pytest.raises(ValueError, match=r"Trained\.loss is NaN or infinite: leave it out"):
        encode(trained)


def test_too_long_a_message_is_refused_before_it_is_read() -> None:
    data = b" " * (MAX_JSON + 1)

    with pytest.raises(
        MalformedMessage, match=f"Refused: {MAX_JSON + 1} bytes, at most {MAX_JSON}"
    ):
        decode(data, Refused)


@pytest.mark.parametrize("data", [b"[" * 99_999, b'{"config":' * 99_999, b"\xff", b"\x00", b""])
def test_hostile_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage, match=r"^Assignment: "):
        decode(data, Assignment)
