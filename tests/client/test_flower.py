from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import msgspec
import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    MetricRecord,
    RecordDict,
)
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.flower import (
    FRAME_TYPE,
    pack_assignment,
    pack_evaluated,
    pack_refused,
    pack_trained,
    payload_bytes,
    reason_of,
    unpack_assignment,
    unpack_described,
    unpack_evaluated,
    unpack_trained,
)
from anabranch.protocols import errors, wire
from anabranch.protocols.adapter import WHOLE, Delta
from anabranch.protocols.errors import IncompatibleAdapter, MalformedMessage
from anabranch.protocols.messages import Assignment, Evaluated, Refused, Trained
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Uplink
from tests.simulations.rig import SPEC, adapter, config, rewrite, with_value

RNG = np.random.default_rng(0)
TRAINED = Trained(site="a", num_examples=9, steps=4, seconds=1.5, loss=0.25)
EVALUATED = Evaluated(site="a", num_examples=5, metrics={"accuracy": 0.5})
REFUSED = Refused(site="a", reason="data", message="records.csv: 0 rows")


def a_delta(value: float = 0.5, num_examples: int = 9) -> Delta:
    return Delta(SPEC, adapter(value).arrays, num_examples)


def assignment() -> Assignment:
    return Assignment(run="toy-1", round=3, config=config())


def trained() -> RecordDict:
    return pack_trained(TRAINED, wire.encode(a_delta()))


def unpack(content: RecordDict, spec: AdapterSpec = SPEC) -> tuple[Trained, Delta] | Refused:
    return unpack_trained(content, spec, WHOLE, Uplink())


def copy_of(content: RecordDict) -> RecordDict:
    """Return the content as it is after Flower's wire: other objects, the same values."""
    return RecordDict({name: type(r)(dict(r)) for name, r in content.items()})  # type: ignore[arg-type]


# Laws


@given(values=hnp.arrays(np.float32, (3, 5), elements=st.floats(-1e6, 1e6, width=32)))
def test_a_delta_arrives_as_it_was_sent(values: Any) -> None:
    sent = Delta(SPEC, {**a_delta().arrays, "head.weight": values}, 9)

    got = unpack(copy_of(pack_trained(TRAINED, wire.encode(sent))))

    assert not isinstance(got, Refused)
    report, delta = got
    assert report == TRAINED
    assert delta.num_examples == 9
    for name, array in sent.arrays.items():
        np.testing.assert_array_equal(delta.arrays[name], array)


@given(data=st.data())
def test_a_frame_that_was_changed_anywhere_is_refused(data: st.DataObject) -> None:
    content = trained()
    array = content.array_records["frame"]["frame"]
    frame = bytearray(array.data)
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    array.data = bytes(frame)

    with pytest.raises(errors.ProtocolError):
        unpack(content)


# Examples


def test_an_assignment_carries_config_and_adapter() -> None:
    content = copy_of(pack_assignment(assignment(), wire.encode(adapter(0.25))))

    got, sent = unpack_assignment(content)

    assert got == assignment()
    assert (sent.arrays["head.weight"] == 0.25).all()


def test_the_adapter_is_one_array_of_bytes_that_flower_does_not_interpret() -> None:
    frame = wire.encode(adapter())
    (record,) = pack_assignment(assignment(), frame).array_records.values()
    (array,) = record.values()

    assert (array.dtype, array.shape, array.stype) == ("uint8", (len(frame),), FRAME_TYPE)
    assert array.data == frame
    with pytest.raises(TypeError, match="Unsupported serialization type"):
        array.numpy()


def test_metrics_and_refusals_arrive_as_they_were_sent() -> None:
    assert unpack_evaluated(copy_of(pack_evaluated(EVALUATED))) == EVALUATED
    assert unpack_evaluated(pack_refused(REFUSED)) == REFUSED
    assert unpack(pack_refused(REFUSED)) == REFUSED
    assert unpack_described(pack_refused(REFUSED)) == REFUSED


def test_payload_bytes_are_those_of_frame_and_message() -> None:
    content = trained()
    text = content.config_records["message"]["json"]

    assert isinstance(text, bytes)
    assert payload_bytes(content) == len(wire.encode(a_delta())) + len(text)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.ConfigError("x"), "config"),
        (errors.DataError("x"), "data"),
        (errors.ModelError("x"), "model"),
        (errors.PrivacyError("x"), "privacy"),
        (errors.IncompatibleAdapter("x"), "protocol"),
        (errors.MalformedMessage("x"), "protocol"),
        (errors.RunError("x"), "internal"),
    ],
)
def test_every_error_has_a_word(error: errors.AnabranchError, reason: str) -> None:
    assert reason_of(error) == reason


# Refusals


def frame_of(content: RecordDict) -> Array:
    return content.array_records["frame"]["frame"]


def second_array(content: RecordDict) -> None:
    content.array_records["frame"]["more"] = frame_of(content)


def second_record(content: RecordDict) -> None:
    content["more"] = ConfigRecord({"x": 1})


def numpy_array(content: RecordDict) -> None:
    content["frame"] = ArrayRecord({"frame": Array(np.zeros((3, 5), np.float32))})


