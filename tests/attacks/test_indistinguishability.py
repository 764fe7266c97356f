"""Attack: look for a trace of one member's update in all that the coordinator is sent.

What it gets of two inputs of one victim, zeros and large values with a structure, is compared;
the other members' inputs are such that the sum is the same. Three looks, each at what was sent
and at what is left when everything that was revealed is taken off:

    long     one vector of 2^17 values: every byte of a value, pairs of neighbours, correlation
    many     700 sums: every byte position (both halves) over the sums, and no vector twice
    between  every byte of every message, under the one input and under the other

A look finds something if its chi-square is as far from the middle as by chance in less than one of
10^9 cases, on either side: about 2,000 looks, so one false alarm in 10^5 choices of the seeds; the
seeds here are fixed. The same looks find four masks that are broken on purpose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from anabranch.protocols.secagg import coordinator, keys, member
from anabranch.protocols.secagg.masks import Expander
from anabranch.protocols.secagg.messages import Reveal, Shares
from anabranch.protocols.secagg.plan import length
from anabranch.protocols.secagg.ring import Ring, RingArray
from tests.attacks.lying import Spy
from tests.protocols.secagg.rig import Cohort, random_of

CHANCE = 1e-11
LONG, MANY, SHORT = 1 << 17, 700, 8  # values, sums, values
INPUTS = ("zeros", "structured")
Bytes = NDArray[np.uint8]


def input_of(which: str, count: int) -> RingArray:
    """Return the victim's vector: zeros, or a wave as large as the ring's quarter."""
    wave = (2.0**30 * np.sin(np.arange(count) / 10)).astype(np.int64).astype(np.uint32)
    return np.zeros(count, np.uint32) if which == "zeros" else wave


def played(members: int, count: int, which: str, number: int = 0) -> Cohort:
    """Play a sum of the victim, the second by name, and others: the same sum for both inputs."""
    cohort = Cohort.of(members, values=count, counters=0, keystream="chacha20")
    cohort.random = lambda name: random_of(f"{which} {number} {name}")
    victim, first = cohort.terms.members[1], cohort.terms.members[0]
    for vector in cohort.vectors.values():
        vector[:] = 0
    cohort.vectors[victim][:] = input_of(which, count)
    cohort.vectors[first][:] = input_of("structured", count) - input_of(which, count)
    cohort.run()
    cohort.require_exact()
    return cohort


def left(cohort: Cohort) -> tuple[RingArray, RingArray]:
    """Return the victim's masked vector, and the same without its own mask."""
    victim, terms = cohort.terms.members[1], cohort.terms
    ring, count = Ring(terms.ring), length(terms)
    sent = ring.unpack(cohort.seen.masked[victim], count)
    seed = Spy(cohort).secret(victim, "seeds")
    assert seed is not None
    rest = sent.copy()
    expander = vars(member)["Expander"](terms.keystream, ring, count)
    expander.subtract(keys.self_key(seed, cohort.plan.context, victim), rest)
    return sent, rest


def everything(cohort: Cohort) -> Bytes:
    """Return all bytes that the victim's sum made the coordinator see, in a fixed order."""
    seen, parts = cohort.seen, []
    revealed = dict(seen.reveals)
    for name in cohort.terms.members:
        advert, shares, reveal = seen.adverts[name], seen.shares[name], revealed[name]
        assert isinstance(shares, Shares)
        assert isinstance(reveal, Reveal)
        parts += [bytes.fromhex(text) for text in (advert.sealing, advert.masking)]
        parts += [bytes.fromhex(shares.commitment), *shares.sealed.values(), seen.masked[name]]
        parts += [*reveal.seeds.values(), *reveal.keys.values()]
    return np.frombuffer(b"".join(parts), np.uint8)


# Looks


def uniform(values: NDArray[np.integer], bins: int) -> bool:
    """Tell whether values in 0 … bins − 1 are as uneven as chance makes them; not less, either."""
    counts = np.bincount(values.ravel(), minlength=bins)
    expected = values.size / bins
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return _usual(statistic, bins - 1)


def alike(one: Bytes, other: Bytes) -> bool:
    """Tell whether two columns of bytes can be of one distribution, and each of their bits."""
    bits = (np.unpackbits(column[:, None], axis=1) for column in (one, other))
    pairs = zip(*(rows.T for rows in bits), strict=True)
    return _alike(one, other) and all(_alike(*pair) for pair in pairs)


def _alike(one: Bytes, other: Bytes) -> bool:
    table = np.stack([np.bincount(column, minlength=256) for column in (one, other)])
    table = table[:, np.argsort(-table.sum(0))]
    often = int((table.sum(0) >= 10).sum())
    table = np.concatenate([table[:, :often], table[:, often:].sum(1, keepdims=True)], axis=1)
    table = table[:, table.sum(0) > 0]
    if table.shape[1] < 2:
        return True
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    return bool(stats.chi2.sf(statistic, table.shape[1] - 1) > CHANCE)


def _usual(statistic: float, freedom: int) -> bool:
    above, below = (one(statistic, freedom) for one in (stats.chi2.sf, stats.chi2.cdf))
    return bool(min(above, below) > CHANCE / 2)


