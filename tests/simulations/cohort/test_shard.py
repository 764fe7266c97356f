from __future__ import annotations

import math

from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.flower import Handed, hand_over, pack_refused, payload_bytes
from anabranch.protocols.messages import Refused, Trained
from anabranch.protocols.part import Part
from anabranch.simulations.cohort.shard import SLACK, pack, share, unpack
from tests.simulations.rig import adapter

WEIGHTS = st.lists(st.floats(0.1, 100), min_size=1, max_size=40)


def handed(number: int, part: Part) -> Handed:
    delta = adapter(float(number)).minus(adapter(), num_examples=number, part=part, steps=number)
    trained = Trained(site=f"s{number}", num_examples=number, steps=number, seconds=0.5)
    return hand_over(trained, delta)


@given(weights=WEIGHTS, workers=st.integers(1, 5))
def test_every_client_is_trained_by_exactly_one_worker(weights: list[float], workers: int) -> None:
    shares = share(range(len(weights)), lambda i: weights[i], workers)

    assert len(shares) == workers
    assert sorted(place for places in shares for place in places) == list(range(len(weights)))


@given(weights=WEIGHTS, workers=st.integers(1, 5))
def test_no_worker_has_more_than_its_share_by_more_than_one_client(
    weights: list[float], workers: int
) -> None:
    shares = share(range(len(weights)), lambda i: weights[i], workers)
    loads = [sum(weights[place] for place in places) for places in shares]

    assert max(loads) <= SLACK * sum(weights) / workers + max(weights)


def test_a_client_stays_with_its_worker_while_work_is_even() -> None:
    first = share([4, 7, 2, 9], lambda i: 1.0, 2)
    second = share([9, 2, 11, 6], lambda i: 1.0, 2)

    assert first == [[0, 2], [1, 3]]  # even clients at the first worker, odd ones at the second
    assert second == [[1, 3], [0, 2]]


def test_a_client_that_would_be_too_much_goes_to_the_worker_with_least_to_do() -> None:
    assert share([0, 2, 4, 6], lambda i: 1.0, 2) == [[0, 1], [2, 3]]


@given(weights=WEIGHTS, workers=st.integers(1, 5))
def test_a_pinned_client_is_always_trained_by_the_same_worker(
    weights: list[float], workers: int
) -> None:
    shares = share(range(len(weights)), lambda i: weights[i], workers, math.inf)

    assert shares == [list(range(w, len(weights), workers)) for w in range(workers)]


@given(parts=st.lists(st.sampled_from([Part(), Part(factors="B"), Part(ranks=(1,))]), max_size=8))
def test_replies_come_back_as_they_were(parts: list[Part]) -> None:
    replies: list[RecordDict] = [handed(i + 1, part) for i, part in enumerate(parts)]
    replies.insert(len(replies) // 2, pack_refused(Refused(site="x", reason="data", message="no")))

    back = unpack(pack(replies))

    assert len(back) == len(replies)
    for reply, got in zip(replies, back, strict=True):
        assert payload_bytes(got) == payload_bytes(reply)
        if isinstance(reply, Handed):
            assert isinstance(got, Handed)
            assert got.trained == reply.trained
            assert got.delta.part == reply.delta.part
            assert all(
                (got.delta.arrays[name] == array).all()
                for name, array in reply.delta.arrays.items()
            )
        else:
            assert got == reply


def test_deltas_of_one_part_travel_as_one_matrix() -> None:
    answers = pack([handed(1, Part()), handed(2, Part(factors="A")), handed(3, Part())])

    assert [(group.at, group.rows.shape) for group in answers.deltas] == [
        ((0, 2), (2, 29)),
        ((1,), (1, 23)),
    ]
    assert answers.contents == (None, None, None)
