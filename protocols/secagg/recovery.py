"""A secret from the shares of it that were revealed, some of which may be wrong.

A share does not show whether it is right (shamir.py). So the first t of m shares are combined, t
the threshold, and the secret is checked. If it is wrong, wrong shares are looked for:

    decoding   up to ⌊(m − t) / 2⌋ wrong ones are always found (decoding.py), in O(m²) products
    search     if there are more, e of them, pseudo-random choices of t shares are tried, as many
               as MOST_TRIES and MOST_PRODUCTS allow; about (1 − t / m)^e of all choices are right

Whose shares were wrong is told, so that they come last in the order for the next secret: each
liar is looked for once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.secagg.decoding import Polynomial, at, decode, through
from anabranch.protocols.secagg.shamir import SECRET_BYTES, combine, element

MOST_TRIES = 1000  # choices beside the first, for one secret
MOST_PRODUCTS = 2_000_000  # of the field, t² for each choice: a third of a second in all


def recover(
    shares: Mapping[int, bytes],
    order: Sequence[int],
    threshold: int,
    right: Callable[[bytes], bool],
) -> tuple[bytes, set[int]] | None:
    """Return the secret that is `right`, and whose shares are not of it; None if none is found.

    `order` has every index of `shares` once, the most trusted first; there are `threshold` or
    more.
    """
    tried = choices(order, threshold)
    secret = _secret(shares, next(tried))
    if secret is not None and right(secret):
        return secret, set()
    values = _values(shares)
    polynomial = decode(values, threshold) if len(values) >= threshold else None
    if polynomial is not None:
        constant = at(polynomial, 0)
        secret = constant.to_bytes(SECRET_BYTES + 1)[1:]
        if not constant >> (8 * SECRET_BYTES) and right(secret):
            return secret, _off(polynomial, shares, values)
    for chosen in tried:
        secret = _secret(shares, chosen)
        if secret is not None and right(secret):
            _, polynomial = through({index + 1: values[index + 1] for index in chosen})
            return secret, _off(polynomial, shares, values)
    return None


def choices(order: Sequence[int], count: int) -> Iterator[list[int]]:
    """Yield `count` of the indices: the first ones, then pseudo-random choices."""
    yield list(order[:count])
    most = min(MOST_TRIES, MOST_PRODUCTS // count**2)
    for tries in range(most if len(order) > count else 0):
        ranks = {index: hashlib.sha256(b"%d %d" % (tries, index)).digest() for index in order}
        yield sorted(order, key=ranks.__getitem__)[:count]


def _secret(shares: Mapping[int, bytes], chosen: Sequence[int]) -> bytes | None:
    try:
        return combine({index: shares[index] for index in chosen})
    except ProtocolError:
        return None


def _values(shares: Mapping[int, bytes]) -> dict[int, int]:
    """Return x -> f(x) of the shares that are elements of the field."""
    values: dict[int, int] = {}
    for index, share in shares.items():
        with suppress(ProtocolError):
            values[index + 1] = element(index, share)
    return values


def _off(
    polynomial: Polynomial, shares: Mapping[int, bytes], values: Mapping[int, int]
) -> set[int]:
    """Return the indices of the shares that are not the polynomial's."""
    return {i for i in shares if i + 1 not in values or at(polynomial, i + 1) != values[i + 1]}
