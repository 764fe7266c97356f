"""Shares: any t give the secret, t − 1 say nothing, and what is wrong is refused or differs."""

import secrets
from collections import Counter
from collections.abc import Callable
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.secagg.shamir import (
    COEFFICIENT_BYTES,
    PRIME,
    SHARE_BYTES,
    combine,
    evaluate,
    split,
    weights,
)

secrets_of_32 = st.binary(min_size=32, max_size=32)
seeds = st.integers(0, 2**64)


def repeatable(seed: int) -> Callable[[int], bytes]:
    """Return a source of fixed bytes."""
    return lambda count: b"".join(
        (seed * 2**64 + i + 1).to_bytes(32, "big")[::-1] for i in range(count // 32 + 1)
    )[:count]


@st.composite
def sharings(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """Draw holders, a threshold and the indices of exactly `threshold` holders."""
    holders = draw(st.integers(1, 40))
    threshold = draw(st.integers(1, holders))
    order = draw(st.permutations(range(holders)))
    return holders, threshold, order[:threshold]


# Laws


@settings(max_examples=60)
@given(secret=secrets_of_32, sharing=sharings())
def test_any_threshold_of_shares_gives_the_secret(
    secret: bytes, sharing: tuple[int, int, list[int]]
) -> None:
    holders, threshold, chosen = sharing
    shares = split(secret, holders, threshold, secrets.token_bytes)

    assert len(shares) == holders
    assert all(len(share) == SHARE_BYTES for share in shares)
    assert all(int.from_bytes(share) < PRIME for share in shares)
    assert combine({index: shares[index] for index in chosen}) == secret


@settings(max_examples=60)
@given(secret=secrets_of_32, other=secrets_of_32, sharing=sharings())
def test_one_share_less_is_consistent_with_every_other_secret(
    secret: bytes, other: bytes, sharing: tuple[int, int, list[int]]
) -> None:
    """For any other secret there is a polynomial through the same t − 1 shares: build it."""
    holders, threshold, chosen = sharing
    shares = split(secret, holders, threshold, secrets.token_bytes)
    *known, missing = sorted(chosen)
    *known_weights, weight = weights(tuple(sorted(chosen)))
    partial = sum(
        w * int.from_bytes(shares[index]) for w, index in zip(known_weights, known, strict=True)
    )
    value = (int.from_bytes(other) - partial) * pow(weight, -1, PRIME) % PRIME
    forged = {index: shares[index] for index in known} | {missing: value.to_bytes(SHARE_BYTES)}

    assert combine(forged) == other


@pytest.mark.parametrize(("prime", "threshold", "holders"), [(5, 2, 4), (7, 3, 4), (5, 3, 3)])
def test_counted_over_a_small_field_fewer_shares_are_equally_likely_whatever_the_secret(
    prime: int, threshold: int, holders: int
) -> None:
    """Go through all polynomials: each view of t − 1 shares comes equally often."""
    for seen in combinations(range(1, holders + 1), threshold - 1):
        views = [
            Counter(
                tuple(evaluate([secret, *rest], range(1, holders + 1), prime)[x - 1] for x in seen)
                for rest in product(range(prime), repeat=threshold - 1)
            )
            for secret in range(prime)
        ]
        assert all(view == views[0] for view in views)
        assert set(views[0].values()) == {1}
        assert len(views[0]) == prime ** (threshold - 1)


@given(
    polynomial=st.lists(st.integers(0, 10), min_size=1, max_size=5),
    order=st.permutations(range(10)),
)
def test_the_weights_give_the_polynomial_at_zero_over_a_small_field(
    polynomial: list[int], order: list[int]
) -> None:
    chosen = tuple(order[: len(polynomial)])
    values = evaluate(polynomial, range(1, 11), 11)

    total = sum(w * values[i] for w, i in zip(weights(chosen, 11), chosen, strict=True))
    assert total % 11 == polynomial[0]


@settings(max_examples=60)
@given(secret=secrets_of_32, sharing=sharings(), bit=st.integers(0, 255), seed=seeds)
def test_a_wrong_share_gives_another_secret_or_is_refused(
    secret: bytes, sharing: tuple[int, int, list[int]], bit: int, seed: int
) -> None:
    holders, threshold, chosen = sharing
    shares = split(secret, holders, threshold, repeatable(seed))
    wrong = {index: shares[index] for index in chosen}
    value = (int.from_bytes(wrong[chosen[0]]) ^ 1 << bit) % PRIME
    wrong[chosen[0]] = value.to_bytes(SHARE_BYTES)
    try:
        assert combine(wrong) != secret
    except ProtocolError as refusal:
        assert "combine to no secret" in str(refusal)  # noqa: PT017


@given(secret=secrets_of_32, seed=seeds)
def test_shares_are_the_values_of_the_polynomial_that_the_random_bytes_give(
    secret: bytes, seed: int
) -> None:
    random = repeatable(seed)
    raw = random(2 * COEFFICIENT_BYTES)
    a1, a2 = int.from_bytes(raw[:COEFFICIENT_BYTES]), int.from_bytes(raw[COEFFICIENT_BYTES:])
    expected = [(int.from_bytes(secret) + a1 * x + a2 * x * x) % PRIME for x in range(1, 6)]

    assert [int.from_bytes(share) for share in split(secret, 5, 3, random)] == expected


# Examples


def test_the_modulus_is_the_smallest_prime_above_2_to_the_256() -> None:
    assert [n for n in range(2**256 + 1, 2**256 + 298, 2) if probably_prime(n)] == [PRIME]


def probably_prime(n: int) -> bool:
    """Miller and Rabin's test with the first 40 primes and 24 random bases."""
    small = [p for p in range(2, 174) if all(p % q for q in range(2, p))]
    if any(n % p == 0 for p in small):
        return n in small
    twos = (n - 1 & 1 - n).bit_length() - 1
    for base in small + [secrets.randbelow(n - 3) + 2 for _ in range(24)]:
        x = pow(base, n - 1 >> twos, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def test_the_primality_test_tells_primes_from_composites() -> None:
    below = [n for n in range(3, 2000, 2) if probably_prime(n)]

    assert below == [n for n in range(3, 2000, 2) if all(n % q for q in range(2, n))]
    assert probably_prime(2**255 - 19)
    assert not probably_prime((2**127 - 1) * (2**89 - 1))
    assert not probably_prime(561 * 1105)  # Carmichael numbers


def test_a_threshold_of_one_gives_everybody_the_secret() -> None:
    secret = bytes(range(32))

    assert split(secret, 3, 1, secrets.token_bytes) == [b"\0" + secret] * 3


def test_the_largest_and_the_smallest_secret_come_back() -> None:
    for secret in (bytes(32), b"\xff" * 32):
        shares = split(secret, 129, 97, secrets.token_bytes)
        assert combine(dict(list(enumerate(shares))[-97:])) == secret


# Refusals


@pytest.mark.parametrize(
    "share", [bytes(32), bytes(34), b"", PRIME.to_bytes(33), b"\xff" * 33], ids=lambda s: s.hex()
)
def test_a_share_that_is_not_canonical_is_refused_by_the_index_of_its_holder(
    share: bytes,
) -> None:
    shares = split(bytes(32), 4, 3, secrets.token_bytes)

    with pytest.raises(ProtocolError, match="share of holder 2 is no canonical share"):
        combine({0: shares[0], 1: shares[1], 2: share})


def test_shares_of_an_element_that_is_no_secret_are_refused() -> None:
    too_large = (2**256 + 5).to_bytes(33)

    with pytest.raises(ProtocolError, match="shares of 1 holders combine to no secret of 32 bytes"):
        combine({0: too_large})


@pytest.mark.parametrize("indices", [(), (1, 1), (-1, 2)])
def test_indices_that_are_no_set_of_holders_are_refused(indices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected different indices >= 0, at least one"):
        weights(indices)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_secret_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"a secret of 32 bytes, got {size}"):
        split(bytes(size), 3, 2, secrets.token_bytes)


@pytest.mark.parametrize("threshold", [0, 4])
def test_a_threshold_beyond_the_holders_is_refused(threshold: int) -> None:
    with pytest.raises(ValueError, match=f"1 <= threshold <= 3 holders, got {threshold}"):
        split(bytes(32), 3, threshold, secrets.token_bytes)
