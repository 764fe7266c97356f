"""Who masks with whom, who holds whose shares, and how many of them are needed.

    n  members        c  may side with the coordinator: ⌊colluding · M⌋ of the M invited
    k  degree         holders(u) = N(u) and u, k + 1 of them        t  threshold

Complete graph, n ≤ COMPLETE_UP_TO (Bonawitz et al. 2017, doi:10.1145/3133956.3133982):

    k = n − 1,   t = max(⌊share · n⌋, ⌊(n + c) / 2⌋) + 1 (at most n)

An honest holder reveals one of a member's two secrets, a colluding one both: to collect both
takes 2t > n + c reveals, and n + c are to be had.

Sparse graph above (Bell et al. 2020, doi:10.1145/3372297.3417885): the smallest even k, then the
smallest t, with

    n · P[Hyp(n − 1, c, k) ≥ 2t − (k + 1)] ≤ 2⁻¹⁰⁰        nobody's two secrets can be collected
    n · P[Hyp(n − 1, ⌊DROPOUTS · n⌋, k) > k − t] ≤ 2⁻²⁰       everybody has t neighbours who stay

where Hyp(N, K, k) counts the marked ones among k drawn from N of which K are marked. 2⁻¹⁰⁰ and
not 2⁻⁴⁰: a coordinator that tries 2⁶⁰ seeds until it likes the graph is left with 2⁻⁴⁰. The
tails are compared in exact integers, so every party computes the same shape.

The first tail also bounds what a coordinator gains by dropping whom it likes once it knows the
graph. A survivor whose sum opens has t holders who survive, at most 2t − k − 2 of them colluding:
the other k + 2 − t or more, itself included, are honest, and each shares with it a mask that stays
secret. So no sum over fewer than k + 2 − t honest members ever opens.

The coordinator says whose keys arrive, and whoever sends the last ones can try many partitions
into groups: so c is counted of all who were invited, and all c may be in one group.

The graph is a random circulant: the members stand on a circle in an order that the seed decides,
and everyone's neighbours are those k/2 distances to the right and to the left, distances that
the seed decides too. Hence exactly k-regular, and N(u) is a uniformly random set of k others for
every u: that is what makes the tails hypergeometric. The order is that of

    SHA-256("anabranch secagg order 1" ‖ 0 ‖ seed ‖ name)              the circle
    SHA-256("anabranch secagg offset 1" ‖ 0 ‖ seed ‖ distance as u32 BE)   distances 1 … ⌊(n − 1)/2⌋
    SHA-256("anabranch secagg group 1" ‖ 0 ‖ seed ‖ name)              groups
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import SecureAggregation

COMPLETE_UP_TO = 128
DROPOUTS = Fraction(1, 10)
SECRECY_BITS = 100
LIVENESS_BITS = 20
MAX_DEGREE = 1024
SEED_BYTES = 32

Neighbours = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Shape:
    """The numbers of a round's graph: every member has `holders` − 1 neighbours."""

    members: int
    holders: int
    threshold: int
    complete: bool


@dataclass(frozen=True)
class Company:
    """What it takes to open a group's sum, and how many honest members are then in it."""

    shape: Shape
    needed: int  # of the group must be in the sum, and must sign who is
    honest: int  # so many who do not collude are in every sum that can be opened; 2 or more


def quorum(members: int, share: float) -> int:
    """Return the least number of survivors: more than `share` of the members, at most all."""
    return min(_floor(share, members) + 1, members)


def company_of(
    members: int, invited: int, *, minimum: int, share: float, colluding: float, grouped: bool
) -> Company:
    """Return the company of a group of `members`: without groups, of all that sent keys.

    With groups (`grouped`) all c may be in this one, and `minimum` others must be. Raises
    ConfigError if there are not so many, or fewer than 2 others, or no threshold holds.
    """
    c = colluders(invited, colluding)
    if grouped and members < minimum + c:
        raise ConfigError(
            f"secure_aggregation.group: {c} of {invited} members may collude, all of them in one "
            f"group, and secure_aggregation.minimum = {minimum} who do not must be in it: a group "
            f"of {members} is too small. Set group to {minimum + c} or more, or lower "
            "secure_aggregation.colluding"
        )
    if members - c < 2:
        raise ConfigError(
            f"{members} members are there, and {c} of the {invited} invited may collude: {c + 2} "
            "are needed, or the sum would show one update; else lower secure_aggregation.colluding"
        )
    share = max(share, (members + c) / (2 * members))
    shape = shape_of(members, share, c / members)
    needed = max(minimum + c if grouped else minimum, quorum(members, share))
    around = members if shape.complete else shape.holders + 1 - shape.threshold
    return Company(shape, needed, honest=min(needed - c, around))


def smallest_company(members: int, secure: SecureAggregation) -> Company:
    """Return the company of the smallest group of a round, if all `members` send keys."""
    return company_of(
        members // max(members // (secure.group or members), 1),
        members,
        minimum=secure.minimum,
        share=secure.threshold,
        colluding=secure.colluding,
        grouped=secure.group is not None,
    )


