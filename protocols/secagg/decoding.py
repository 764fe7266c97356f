"""Which shares are wrong: unique decoding of Reed-Solomon codes over the field of shamir.py.

m shares of one secret, t of which open it, are a codeword if all lie on one polynomial of degree
t − 1 (McEliece and Sarwate 1981, doi:10.1145/358746.358762). Gao 2003 (doi:10.1007/978-1-4757-
3789-9_5): with g₀ = Π (x − x_i) and g₁ the polynomial of degree m − 1 through all shares, run
Euclid's algorithm on (g₀, g₁) until a remainder g = u g₀ + v g₁ has a degree below (m + t) / 2.
If e ≤ (m − t) / 2 shares are wrong, v has its roots at them alone, and f = g / v, exactly.

That takes O(m²) products; a search through choices of t shares would take about (m / (m − t))^e
of them. With more wrong shares there is no such f, or a wrong one that its makers have agreed on:
whoever decodes checks the secret. Polynomials have their constant term first and no zeros at the
end; [] is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest

from anabranch.protocols.secagg.shamir import PRIME

Polynomial = list[int]


def decode(values: Mapping[int, int], threshold: int) -> Polynomial | None:
    """Return the polynomial of degree < `threshold` on which nearly all values lie; None: none.

    `values`: {x: f(x)}, x from 1, at least `threshold`. All but ⌊(m − t) / 2⌋ of m lie on it.
    """
    before, rest = through(values)
    older, locator = Polynomial(), [1]
    while 2 * (len(rest) - 1) >= len(values) + threshold:
        quotient, remainder = _divided(before, rest)
        before, rest = rest, remainder
        older, locator = locator, _minus(older, _times(quotient, locator))
    found, remainder = _divided(rest, locator)
    if remainder or len(found) > threshold:
        return None
    wrong = sum(at(found, x) != value for x, value in values.items())
    return found if 2 * wrong <= len(values) - threshold else None


def through(values: Mapping[int, int]) -> tuple[Polynomial, Polynomial]:
    """Return Π (x − x_i), and the polynomial of the lowest degree through all values (Newton)."""
    master, found = [1], Polynomial()
    for x, value in values.items():
        missing = (value - at(found, x)) * pow(at(master, x), -1, PRIME)
        found = _minus(found, [-missing * a for a in master])
        master = _minus([0, *master], [x * a for a in master])
    return master, found


def at(polynomial: Polynomial, x: int) -> int:
    """Return the value of a polynomial (Horner's rule)."""
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value


def _divided(top: Polynomial, bottom: Polynomial) -> tuple[Polynomial, Polynomial]:
    """Return quotient and remainder; `bottom` is not 0."""
    rest, degree = list(top), len(bottom) - 1
    inverse, quotient = pow(bottom[-1], -1, PRIME), Polynomial()
    while len(rest) > degree:
        factor = rest.pop() * inverse % PRIME
        quotient.append(factor)
        start = len(rest) - degree
        for place in range(degree):
            rest[start + place] = (rest[start + place] - factor * bottom[place]) % PRIME
    return _trimmed(quotient[::-1]), _trimmed(rest)


def _times(one: Polynomial, other: Polynomial) -> Polynomial:
    product = [0] * (len(one) + len(other) - 1)
    for shift, factor in enumerate(one):
        for place, coefficient in enumerate(other, shift):
            product[place] += factor * coefficient
    return product


def _minus(one: Polynomial, other: Polynomial) -> Polynomial:
    """Return one − other, reduced."""
    return _trimmed([(a - b) % PRIME for a, b in zip_longest(one, other, fillvalue=0)])


def _trimmed(polynomial: Polynomial) -> Polynomial:
    while polynomial and not polynomial[-1]:
        polynomial.pop()
    return polynomial
