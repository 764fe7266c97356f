"""A secret from the shares of it that were revealed, some of which may be wrong.

A share tells nothing of itself (shamir.py), so choices of `threshold` of them are tried until what
they give is right: the first in order, then pseudo-random ones. If e of m shares are wrong, one
choice is without them in about (1 − threshold / m)^e of the cases. Whose shares were wrong is told,
so that they come last in the order for the next secret: each costs the search once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.secagg.shamir import combine

MOST_TRIES = 1000  # choices beside the first, for one secret


def recover(
    shares: Mapping[int, bytes],
    order: Sequence[int],
    threshold: int,
    right: Callable[[bytes], bool],
) -> tuple[bytes, set[int]] | None:
    """Return the secret that is `right`, and whose shares are not of it; None if none is found.

    `order` has every index of `shares` once, the most trusted first; there are `threshold` or
    more. Wrong shares are looked for if the first choice does not give the secret.
    """
    for chosen in choices(order, threshold):
        secret = _secret(shares, chosen)
        if secret is None or not right(secret):
            continue
        if chosen == list(order[:threshold]):
            return secret, set()
        others = (index for index in order if index not in chosen)
        return secret, {at for at in others if _secret(shares, [*chosen[1:], at]) != secret}
    return None


def choices(order: Sequence[int], count: int) -> Iterator[list[int]]:
    """Yield `count` of the indices: the first ones, then MOST_TRIES pseudo-random choices."""
    yield list(order[:count])
    for tries in range(MOST_TRIES if len(order) > count else 0):
        ranks = {index: hashlib.sha256(b"%d %d" % (tries, index)).digest() for index in order}
        yield sorted(order, key=ranks.__getitem__)[:count]


def _secret(shares: Mapping[int, bytes], chosen: Sequence[int]) -> bytes | None:
    try:
        return combine({index: shares[index] for index in chosen})
    except ProtocolError:
        return None
