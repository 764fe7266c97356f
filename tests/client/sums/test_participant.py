from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.flower import NO_LIMITS
from anabranch.client.site import Site
from anabranch.client.sums.given import InFile, InMemory
from anabranch.client.sums.participant import Participant, Participants
from anabranch.client.sums.stages import (
    pack_reply,
    pack_request,
    unpack_kept,
    unpack_reply,
    unpack_request,
)
from anabranch.client.sums.terms import (
    hidden,
    require_terms,
    summed,
    vector_of,
)
from anabranch.protocols import wire
from anabranch.protocols.errors import MalformedMessage, PolicyError, ProtocolError, RunError
from anabranch.protocols.messages import Assignment, Trained
from anabranch.protocols.secagg import contribution
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.member import Limits
from anabranch.protocols.secagg.messages import STAGES, Invite
from anabranch.protocols.secagg.terms import Roster, Terms
from anabranch.server.evaluation import initial_adapter
from tests.client.sums.summing_sites import (
    ASSIGNMENT,
    MODEL,
    RUN,
    a_delta,
    kept,
    participants,
    summed_up,
    terms_of,
)
from tests.runs import table_run
from tests.secure_cases import secured
from tests.simulations.rig import SPEC, config

TRAINED = Trained(site="aarhus", num_examples=9, steps=4, seconds=1.5, loss=0.25, epsilon=1.0)


def test_members_sum_what_they_kept() -> None:
    members = kept()

    done = summed_up(members, terms_of(members))

    (total,) = done.sums
    mean = contribution.mean_of(
        total.total, done.terms, SPEC, summed(ASSIGNMENT.part), normalize_steps=False, by_rank=False
    )
    np.testing.assert_allclose(mean.arrays["head.weight"], 0.375, atol=1e-4)
    assert mean.num_examples == 40
    assert all(one.kept is None for one in members.values())


@pytest.mark.parametrize("stage", STAGES[:3])
def test_a_delta_serves_another_attempt_until_it_was_given_to_one(stage: str) -> None:
    members = kept()
    summed_up(members, terms_of(members), until=stage)

    again = summed_up(members, terms_of(members, "cd" * 32))

    assert again.stage == "done"


@pytest.mark.parametrize("stage", STAGES[3:])
def test_a_delta_that_was_masked_is_in_no_other_sum(stage: str) -> None:
    """Others may open the first one without this member: two sums would show the difference."""
    members = kept()
    summed_up(members, terms_of(members), until=stage)
    for one in members.values():
        one.keep(ASSIGNMENT, MODEL, a_delta())

    for one in members.values():
        assert one.kept is None
        with pytest.raises(ProtocolError, match="has given its update to a sum already"):
            one.answer(ASSIGNMENT, terms_of(members, "cd" * 32), NO_LIMITS, vector_of)


def test_a_delta_is_given_once_for_ever(tmp_path: Path) -> None:
    files = iter(range(100))
    members = kept(lambda: InFile(tmp_path / f"{next(files)}" / "toy-1"))
    summed_up(members, terms_of(members))
    path = tmp_path / "0" / "toy-1"
    anew = Participant("aarhus", members["aarhus"]._key, InFile(path))  # another process
    members["aarhus"] = anew
    for one in members.values():
        one.keep(ASSIGNMENT, MODEL, a_delta())

    second = terms_of(members, "cd" * 32)
    for one in members.values():
        with pytest.raises(ProtocolError, match="has given its update to a sum already"):
            one.answer(ASSIGNMENT, second, NO_LIMITS, vector_of)

    assert anew.kept is None
    assert msgspec.json.decode(path.read_bytes()) == {"1": "ab" * 32}
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_given_is_written_down_before_the_masked_vector_leaves(tmp_path: Path) -> None:
    members = kept()
    blocked = tmp_path / "file"
    blocked.write_text("")
    members["cork"]._given = InFile(tmp_path / "cork" / "toy-1")
    at_mask = summed_up(members, terms_of(members), until="mask")
    members["cork"]._given = InFile(blocked / "toy-1")

    with pytest.raises(RunError, match="cannot write down to which sum its update goes"):
        members["cork"].answer(ASSIGNMENT, at_mask.requests()["cork"], NO_LIMITS, vector_of)


