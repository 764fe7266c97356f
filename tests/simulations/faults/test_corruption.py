"""Bytes that were changed are refused; a lie is a valid message."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.flower import (
    hand_over,
    pack_assignment,
    pack_refused,
    pack_trained,
    unpack_trained,
)
from anabranch.protocols import wire
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.codecs.codec import CodecName
from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.messages import Assignment, Refused, Trained
from anabranch.protocols.tables import Uplink
from anabranch.simulations.faults.inject import (
    corrupted,
    damaged,
    lied,
)
from anabranch.simulations.faults.plan import (
    Corrupt,
)
from tests.simulations.rig import SPEC, adapter, config

TRAINED = Trained(site="toy-0", num_examples=10, steps=3, seconds=0.5, loss=0.25)
DELTA = adapter(3.0).minus(adapter(), num_examples=10, steps=3)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    how=st.sampled_from(["flip", "cut", "garbage"]),
    codec=st.sampled_from(["fp32", "fp16", "int8", "int4", "top-k"]),
    handed=st.booleans(),
)
def test_a_corrupted_frame_is_always_refused(seed: int, how: Any, codec: Any, handed: bool) -> None:
    codec = "fp32" if handed else codec
    rng = np.random.default_rng(seed)
    content = hand_over(TRAINED, DELTA) if handed else written(codec)
    fault = Corrupt(client=0, round=1, how=how)

    with pytest.raises(ProtocolError):
        unpack_trained(corrupted(content, fault, rng), SPEC, WHOLE, Uplink(codec=codec))


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32), how=st.sampled_from(["cut", "garbage"]))
def test_cut_or_random_json_is_always_refused(seed: int, how: Any) -> None:
    content = hand_over(TRAINED, DELTA)
    fault = Corrupt(client=0, round=1, part="json", how=how)

    with pytest.raises(ProtocolError):
        unpack_trained(
            corrupted(content, fault, np.random.default_rng(seed)), SPEC, WHOLE, Uplink()
        )


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32))
def test_a_flipped_bit_of_json_never_changes_the_delta_or_its_weight(seed: int) -> None:
    content = hand_over(TRAINED, DELTA)
    fault = Corrupt(client=0, round=1, part="json", how="flip")
    changed = corrupted(content, fault, np.random.default_rng(seed))

    try:
        got = unpack_trained(changed, SPEC, WHOLE, Uplink())
    except ProtocolError:
        return
    assert not isinstance(got, Refused)
    trained, delta = got
    assert trained.num_examples == delta.num_examples == 10
    assert float(delta.arrays["head.weight"][0, 0]) == 3.0


@given(data=st.binary(min_size=1, max_size=50), seed=st.integers(0, 2**32))
def test_damage_is_never_nothing(data: bytes, seed: int) -> None:
    for how in ("flip", "cut", "garbage"):
        assert damaged(data, how, np.random.default_rng(seed)) != data


@given(factor=st.floats(-1e30, 1e30).filter(bool), codec=st.sampled_from(["fp32", "fp16", "int8"]))
def test_a_lie_is_a_valid_message(factor: float, codec: Any) -> None:
    uplink = Uplink(codec=codec)

    content = lied(written(codec), request(uplink), factor)

    got = unpack_trained(content, SPEC, WHOLE, uplink)
    assert not isinstance(got, Refused)
    trained, delta = got
    assert (trained.num_examples, trained.steps) == (delta.num_examples, delta.steps) == (10, 3)
    assert (
        math.copysign(1.0, float(delta.arrays["head.weight"][0, 0])) == math.copysign(1.0, factor)
        or abs(3 * factor) < 1e-30
    )


def test_a_refusal_is_not_a_delta_to_lie_about() -> None:
    content = pack_refused(Refused(site="toy-0", reason="data", message="no records"))

    assert lied(content, content, -1.0) is content


def request(uplink: Uplink) -> RecordDict:
    """Return a request to train, in a run of this codec."""
    run = msgspec.structs.replace(config(method="ffa"), uplink=uplink)
    assignment = Assignment(run="toy-1", round=1, config=run)
    return pack_assignment(assignment, wire.encode(adapter()))


def written(codec: CodecName) -> RecordDict:
    """Return an answer whose delta is 3 in every value."""
    frame = wire.encode(DELTA, codec=codec, rng=np.random.default_rng(0))
    return pack_trained(TRAINED, frame)
