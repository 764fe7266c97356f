"""Parts, frames and messages of a round's sites."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from anabranch.client.flower import payload_bytes, unpack_assignment
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.aggregation.choose import rule_for
from anabranch.server.assigning import Assigner
from anabranch.server.flower import Peer
from tests.simulations.federation import Federation
from tests.simulations.rig import SPEC, ToySite, adapter, config

PEERS = {
    "low": Peer("low", 1, 10, 0, max_rank=1),
    "any": Peer("any", 2, 10, 0),
    "high": Peer("high", 3, 10, 0, max_rank=9),
}


def assigner(*, truncates: bool = False) -> Assigner:
    run = config()
    rule = dataclasses.replace(rule_for(run), truncates=truncates)
    return Assigner(rule=rule, config=run, run="toy-1")


def test_a_site_of_a_low_rank_is_assigned_the_ranks_it_can_train() -> None:
    one = assigner()
    question = one.question(1, SPEC)
    contents = one.put(question, adapter(1.0), PEERS)

    assert question.parts == {"low": Part(ranks=(0,)), "any": WHOLE, "high": WHOLE}
    assignment, whole = unpack_assignment(contents["low"])
    assert assignment.part == Part(ranks=(0,))
    np.testing.assert_array_equal(whole.arrays["layer.lora_B.weight"], np.ones((3, 2)))


def test_equal_parts_share_one_message_and_all_share_one_frame() -> None:
    one = assigner()
    contents = one.put(one.question(1, SPEC), adapter(), PEERS)

    assert contents["any"] is contents["high"]
    frames = [c.array_records["frame"]["frame"].data for c in contents.values()]
    assert frames[0] is frames[1] is frames[2]


def test_a_rule_that_cuts_sends_a_site_its_ranks_alone_in_fewer_bytes() -> None:
    one = assigner(truncates=True)
    contents = one.put(one.question(1, SPEC), adapter(1.0), PEERS)

    _, cut = unpack_assignment(contents["low"])
    np.testing.assert_array_equal(cut.arrays["layer.lora_B.weight"], [[1, 0]] * 3)
    np.testing.assert_array_equal(cut.arrays["layer.lora_A.weight"], [[1] * 4, [0] * 4])
    np.testing.assert_array_equal(cut.arrays["head.weight"], np.ones((3, 5)))
    _, whole = unpack_assignment(contents["any"])
    np.testing.assert_array_equal(whole.arrays["layer.lora_B.weight"], np.ones((3, 2)))
    sizes = [len(contents[name].array_records["frame"]["frame"].data) for name in ("low", "any")]
    assert sizes[0] < sizes[1]
    assert payload_bytes(contents["low"]) > sizes[0]


def test_metrics_are_asked_of_the_whole_adapter() -> None:
    assignment, sent = unpack_assignment(assigner().evaluation(3, adapter(2.0)))

    assert (assignment.round, assignment.part) == (3, WHOLE)
    np.testing.assert_array_equal(sent.arrays["head.weight"], np.full((3, 5), 2.0))


def test_a_site_that_the_rule_cannot_serve_ends_the_run_with_its_name_and_what_to_do() -> None:
    def part(spec: AdapterSpec, number: int, name: str, limit: int) -> Part:
        if limit < spec.rank:
            raise ConfigError("needs rank 2: lower lora.rank to 1")
        return WHOLE

    rule = dataclasses.replace(rule_for(config()), part=part)
    federation = Federation([ToySite("a"), ToySite("low", max_rank=1)], rule=rule)

    with pytest.raises(
        RunError, match=r"round 1: no part for site low: needs rank 2: lower lora.rank to 1"
    ):
        federation.run()


def test_a_site_says_its_rank_and_its_row_keeps_it() -> None:
    federation = Federation([ToySite("a"), ToySite("low", max_rank=1)], run=config(rounds=1))
    result = federation.run()

    assert {e["site"]: e["max_rank"] for e in federation.events.of("site_joined")} == {
        "a": None,
        "low": 1,
    }
    assert (result.sites["a"].max_rank, result.sites["low"].max_rank) == (None, 1)