def test_a_book_that_cannot_be_read_gives_nothing(tmp_path: Path) -> None:
    path = tmp_path / "secure" / "given" / "toy-1"
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"1": ')

    with pytest.raises(RunError, match="secure/given/toy-1 in the site's folder"):
        InFile(path).read()


def test_the_same_request_gets_the_same_answer() -> None:
    members = kept()
    aggregation = Aggregation(*_fields(terms_of(members)))
    while aggregation.stage not in ("done", "aborted"):
        for name, request in aggregation.requests().items():
            first = members[name].answer(ASSIGNMENT, request, NO_LIMITS, vector_of)
            again = members[name].answer(ASSIGNMENT, request, NO_LIMITS, vector_of)
            assert (again.reply, again.data) == (first.reply, first.data)
            aggregation.take(name, first.reply, first.data)
        aggregation.close()
    assert aggregation.stage == "done"


def test_an_attempt_that_was_given_up_is_not_taken_up_again() -> None:
    members = kept()
    old, new = terms_of(members), terms_of(members, "cd" * 32)
    members["cork"].answer(ASSIGNMENT, old, NO_LIMITS, vector_of)
    members["cork"].answer(ASSIGNMENT, new, NO_LIMITS, vector_of)

    with pytest.raises(ProtocolError, match="given up for a newer one"):
        members["cork"].answer(ASSIGNMENT, old, NO_LIMITS, vector_of)


def test_trained_again_the_sum_under_way_goes_on() -> None:
    members = kept()
    at_mask = summed_up(members, terms_of(members), until="mask")
    members["cork"].keep(ASSIGNMENT, MODEL, a_delta(0.5))  # the answer of before, asked for again

    got = members["cork"].answer(ASSIGNMENT, at_mask.requests()["cork"], NO_LIMITS, vector_of)

    assert got.data


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": "other"}, "run 'other'"),
        ({"round": 2}, "round '2'"),
        ({"model": "00" * 32}, "model"),
        ({"config": "00" * 32}, "configuration"),
        ({"minimum": 2}, "minimum '2'"),
        ({"threshold": 0.5}, "threshold"),
        ({"colluding": 0.4}, "colluding"),
        ({"limit": 8.0}, "range '8"),
        ({"ring": 16}, "ring '16'"),
        ({"group": 2}, "group '2'"),
        ({"values": 5}, "values '5'"),
        ({"counters": 9}, "counters '9'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_terms_of_another_agreement_are_refused_at_the_invitation(
    changes: dict[str, Any], said: str
) -> None:
    members = kept()

    with pytest.raises(ProtocolError, match=f"terms of round 1: {said}"):
        members["cork"].answer(ASSIGNMENT, terms_of(members, **changes), NO_LIMITS, vector_of)


def test_a_keystream_that_was_not_agreed_is_refused() -> None:
    run = secured(config(), keystream="aes-256-ctr")
    assignment = msgspec.structs.replace(ASSIGNMENT, config=run)
    members = participants()
    members["cork"].keep(assignment, MODEL, a_delta())
    invite = terms_of(members, config=run.digest())

    with pytest.raises(ProtocolError, match="keystream chacha20"):
        require_terms(invite.terms, assignment, members["cork"].kept, "cork")


def test_a_weight_below_its_own_is_refused_at_the_mask() -> None:
    members = kept()
    at_mask = summed_up(members, terms_of(members, weight=1024), until="mask")

    with pytest.raises(ProtocolError, match="the heaviest weight is 1024"):
        members["cork"].answer(ASSIGNMENT, at_mask.requests()["cork"], NO_LIMITS, vector_of)


def test_what_was_not_trained_is_not_summed() -> None:
    members = participants()

    with pytest.raises(ProtocolError, match="keeps no delta of this round"):
        members["cork"].answer(ASSIGNMENT, terms_of(members), NO_LIMITS, vector_of)


