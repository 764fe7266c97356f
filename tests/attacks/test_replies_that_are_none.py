"""Attack: a member answers a stage with whatever it likes, to end or to stall a coordinator.

Whatever it says becomes a Failure of that member, and the sum goes on with the others.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.contents import FRAME_TYPE, RECORDS
from anabranch.client.flower import NO_LIMITS
from anabranch.client.sums.stages import pack_reply
from anabranch.client.sums.terms import vector_of
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.messages import STAGES
from anabranch.server.flower import Failure, Peer
from anabranch.server.sums.rounds import taken
from tests.client.sums.summing_sites import ASSIGNMENT, kept, terms_of

LIAR = "cork"
HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
NAMES = st.sampled_from(["aarhus", "bergen", "cork", "delft", "nobody"])
SHARE = st.binary(min_size=30, max_size=36)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "instance": st.just("ab" * 32) | HEX | JSON,
        "name": NAMES,
        "sealing": HEX | st.just("00" * 32),
        "masking": HEX | st.just("01" + "00" * 31),
        "signature": st.text("0123456789abcdef", min_size=128, max_size=128) | st.just("0" * 128),
        "commitment": HEX,
        "sealed": st.dictionaries(NAMES, st.binary(min_size=82, max_size=82)) | JSON,
        "seeds": st.dictionaries(NAMES, SHARE) | JSON,
        "keys": st.dictionaries(NAMES, st.just(b"\xff" * 33) | SHARE) | JSON,
    },
)


def content_of(kind: str, text: bytes, data: bytes | None) -> RecordDict:
    content = RecordDict({"message": ConfigRecord({"kind": kind, "json": text})})
    if data is not None:
        array = Array(dtype="uint8", shape=(len(data),), stype=FRAME_TYPE, data=data)
        content["frame"] = ArrayRecord({"frame": array})
    return content


def honest_until(stage: str) -> tuple[Aggregation, dict[str, Any]]:
    members = kept()
    invite = terms_of(members)
    aggregation = Aggregation(invite.terms, invite.roster)
    while True:
        answers = {
            name: members[name].answer(ASSIGNMENT, request, NO_LIMITS, vector_of)
            for name, request in aggregation.requests().items()
        }
        if aggregation.stage == stage:
            return aggregation, answers
        for name, got in answers.items():
            aggregation.take(name, got.reply, got.data)
        aggregation.close()


@pytest.mark.parametrize("stage", STAGES)
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([*RECORDS, "", "invite\n"]),
    fields=FIELDS | JSON,
    noise=st.binary(max_size=8),
    data=st.none() | st.binary(max_size=200),
)
def test_whatever_a_member_says_ends_no_round(
    stage: Any, kind: str, fields: Any, noise: bytes, data: bytes | None
) -> None:
    aggregation, _ = AT[stage]
    peer = Peer(name=LIAR, node=1, num_examples=10, held_out=0)
    text = msgspec.json.encode(fields) + noise

    got = taken(content_of(kind, text, data), peer, aggregation, stage)

    assert isinstance(got, Failure)
    assert LIAR in aggregation.waiting()


AT = {stage: honest_until(stage) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_an_honest_answer_is_taken_after_all_that(stage: Any) -> None:
    aggregation, answers = honest_until(stage)
    peer = Peer(name=LIAR, node=1, num_examples=10, held_out=0)
    told = pack_reply(answers[LIAR])
    assert isinstance(taken(RecordDict(), peer, aggregation, stage), Failure)
    told["more"] = MetricRecord({"a": 1})
    assert isinstance(taken(told, peer, aggregation, stage), Failure)
    del told["more"]

    assert not isinstance(taken(told, peer, aggregation, stage), Failure)


@pytest.mark.parametrize("stage", ["advertise", "share", "agree"])  # the others say nobody's name
def test_an_answer_in_anothers_name_is_none(stage: Any) -> None:
    aggregation, answers = honest_until(stage)
    peer = Peer(name=LIAR, node=1, num_examples=10, held_out=0)

    assert isinstance(taken(pack_reply(answers["aarhus"]), peer, aggregation, stage), Failure)
    assert LIAR in aggregation.waiting()