def look_at_long(vector: RingArray, known: RingArray) -> list[str]:
    """Return what one long vector shows: bytes, neighbours, correlation with the input."""
    found = []
    columns = vector.view(np.uint8).reshape(len(vector), -1)
    for place in range(columns.shape[1]):
        column = columns[:, place]
        if not uniform(column, 256):
            found.append(f"byte {place}")
        for nibble in (column & 15, column >> 4):
            if not uniform(nibble[:-1].astype(int) * 16 + nibble[1:], 256):
                found.append(f"neighbours, byte {place}")
    signed, wave = vector.view(np.int32).astype(float), known.view(np.int32).astype(float)
    with np.errstate(invalid="ignore"):
        correlation = abs(np.corrcoef(signed, wave)[0, 1])
    if correlation > stats.norm.isf(CHANCE / 2) / len(vector) ** 0.5:
        found.append("correlation")
    return found


def look_at_many(vectors: list[RingArray]) -> list[str]:
    """Return what many short vectors show: every byte position, and repetitions."""
    columns = np.stack([vector.view(np.uint8) for vector in vectors])
    halves = np.concatenate([columns >> 4, columns & 15], axis=1)
    found = [f"position {at}" for at in range(halves.shape[1]) if not uniform(halves[:, at], 16)]
    if len({vector.tobytes() for vector in vectors}) < len(vectors):
        found.append("repetition")
    return found


@cache
def many(which: str, count: int = MANY) -> tuple[list[RingArray], list[RingArray], Bytes]:
    """Return sent and remaining vectors, and all bytes, of many sums of two."""
    cohorts = [played(2, SHORT, which, number) for number in range(count)]
    sent, rest = zip(*map(left, cohorts), strict=True)
    return list(sent), list(rest), np.stack([everything(cohort) for cohort in cohorts])


# What the coordinator gets


@pytest.mark.parametrize("which", INPUTS)
def test_a_long_vector_shows_nothing(which: str) -> None:
    sent, rest = left(played(3, LONG, which))
    wave = input_of("structured", LONG)

    assert look_at_long(sent, wave) == []
    assert look_at_long(rest, wave) == []


@pytest.mark.parametrize("which", INPUTS)
def test_many_sums_show_nothing_at_any_position(which: str) -> None:
    sent, rest, _ = many(which)

    assert look_at_many(sent) == []
    assert look_at_many(rest) == []


def test_no_byte_of_any_message_tells_one_input_from_the_other() -> None:
    zeros, structured = (many(which)[2] for which in INPUTS)

    assert zeros.shape == structured.shape
    assert zeros.shape[1] > 500
    told = [at for at in range(zeros.shape[1]) if not alike(zeros[:, at], structured[:, at])]
    assert told == []


# Broken masks


class Broken(Expander):
    """Adds and subtracts another keystream."""

    words: Callable[[bytes, int], RingArray]

    def add(self, key: bytes, total: RingArray) -> None:
        total += type(self).words(key, len(total))

    def subtract(self, key: bytes, total: RingArray) -> None:
        total -= type(self).words(key, len(total))


def good(key: bytes, count: int) -> RingArray:
    return np.frombuffer(Expander("chacha20", Ring(32), count).keystream(key), np.uint32)


class Of31Bits(Broken):
    """The largest value is 2^31 − 1."""

    @staticmethod
    def words(key: bytes, count: int) -> RingArray:
        return good(key, count) >> np.uint32(1)


class Of16BitSeed(Broken):
    """Two bytes of the key count."""

    @staticmethod
    def words(key: bytes, count: int) -> RingArray:
        return good(key[:2] + bytes(30), count)


class Congruential(Broken):
    """x ← 1664525 x + 1013904223 mod 2^32 (Numerical Recipes)."""

    @staticmethod
    def words(key: bytes, count: int) -> RingArray:
        value, values = int.from_bytes(key[:4]), []
        for _ in range(count):
            values.append(value)
            value = (1664525 * value + 1013904223) & 0xFFFFFFFF
        return np.array(values, np.uint32)


def broken(patch: pytest.MonkeyPatch, kind: type[Expander]) -> None:
    for module in (member, coordinator):
        patch.setattr(module, "Expander", kind)


def test_masks_of_31_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The victim's pairwise masks have opposite signs: their difference is a triangle."""
    broken(monkeypatch, Of31Bits)
    _, rest = left(played(3, LONG, "zeros"))

    assert "byte 3" in look_at_long(rest, input_of("structured", LONG))


def test_a_congruential_generator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, Congruential)
    sent, rest = left(played(3, LONG, "zeros"))

    for vector in (sent, rest):
        assert "neighbours, byte 0" in look_at_long(vector, input_of("structured", LONG))


def test_a_seed_of_16_bits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, Of16BitSeed)
    _, rest = zip(*(left(played(2, SHORT, "zeros", number)) for number in range(900)), strict=True)

    assert "repetition" in look_at_many(list(rest))


def test_one_keystream_for_two_peers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added for the one and subtracted for the other: nothing but the update is left."""
    same = hashlib.sha256(b"same").digest()
    monkeypatch.setattr(keys, "mask_key", lambda *arguments: same)
    _, rest = left(played(3, LONG, "structured"))

    assert "correlation" in look_at_long(rest, input_of("structured", LONG))


def test_bytes_that_depend_on_the_input_are_found() -> None:
    """One bit is set in three of four sums, and not in one of two."""
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 256, MANY, dtype=np.uint8) for _ in INPUTS)
    assert alike(one, other)
    other[: MANY // 2] |= 128
    assert not alike(one, other)