@lru_cache(maxsize=256)
def shape_of(members: int, share: float, colluding: float) -> Shape:
    """Return the graph's numbers for `members` of which the fraction `colluding` may collude.

    Raises ConfigError when no threshold keeps both secrets of a member apart.
    """
    if members < 2:
        raise ConfigError(f"secure aggregation takes 2 members or more, got {members}")
    if not 0 < share <= 1 or not 0 <= colluding < 1:
        raise ConfigError(
            "expected 0 < secure_aggregation.threshold <= 1 and 0 <= secure_aggregation.colluding "
            f"< 1, got {share} and {colluding}"
        )
    c = _floor(colluding, members)
    if members > COMPLETE_UP_TO:
        return _sparse(members, c)
    t = quorum(members, share)
    if 2 * t <= members + c:
        raise ConfigError(
            f"with {members} members, {c} of whom may collude, a threshold of {t} does not keep "
            f"a member's two secrets apart: it must be above {(members + c) / 2:g}; raise "
            "secure_aggregation.threshold or lower secure_aggregation.colluding"
        )
    return Shape(members, holders=members, threshold=t, complete=True)


def neighbours(names: Sequence[str], seed: bytes, shape: Shape) -> Neighbours:
    """Return N(u), ascending, for every u of `names` (ascending, shape.members of them).

    v is in N(u) exactly if u is in N(v); u is never in N(u); all have shape.holders − 1.
    """
    _check(names, seed)
    if len(names) != shape.members:
        raise ValueError(f"expected {shape.members} names, got {len(names)}")
    if shape.complete:
        return {u: tuple(v for v in names if v != u) for u in names}
    return dict(_circulant(tuple(names), seed, shape.holders - 1))


def groups_of(names: Sequence[str], seed: bytes, size: int) -> list[tuple[str, ...]]:
    """Return a random partition of `names` (ascending) into ⌊n / size⌋ groups, at least one.

    The groups' sizes differ by at most 1 and none is below min(size, n). Each is ascending.
    """
    _check(names, seed)
    if size < 1:
        raise ValueError(f"expected a group size of at least 1, got {size}")
    order = _ordered(b"group", seed, names)
    count = max(len(order) // size, 1)
    cuts = [len(order) * i // count for i in range(count + 1)]
    return [tuple(sorted(order[start:stop])) for start, stop in pairwise(cuts)]


@lru_cache(maxsize=8)
def _circulant(names: tuple[str, ...], seed: bytes, degree: int) -> Neighbours:
    """Return the random circulant; cached, since all members of a simulation ask for the same."""
    n = len(names)
    circle = _ordered(b"order", seed, names)
    offsets = sorted(
        range(1, (n - 1) // 2 + 1),
        key=lambda offset: _digest(b"offset", seed, offset.to_bytes(4)),
    )[: degree // 2]
    both = [step for offset in offsets for step in (offset, -offset)]
    around = {u: tuple(sorted(circle[(at + s) % n] for s in both)) for at, u in enumerate(circle)}
    return {u: around[u] for u in names}


def _sparse(n: int, c: int) -> Shape:
    """Return the smallest even degree, then the smallest threshold, with both tails small."""
    dropped = int(DROPOUTS * n)
    helpers = _Tail(n - 1, c)
    dropouts = _Tail(n - 1, dropped)
    for k in range(2, min(n - 1, MAX_DEGREE) + 1, 2):
        a = helpers.least(k, n, SECRECY_BITS)  # fewer than a colluding neighbours, for all
        b = dropouts.least(k, n, LIVENESS_BITS) - 1  # at most b neighbours drop out, for all
        t = (a + k + 2) // 2  # the smallest with 2t − (k + 1) ≥ a
        if t <= k - b:
            return Shape(n, holders=k + 1, threshold=t, complete=False)
    raise ConfigError(
        f"no graph on {n} members keeps a member's two secrets apart when {c} may collude and "
        f"{dropped} drop out; lower secure_aggregation.colluding"
    )


class _Tail:
    """Tails of Hyp(population, marked, k), in exact integers, for k = 2, 4, … in this order."""

    def __init__(self, population: int, marked: int) -> None:
        self._marked, self._others = _Row(marked), _Row(population - marked)
        self._all = _Row(population)

    def least(self, k: int, n: int, bits: int) -> int:
        """Return the least m with n · P[Hyp ≥ m] ≤ 2^−bits."""
        budget = self._all[k]
        scale = n << bits
        weight = 0
        for m in range(k, -1, -1):
            weight += self._marked[m] * self._others[k - m]
            if weight * scale > budget:
                return m + 1
        return 0


class _Row:
    """Binomial coefficients of n over 0, 1, …, computed as far as they are asked for."""

    def __init__(self, n: int) -> None:
        self._n, self._row = n, [1]

    def __getitem__(self, i: int) -> int:
        row = self._row
        while len(row) <= i:
            row.append(row[-1] * (self._n - len(row) + 1) // len(row))
        return row[i]


def colluders(members: int, colluding: float) -> int:
    """Return c: how many of the invited `members` may side with the coordinator."""
    return _floor(colluding, members)


def _floor(share: float, members: int) -> int:
    """Return ⌊share · members⌋ for the simple fraction that was meant: 0.29 · 100 is 29."""
    return int(Fraction(share).limit_denominator(1_000_000) * members)


def _check(names: Sequence[str], seed: bytes) -> None:
    if len(seed) != SEED_BYTES:
        raise ValueError(f"expected a seed of {SEED_BYTES} bytes, got {len(seed)}")
    if not names or any(a >= b for a, b in pairwise(names)):
        raise ValueError("expected names in ascending order, at least one and each once")


def _ordered(purpose: bytes, seed: bytes, names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: _digest(purpose, seed, name.encode()))


def _digest(purpose: bytes, seed: bytes, value: bytes) -> bytes:
    return hashlib.sha256(b"anabranch secagg " + purpose + b" 1\0" + seed + value).digest()
