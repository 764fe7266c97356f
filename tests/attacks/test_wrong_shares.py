"""Attack: a member reveals wrong shares, so that the sum is wrong or cannot be opened.

Shamir's sharing tells no right share from a wrong one, and one wrong share changes the secret
(e.g. Tompa and Woll 1988, doi:10.1007/BF02252871).

Why it fails: a combined seed is checked against the commitment its owner sent with its shares, a
combined key against the public key that was advertised. If it is wrong, up to ⌊(m − t) / 2⌋ wrong
ones of m shares are always found by decoding (protocols/secagg/decoding.py); of more, some choices
are tried. If nothing fits, the sum is given up, and whose secret it was is said. A wrong sum never
comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.secagg import recovery
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.member import Answer
from anabranch.protocols.secagg.messages import Reveal, Stage
from anabranch.protocols.secagg.plan import Group
from anabranch.protocols.secagg.shamir import combine
from tests.protocols.secagg.rig import Cohort, integers, plain_sum, random_of

Change = Callable[[Reveal], Reveal]


def of_another_peer(one: Reveal) -> Reveal:
    """Send everybody's shares under the next one's name."""
    names, shares = list(one.seeds), list(one.seeds.values())
    return msgspec.structs.replace(
        one, seeds=dict(zip(names, [*shares[1:], shares[0]], strict=True))
    )


def at_random(one: Reveal) -> Reveal:
    random = random_of("wrong")
    return msgspec.structs.replace(one, seeds={n: b"\0" + random(32) for n in one.seeds})


def too_large(one: Reveal) -> Reveal:
    return msgspec.structs.replace(one, seeds=dict.fromkeys(one.seeds, b"\xff" * 33))


def of_keys(one: Reveal) -> Reveal:
    return msgspec.structs.replace(one, keys=dict.fromkeys(one.keys, bytes(33)))


def revealing(
    n: int, change: Change, liars: set[str], silent: dict[str, Stage], **terms: Any
) -> Cohort:
    cohort = Cohort.of(n, **terms)

    def lie(name: str, answer: Answer) -> Answer:
        if name in liars and isinstance(answer.reply, Reveal):
            return Answer(change(answer.reply))
        return answer

    cohort.answering = lie
    cohort.run(silent)
    return cohort


@contextmanager
def counted() -> Iterator[list[list[int]]]:
    """Collect every choice of shares that is tried."""
    choices = recovery.choices
    tries: list[list[int]] = []

    def counting(indices: Sequence[int], count: int) -> Iterator[list[int]]:
        for one in choices(indices, count):
            tries.append(one)
            yield one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "choices", counting)
        yield tries


def unchecked(
    self: Aggregation, group: Group, name: str, kind: str, image: object, expected: str
) -> bytes:
    """Combine the first shares there are."""
    shares = [getattr(self._revealed[holder], kind)[name] for holder in group.holders(name)]
    return combine(dict(list(enumerate(shares))[: group.shape.threshold]))


@pytest.mark.parametrize("change", [of_another_peer, at_random], ids=lambda f: f.__name__)
def test_without_the_check_a_wrong_sum_would_come_out(
    change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Aggregation, "_combined", unchecked)
    cohort = revealing(5, change, {"site-0001"}, {})

    if cohort.aggregation.stage == "done":
        (one,) = cohort.aggregation.sums
        assert integers(one.total, 32) != plain_sum(cohort.vectors, one.members, 32)
    else:  # by chance a combined secret can be one of 257 bits
        assert "combine to no secret" in cohort.aggregation.reason


@pytest.mark.parametrize(
    "change", [of_another_peer, at_random, too_large, of_keys], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("liar", ["site-0000", "site-0003", "site-0006"])
def test_wrong_shares_are_left_out_while_there_are_enough(change: Change, liar: str) -> None:
    """7 members, t = 4: one is gone, one lies, five shares are right."""
    cohort = revealing(7, change, {liar}, {"site-0002": "mask"})

    cohort.require_exact()


def test_two_liars_of_forty_are_found_once_and_asked_last() -> None:
    """The first two in order, so that the first choice for every secret would be wrong."""
    with counted() as tries:
        cohort = revealing(40, at_random, {"site-0000", "site-0001"}, {}, threshold=2 / 3)

    cohort.require_exact()
    assert set(cohort.aggregation._wrong) == {"site-0000", "site-0001"}
    assert len(tries) == 40  # one choice each; what follows it is decoding


@pytest.mark.parametrize("liars", [6, 7])
def test_half_of_the_shares_to_spare_may_be_wrong(liars: int) -> None:
    """40 members, t = 27: six wrong shares are found, and seven by luck alone."""
    names = {f"site-{i:04d}" for i in range(liars)}

    cohort = revealing(40, at_random, names, {}, threshold=2 / 3, values=1)

    if liars < 7:
        cohort.require_exact()
        assert set(cohort.aggregation._wrong) == names
    else:
        assert (cohort.aggregation.stage, cohort.aggregation.sums) == ("aborted", ())


@pytest.mark.slow
@pytest.mark.parametrize("liars", [10, 16])
def test_a_hundred_members_lose_no_sum_to_so_many_liars(liars: int) -> None:
    """t = 67, c = 10; the liars are the first in order, and 16 = ⌊(100 − 67) / 2⌋."""
    names = {f"site-{i:04d}" for i in range(liars)}

    cohort = revealing(100, at_random, names, {}, threshold=2 / 3, colluding=0.1, values=1)

    cohort.require_exact()
    assert set(cohort.aggregation._wrong) == names


def test_the_search_is_the_shorter_the_larger_a_choice_is() -> None:
    assert len(list(recovery.choices(range(100), 67))) == 1 + 2_000_000 // 67**2
    assert len(list(recovery.choices(range(20), 14))) == 1 + recovery.MOST_TRIES
    assert len(list(recovery.choices(range(14), 14))) == 1


def test_a_member_that_shares_its_secrets_badly_blames_others_and_ends_nothing() -> None:
    """What two holders find in its boxes is no share; they reveal it, and are asked last."""
    cohort = Cohort.of(12, threshold=0.5)
    cohort.until("mask")
    for name in ("site-0000", "site-0001"):
        answer = cohort.ask(name, cohort.aggregation.requests()[name])
        assert answer is not None
        cohort.aggregation.take(name, answer.reply, answer.data)
        secrets = cohort.members[name]._secrets
        assert secrets is not None
        secrets.held["site-0005"] = (bytes(33), bytes(33))
    for name, request in cohort.aggregation.requests().items():
        if name in cohort.aggregation.waiting():
            answer = cohort.ask(name, request)
            assert answer is not None
            cohort.aggregation.take(name, answer.reply, answer.data)
    cohort.aggregation.close()
    while cohort.aggregation.stage in ("agree", "reveal"):
        cohort.step()

    cohort.require_exact()
    assert cohort.aggregation._wrong == {"site-0000": 1, "site-0001": 1}


@pytest.mark.parametrize(
    ("change", "whose"),
    [(at_random, "site-0000"), (too_large, "site-0000"), (of_keys, "site-0002")],
)
def test_with_exactly_the_threshold_left_a_wrong_share_ends_the_sum_by_name(
    change: Change, whose: str
) -> None:
    gone: dict[str, Stage] = {"site-0002": "mask", "site-0005": "reveal", "site-0006": "agree"}
    cohort = revealing(7, change, {"site-0003"}, gone)

    assert cohort.aggregation.stage == "aborted"
    assert cohort.aggregation.sums == ()
    assert cohort.aggregation.reason == f"the shares of {whose}'s secret do not fit together"


def test_more_liars_than_can_be_left_out_end_the_sum_after_a_bounded_search() -> None:
    liars = {f"site-{i:04d}" for i in range(12)}
    with counted() as tries:
        cohort = revealing(20, at_random, liars, {}, threshold=0.5)

    assert cohort.aggregation.stage == "aborted"
    assert "do not fit together" in cohort.aggregation.reason
    assert len(tries) == recovery.MOST_TRIES + 1


def test_shares_of_whom_nobody_asked_about_and_missing_ones_are_refused() -> None:
    cohort = Cohort.of(4)
    cohort.until("reveal", {"site-0003": "mask"})
    answer = cohort.ask("site-0000", cohort.aggregation.requests()["site-0000"])
    assert answer is not None
    good = answer.reply
    assert isinstance(good, Reveal)
    share = bytes(33)
    for seeds, private in (
        (good.seeds | {"site-0003": share}, good.keys),
        (good.seeds, good.keys | {"site-0001": share}),
        (good.seeds, {}),
        (dict(list(good.seeds.items())[1:]), good.keys),
        (good.seeds, {"zoe": share}),
    ):
        with pytest.raises(ProtocolError, match="expected shares of 3 seeds and 1 keys of its"):
            cohort.aggregation.take(
                "site-0000", msgspec.structs.replace(good, seeds=seeds, keys=private)
            )
    cohort.aggregation.take("site-0000", good)
