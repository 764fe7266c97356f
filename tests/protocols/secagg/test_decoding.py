"""Wrong shares, up to half of those to spare, are found; one more is refused or caught."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.secagg.decoding import at, decode, through
from anabranch.protocols.secagg.recovery import recover
from anabranch.protocols.secagg.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, evaluate, split

elements = st.one_of(st.integers(0, PRIME - 1), st.sampled_from([0, 1, PRIME - 1, 2**256]))
Word = tuple[list[int], dict[int, int]]


@st.composite
def codewords(draw: st.DrawFn, most: int = 24) -> Word:
    """Draw a polynomial and its values at some of the places 1 … 40."""
    threshold = draw(st.integers(1, most))
    count = draw(st.integers(threshold, most + 8))
    places = draw(st.permutations(range(1, 41)))[:count]
    polynomial = draw(st.lists(elements, min_size=threshold, max_size=threshold))
    values = dict(zip(range(1, 41), evaluate(polynomial, range(1, 41), PRIME), strict=True))
    return polynomial, {x: values[x] for x in places}


def trimmed(polynomial: list[int]) -> list[int]:
    """Return it without zeros at the end."""
    while polynomial and not polynomial[-1]:
        polynomial = polynomial[:-1]
    return polynomial


def changed(data: st.DataObject, values: dict[int, int], count: int) -> dict[int, int]:
    """Return the values with exactly `count` of them wrong, by any amount."""
    places = data.draw(st.permutations(sorted(values)))[:count]
    wrong = {x: data.draw(st.integers(1, PRIME - 1)) for x in places}
    return {x: (value + wrong.get(x, 0)) % PRIME for x, value in values.items()}


@settings(max_examples=150, deadline=None)
@given(word=codewords(), data=st.data())
def test_wrong_values_up_to_the_bound_are_found(word: Word, data: st.DataObject) -> None:
    polynomial, values = word
    bound = (len(values) - len(polynomial)) // 2
    received = changed(data, values, data.draw(st.integers(0, bound)))

    found = decode(received, len(polynomial))

    assert found == trimmed(polynomial)
    assert all(at(found, x) == value for x, value in values.items())


@settings(max_examples=100, deadline=None)
@given(word=codewords(), data=st.data())
def test_one_more_than_the_bound_never_gives_a_polynomial_that_is_further_away(
    word: Word, data: st.DataObject
) -> None:
    """What comes out, if anything does, is within the bound of what was received."""
    polynomial, values = word
    wrong = (len(values) - len(polynomial)) // 2 + 1
    if wrong > len(values):
        return
    received = changed(data, values, wrong)

    found = decode(received, len(polynomial))

    assert found != trimmed(polynomial)
    if found is not None:
        assert len(found) <= len(polynomial)
        assert sum(at(found, x) != value for x, value in received.items()) < wrong


@pytest.mark.parametrize(("count", "threshold"), [(10, 7), (40, 27), (100, 67)])
def test_one_more_than_the_bound_at_random_is_refused(count: int, threshold: int) -> None:
    rng = random.Random(count)
    polynomial = [rng.randrange(PRIME) for _ in range(threshold)]
    places = range(1, count + 1)
    values = dict(zip(places, evaluate(polynomial, places, PRIME), strict=True))
    bound = (count - threshold) // 2
    for x in rng.sample(places, bound + 1):
        values[x] = rng.randrange(PRIME)

    assert decode(values, threshold) is None


def test_the_polynomial_through_some_values_is_the_lowest() -> None:
    """x² + 1 at 1, 2, 3, and a line through the first two."""
    master, found = through({1: 2, 2: 5, 3: 10})
    assert (master, found) == ([PRIME - 6, 11, PRIME - 6, 1], [1, 0, 1])
    assert through({1: 2, 2: 5})[1] == [PRIME - 1, 3]
    assert through({1: 0, 2: 0})[1] == []
    assert decode({1: 7}, 1) == [7]
    assert decode({1: 0, 2: 0, 3: 9}, 1) == []


@pytest.mark.parametrize(("count", "threshold"), [(133, 97), (128, 86), (177, 129)])
def test_the_largest_neighbourhoods_take_no_second(count: int, threshold: int) -> None:
    """About 0.03 s; the processor's time, which other work on the machine does not add to."""
    rng = random.Random(count)
    polynomial = [rng.randrange(PRIME) for _ in range(threshold)]
    places = range(1, count + 1)
    values = dict(zip(places, evaluate(polynomial, places, PRIME), strict=True))
    for x in rng.sample(places, (count - threshold) // 2):
        values[x] = rng.randrange(PRIME)

    began = time.process_time()
    assert decode(values, threshold) == polynomial
    assert time.process_time() - began < 1.0


# Secrets from shares


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(0, 20), st.integers(0, 2**32), st.booleans(), st.data())
def test_a_secret_is_found_and_so_is_whose_share_was_wrong(
    threshold: int, spare: int, seed: int, too_large: bool, data: st.DataObject
) -> None:
    rng = random.Random(seed)
    secret, holders = rng.randbytes(SECRET_BYTES), threshold + spare
    shares = dict(enumerate(split(secret, holders, threshold, rng.randbytes)))
    order = rng.sample(range(holders), holders)
    liars = set(order[: data.draw(st.integers(0, spare // 2))])  # the most trusted ones
    for liar in liars:
        shares[liar] = b"\xff" * SHARE_BYTES if too_large else b"\0" + rng.randbytes(32)

    assert recover(shares, order, threshold, lambda found: found == secret) == (secret, liars)


def test_liars_who_agree_on_another_secret_are_caught_by_its_check() -> None:
    """They are one more than the bound, and what they reveal is nearer to their polynomial."""
    rng = random.Random(7)
    secret, other = rng.randbytes(SECRET_BYTES), rng.randbytes(SECRET_BYTES)
    right = split(secret, 10, 8, rng.randbytes)
    # Theirs goes through the shares of seven honest holders, and gives another secret.
    known = {0: int.from_bytes(other)} | {i + 1: int.from_bytes(right[i]) for i in range(7)}
    _, forged = through(known)
    shares = dict(enumerate(right)) | {i: at(forged, i + 1).to_bytes(SHARE_BYTES) for i in (8, 9)}
    values = {i + 1: int.from_bytes(share) for i, share in shares.items()}
    order = [8, 9, *range(8)]

    assert decode(values, 8) == forged  # one share of ten is off it, the last honest one
    assert at(forged, 0) == int.from_bytes(other)
    found = recover(shares, order, 8, lambda found: found == secret)

    assert found == (secret, {8, 9})  # by leaving out two of ten
