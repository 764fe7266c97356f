"""Shamir's secret sharing over a prime field (Shamir 1979, doi:10.1145/359168.359176).

    p     = 2²⁵⁶ + 297, the smallest prime above 2²⁵⁶: every secret of 32 bytes is an element
    f(x)  = s + a₁ x + … + a_(t−1) x^(t−1)  mod p,    a_j uniform in 0 … p − 1
    share i (0-based) = f(i + 1), 33 bytes, big endian, below p
    s     = f(0) = Σ_i λ_i f(i + 1)  mod p,    λ_i = Π_(j≠i) (j + 1) / (j − i)     (Lagrange)

Any t shares give s; any t − 1 are consistent with every s, each with the same number of
polynomials. Nothing here tells a wrong share from a right one: whoever combines must check
the secret against a commitment. a_j is 49 random bytes mod p, which is within 2⁻¹²⁸ of uniform
(the margin of RFC 9380 §5.2). Python's integers take time that depends on their values; shares
are made and combined on the owner's own machine only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import accumulate
from math import prod

from anabranch.protocols.errors import ProtocolError

PRIME = (1 << 256) + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
COEFFICIENT_BYTES = 49


def split(
    secret: bytes, holders: int, threshold: int, random: Callable[[int], bytes]
) -> list[bytes]:
    """Return `holders` shares of `secret` (32 bytes), any `threshold` of which give it back.

    `random(n)` returns n uniform bytes (secrets.token_bytes); it is called once.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"expected a secret of {SECRET_BYTES} bytes, got {len(secret)}")
    if not 1 <= threshold <= holders:
        raise ValueError(f"expected 1 <= threshold <= {holders} holders, got {threshold}")
    raw = random(COEFFICIENT_BYTES * (threshold - 1))
    coefficients = [
        int.from_bytes(raw[at : at + COEFFICIENT_BYTES]) % PRIME
        for at in range(0, len(raw), COEFFICIENT_BYTES)
    ]
    polynomial = [int.from_bytes(secret), *coefficients]
    return [
        value.to_bytes(SHARE_BYTES) for value in evaluate(polynomial, range(1, holders + 1), PRIME)
    ]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret (32 bytes) that exactly `threshold` shares {0-based index: share} hold.

    Raises ProtocolError, naming the holder's index, for a share that is not 33 bytes below p,
    and when the shares belong to no secret of 32 bytes. Wrong shares give a wrong secret.
    """
    indices = tuple(sorted(shares))
    values = [element(index, shares[index]) for index in indices]
    secret = sum(w * v for w, v in zip(weights(indices), values, strict=True)) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ProtocolError(
            f"the shares of {len(indices)} holders combine to no secret of {SECRET_BYTES} bytes: "
            "at least one holder revealed a wrong share; repeat the round without that holder"
        )
    return secret.to_bytes(SECRET_BYTES)


def element(index: int, share: bytes) -> int:
    """Return the field's element in a share. Raises ProtocolError, naming the holder's index."""
    value = int.from_bytes(share)
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise ProtocolError(
            f"the share of holder {index} is no canonical share: expected {SHARE_BYTES} bytes "
            f"below the prime, got {len(share)} bytes; drop this holder"
        )
    return value


@lru_cache(maxsize=1024)
def weights(indices: tuple[int, ...], prime: int = PRIME) -> tuple[int, ...]:
    """Return λ_i for every 0-based index: f(0) = Σ λ_i f(i + 1) for deg f < len(indices).

    Public numbers, cached: the coordinator combines many secrets from the same holders.
    """
    if not indices or len(set(indices)) != len(indices) or min(indices) < 0:
        raise ValueError(f"expected different indices >= 0, at least one, got {indices}")
    points = [index + 1 for index in indices]
    bottoms = [x * prod(y - x for y in points if y != x) % prime for x in points]
    top = prod(points)
    return tuple(top * inverse % prime for inverse in _inverses(bottoms, prime))


def evaluate(polynomial: list[int], points: range, prime: int) -> list[int]:
    """Return the polynomial (constant term first) at `points`, mod `prime` (Horner's rule).

    The points are small, so the values grow slowly and are reduced once, at the end.
    """
    falling = polynomial[::-1]
    values: list[int] = []
    for x in points:
        value = 0
        for coefficient in falling:
            value = value * x + coefficient
        values.append(value % prime)
    return values


def _inverses(values: list[int], prime: int) -> list[int]:
    """Return 1 / v mod prime for all v ≠ 0 at the price of one inversion (Montgomery's trick)."""
    below = list(accumulate(values, lambda a, b: a * b % prime, initial=1))
    inverse = pow(below.pop(), -1, prime)
    result: list[int] = []
    for value, product in zip(reversed(values), reversed(below), strict=True):
        result.append(inverse * product % prime)
        inverse = inverse * value % prime
    return result[::-1]