def test_a_stage_without_an_invitation_is_refused() -> None:
    members = kept()
    adverts = summed_up(members, terms_of(members), until="share").requests()["cork"]

    with pytest.raises(ProtocolError, match="in no secure sum of it"):
        kept()["cork"].answer(ASSIGNMENT, adverts, NO_LIMITS, vector_of)


def test_the_owners_floors_count() -> None:
    members = kept()

    with pytest.raises(PolicyError, match="sums of 5 or more"):
        members["cork"].answer(ASSIGNMENT, terms_of(members), Limits(minimum=5), vector_of)


def test_a_report_of_a_kept_delta_has_no_numbers_of_the_records() -> None:
    said = hidden(TRAINED, RUN)

    assert (said.num_examples, said.steps, said.loss) == (0, 0, None)
    assert (said.site, said.seconds, said.epsilon) == ("aarhus", 1.5, 1.0)


# The store


def test_only_the_newest_runs_are_kept() -> None:
    store = Participants(most_runs=2)
    made = {
        run: store.of(run, "a", lambda: Participant("a", Ed25519PrivateKey.generate(), InMemory()))
        for run in ("r1", "r2", "r3")
    }

    def never() -> Participant:
        raise AssertionError("it is there")

    assert store.of("r3", "a", never) is made["r3"]
    assert store.of("r2", "a", never) is made["r2"]
    again = store.of("r1", "a", lambda: participants()["cork"])
    assert again is not made["r1"]


def test_deltas_of_earlier_rounds_are_let_go() -> None:
    store, members = Participants(), participants()
    for name, one in members.items():
        store.of("toy-1", name, lambda one=one: one)  # type: ignore[misc]
        store.keep(name, one, ASSIGNMENT, MODEL, a_delta())
    second = msgspec.structs.replace(ASSIGNMENT, round=2)

    store.keep("cork", members["cork"], second, MODEL, a_delta())

    assert [name for name, one in members.items() if one.kept is not None] == ["cork"]


# A real site


def test_a_site_keeps_its_delta_again_when_it_is_asked_again(table_sites: dict[str, Path]) -> None:
    run = secured(table_run(), minimum=2)
    folder = table_sites["cardiology"]
    assignment, first = Assignment(run="real-1", round=1, config=run), initial_adapter(run)
    site = Site(folder)

    report, frame = site.train(assignment, first)
    delta = site._participant("real-1").kept
    assert delta is not None
    site._participant("real-1").drop()
    again, _ = site.train(assignment, first)

    assert (report.num_examples, report.loss, frame) == (0, None, b"")
    assert again == report
    kept_again = site._participant("real-1").kept
    assert kept_again is not None
    assert wire.encode(kept_again.delta) == wire.encode(delta.delta)
    assert kept_again.model == wire.digest(wire.encode(first))
    assert site.peer_key("real-1", run) == Site(folder).peer_key("real-1", run)
    assert site.peer_key("real-1", table_run()) is None


# Messages


def test_requests_and_replies_come_back_as_they_were() -> None:
    members = kept()
    aggregation = Aggregation(*_fields(terms_of(members)))
    while aggregation.stage in STAGES:
        stage: Any = aggregation.stage
        for name, request in aggregation.requests().items():
            about, back = unpack_request(pack_request(ASSIGNMENT, request), stage)
            assert (about, back) == (ASSIGNMENT, request)
            answer = members[name].answer(about, back, NO_LIMITS, vector_of)
            got: Any = unpack_reply(pack_reply(answer), stage)
            assert (got.reply, got.data) == (answer.reply, answer.data)
            aggregation.take(name, got.reply, got.data)
        aggregation.close()
    assert aggregation.stage == "done"


def test_a_request_of_another_stage_is_malformed() -> None:
    content = pack_request(ASSIGNMENT, terms_of(kept()))

    with pytest.raises(MalformedMessage, match="expected 'adverts', got 'invite'"):
        unpack_request(content, "share")
    with pytest.raises(MalformedMessage, match="expected 'kept', got 'invite'"):
        unpack_kept(content)
    del content["about"]
    with pytest.raises(MalformedMessage, match="invite: expected records"):
        unpack_request(content, "advertise")


def _fields(invite: Invite) -> tuple[Terms, Roster]:
    return invite.terms, invite.roster
