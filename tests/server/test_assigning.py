"""Parts, frames and messages of a round's sites."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.flower import payload_bytes, unpack_assignment
from anabranch.client.sums.terms import require_company
from anabranch.protocols.adapter import WHOLE, Adapter
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.messages import Assignment, Trained
from anabranch.protocols.part import Part
from anabranch.protocols.secagg.graph import colluders, groups_of, smallest_company
from anabranch.protocols.secagg.plan import Group
from anabranch.protocols.secagg.terms import Terms
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Robust
from anabranch.server.aggregation.choose import rule_for
from anabranch.server.assigning import Assigner
from anabranch.server.flower import Peer
from anabranch.server.sums.terms import roster_of, terms_of
from tests.secure_cases import SummingToy, secured
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


@settings(max_examples=60)
@given(
    low=st.lists(st.booleans(), min_size=4, max_size=40),
    minimum=st.integers(2, 4),
    colluding=st.floats(0, 0.3),
    grouped=st.booleans(),
    data=st.data(),
)
def test_whoever_drops_out_of_a_sum_its_ranks_are_in_company(
    low: list[bool], minimum: int, colluding: float, grouped: bool, data: st.DataObject
) -> None:
    """What sites are told to train is what members ask of the terms, and of who is left."""
    count, c = len(low), colluders(len(low), colluding)
    group = minimum + c if grouped and count >= 2 * (minimum + c) else None
    names = [f"site-{i:02d}" for i in range(count)]
    plain = config(method="ffa", mixed_ranks=True, weighting="uniform")
    robust = None if group is None else Robust(rule="median")
    run = secured(
        msgspec.structs.replace(plain, robust=robust),
        minimum=minimum, colluding=colluding, group=group,
    )  # fmt: skip
    one = Assigner(rule=rule_for(run), config=run, run="toy-1")
    question, peers = one.question(1, SPEC), dict[str, Peer]()
    for name, few in zip(names, low, strict=True):
        peers[name] = Peer(name, len(peers), 10, 0, max_rank=1 if few else None)
    one.put(question, adapter(), peers)

    secure = run.secure_aggregation
    assert secure is not None
    terms = terms_of(run, secure, question, adapter(), names, roster_of(peers), "toy-1")
    company = smallest_company(count, secure)
    parts = groups_of(names, bytes(32), count if group is None else group)
    among = min(parts, key=len)
    left = data.draw(st.permutations(among))[: company.needed]
    require_company(terms, SPEC.rank, left)

    trained = sum(part == Part(factors="B") for part in question.parts.values())
    lower = max(company.needed - c - minimum, 0)
    assert trained == (count if not any(low) else count - sum(low) if sum(low) <= lower else 0)


def test_a_rank_that_too_few_of_a_sparse_graph_trained_is_said_before_anybody_is_invited() -> None:
    """Of 200 asked 16 may leave a rank out; 150 train in time, and of these 13 might."""
    run = secured(config(method="ffa", mixed_ranks=True, weighting="uniform"), minimum=3)
    one, secure = Assigner(rule=rule_for(run), config=run, run="toy-1"), run.secure_aggregation
    assert secure is not None
    low = smallest_company(200, secure).honest - 3
    most = smallest_company(150, secure).honest - 3
    assert (low, most) == (16, 13)
    names = [f"site-{i:03d}" for i in range(200)]
    peers = {n: Peer(n, i, 10, 0, max_rank=1 if i < low else None) for i, n in enumerate(names)}
    question = one.question(1, SPEC)
    one.put(question, adapter(), peers)

    def terms(members: list[str]) -> Terms:
        return terms_of(run, secure, question, adapter(), members, roster_of(peers), "toy-1")

    with pytest.raises(RunError, match=r"134 members trained rank \d, 137 are needed.*more time"):
        terms(names[:150])
    late = names[low - most : low - most + 150]
    company = smallest_company(150, secure)
    group = Group(tuple(late), company.shape, company.needed, company.honest, {})
    require_company(terms(late), SPEC.rank, late, group)


def test_a_few_of_low_rank_who_are_too_few_for_a_sum_are_assigned_what_they_can_train() -> None:
    run = secured(config(method="ffa", mixed_ranks=True), minimum=3)
    one = Assigner(rule=rule_for(run), config=run, run="toy-1")
    question = one.question(1, SPEC)

    one.put(question, adapter(), {"low": PEERS["low"]})

    assert len(question.parts["low"].ranks or ()) == 1


class Broken(SummingToy):
    def train(self, assignment: Assignment, before: Adapter) -> tuple[Trained, bytes]:
        raise RuntimeError("the disk is full")


def test_a_rank_that_too_few_have_trained_in_time_is_said_by_the_coordinator() -> None:
    """Six are asked, four of them to train rank 1; two of these fail."""
    run = secured(config(rounds=1, method="ffa", mixed_ranks=True), minimum=3)
    sites = [(Broken if i > 3 else SummingToy)(f"site-{i}") for i in range(6)]
    sites[0].max_rank = sites[1].max_rank = 1
    federation = Federation(sites, run=run)

    with pytest.raises(RunError, match=r"2 members trained rank \d, 3 are needed.*ask more sites"):
        federation.run()

    assert federation.events.of("secure_sum_started") == []