def set_message(**fields: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content["message"] = ConfigRecord(dict(content.config_records["message"]) | fields)

    return change


def set_frame(**fields: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        for name, value in fields.items():
            setattr(frame_of(content), name, value)

    return change


def drop(name: str) -> Callable[[RecordDict], None]:
    return lambda content: content.__delitem__(name)


def frame_as_metrics(content: RecordDict) -> None:
    del content["frame"]
    content["frame"] = MetricRecord({"x": 1})


def other_metrics(content: RecordDict) -> None:
    content.metric_records["metrics"]["num-examples"] = 10


MALFORMED: dict[str, tuple[Callable[[RecordDict], None], str]] = {
    "a type that is not ours": (
        set_frame(stype="numpy.ndarray"),
        r"frame: expected uint8, 'anabranch.frame/1', shape \(\d+,\), got .*numpy.ndarray",
    ),
    "another version": (set_frame(stype="anabranch.frame/2"), "anabranch.frame/2"),
    "another dtype": (set_frame(dtype="float32"), "frame: expected uint8.*float32"),
    "a shape that does not fit": (set_frame(shape=(7,)), r"frame: expected uint8.*\(7,\)"),
    "two dimensions": (set_frame(shape=(1, 3)), r"frame: expected uint8.*\(1, 3\)"),
    "no bytes": (set_frame(data=b"", shape=(0,)), "expected magic"),
    "half the bytes": (
        lambda c: set_frame(data=frame_of(c).data[:100], shape=(100,))(c),
        "truncated|SHA-256",
    ),
    "a numpy array": (numpy_array, "frame: expected uint8"),
    "two arrays": (second_array, "expected an ArrayRecord 'frame' with the one Array 'frame'"),
    "one record too many": (second_record, r"trained: expected records .* got .*more"),
    "no frame": (drop("frame"), r"trained: expected records \['frame', 'message', 'metrics'\]"),
    "metrics for a frame": (frame_as_metrics, "expected an ArrayRecord 'frame'"),
    "no message": (drop("message"), "expected a ConfigRecord 'message'"),
    "no metrics": (drop("metrics"), "trained: expected records"),
    "other metrics": (other_metrics, "metrics and message differ in num_examples"),
    "text for bytes": (set_message(json="{}"), "trained: expected JSON as bytes, got str"),
    "no JSON": (set_message(json=b"{"), "Trained: Input data was truncated"),
    "an unknown kind": (set_message(kind="deleted"), "expected one of .* got .*deleted"),
    "a kind that is no text": (set_message(kind=3), "expected one of .* got .*3"),
    "one field too many": (set_message(more=1), "expected a ConfigRecord 'message' with 'kind'"),
    "the wrong kind": (set_message(kind="assignment"), "assignment: expected records"),
    "an unknown message field": (lambda c: rewrite(c, x=1), "Trained: .* unknown field `x`"),
    "negative examples": (
        lambda c: rewrite(c, num_examples=-3),
        r"Trained: Expected `int` >= 0 - at `\$.num_examples`",
    ),
}


@pytest.mark.parametrize("case", sorted(MALFORMED))
def test_what_no_pack_makes_is_refused(case: str) -> None:
    change, message = MALFORMED[case]
    content = copy_of(trained())
    change(content)

    with pytest.raises(MalformedMessage, match=message):
        unpack(content)


def test_a_delta_of_another_base_or_with_nan_is_refused() -> None:
    other: AdapterSpec = msgspec.structs.replace(SPEC, base="1" * 64)
    with pytest.raises(IncompatibleAdapter, match=r"delta is of adapter \w{12}…, expected"):
        unpack(trained(), spec=other)

    content = trained()
    frame_of(content).data = with_value(frame_of(content).data, float("nan"))
    with pytest.raises(errors.ProtocolError, match="1 of 6 values are NaN or infinite"):
        unpack(content)


@pytest.mark.parametrize("codec", ["fp16", "int8", "top-k"])
def test_a_part_in_a_codec_is_read_by_those_who_agreed_on_both(codec: Any) -> None:
    part = Part(factors="B", ranks=(1,))
    arrays = part.take(SPEC, adapter(0.5).arrays)
    sent = Delta(SPEC, arrays, 9, part=part, steps=4)
    content = pack_trained(TRAINED, wire.encode(sent, codec=codec, keep=1.0, rng=RNG))

    got = unpack_trained(copy_of(content), SPEC, part, Uplink(codec=codec, keep=1.0))

    assert not isinstance(got, Refused)
    assert (got[1].part, got[1].steps) == (part, 4)
    assert set(got[1].arrays) == {"head.weight", "layer.lora_B.weight"}
    for name, array in arrays.items():
        np.testing.assert_allclose(got[1].arrays[name], array, rtol=0.01)
    for other in (WHOLE, Part(factors="B"), Part(factors="B", ranks=(0,))):
        with pytest.raises(errors.ProtocolError, match="delta is of"):
            unpack_trained(content, SPEC, other, Uplink(codec=codec, keep=1.0))
    with pytest.raises(errors.ProtocolError, match=f"delta is in {codec}"):
        unpack_trained(content, SPEC, part, Uplink())


def test_a_message_of_another_kind_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="expected 'evaluated', got 'trained'"):
        unpack_evaluated(trained())
    with pytest.raises(MalformedMessage, match="expected 'assignment', got 'evaluated'"):
        unpack_assignment(pack_evaluated(EVALUATED))
