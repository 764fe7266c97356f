"""Skellam noise: exact integers from a key stream.

X is Skellam of variance v, symmetric around 0, if it is the difference of two independent Poisson
variables of mean v / 2. Sums of independent Skellam variables are Skellam, and variances add:
that is why every client may add a share of the noise. With I_k the modified Bessel functions,

    P[X = k] = e^(−v) I_|k|(v)          I_(k−1)(v) = I_(k+1)(v) + (2k / v) I_k(v)

The recurrence, run downwards from k = K in whole numbers of some hundred bits (Miller's
algorithm), gives all probabilities up to one factor, and that they add up to 1 gives the factor.
Beyond K lies a mass below 2⁻¹⁷⁰ (Chernoff: P[X ≥ k] ≤ exp(√(k² + v²) − v − k asinh(k / v))).

One value takes 64 bits of a ChaCha20 key stream: one for the sign, 63 that are compared with the
distribution function of |X|. Where 63 bits do not decide (chance K · 2⁻⁶³) another 128 bits
are drawn, so the resolution is 2⁻¹⁹¹. In all, what is drawn differs from the Skellam
distribution by less than 2⁻¹⁵⁰ in total variation per value, if ChaCha20's stream is random.

How long a draw takes depends on what is drawn, in some nanoseconds per value.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from anabranch.protocols.errors import PrivacyError

Integers = NDArray[np.int64]

MOST_VARIANCE = 2**32  # of one draw: its table has 1.0 million entries
DISTANCE = 2.0**-150  # total variation of one value from the Skellam distribution, at most

KEY_BYTES = 32
HIGH, LOW = 63, 128  # bits of a uniform number: those that decide, those drawn where they do not
TAIL = 170 * math.log(2)  # −ln of the mass beyond the table
START = 1 << 256  # the last entry of the recurrence: relative errors below 2⁻²⁵⁰
CHUNK = 1 << 16  # values at a time: what is in use stays in the cache
STEPS = 3  # to the entry that is meant, one by one; what needs more is searched for


@dataclass(frozen=True, eq=False)
class Table:
    """The distribution function of |X|: `bounds[k]` is 2¹⁹¹ · P[|X| <= k], rounded down."""

    high: Integers  # the upper 63 bits of each bound, ascending
    low: tuple[bytes, ...]  # the lower 128 bits, big endian
    guide: NDArray[np.int32]  # first bits of a number -> the first entry that it can mean
    shift: int  # bits of a number behind the first ones

    def bound(self, k: int) -> int:
        """Return 2¹⁹¹ · P[|X| <= k]."""
        return int(self.high[k]) << LOW | int.from_bytes(self.low[k])


def skellam(variance: int, count: int, random: Callable[[int], bytes]) -> Integers:
    """Return `count` independent Skellam values of this variance (count,).

    `random(32)` gives the key of the stream they are drawn from: from `secrets` in a real run.
    Each value is within DISTANCE of the distribution. Raises PrivacyError for a variance that is
    no whole number of 1 … MOST_VARIANCE.
    """
    if not 1 <= variance <= MOST_VARIANCE or variance != int(variance):
        raise PrivacyError(
            f"Skellam noise of variance {variance:g}: expected a whole number of 1 … "
            f"{MOST_VARIANCE}. Take a coarser grid where it is larger, a finer one where it is "
            "smaller"
        )
    table = table_of(int(variance))
    stream = Cipher(ChaCha20(random(KEY_BYTES), nonce=bytes(16)), mode=None).encryptor()

    def more(size: int) -> bytes:
        return stream.update(bytes(size))

    values = np.empty(count, np.int64)
    for start in range(0, count, CHUNK):
        part = values[start : start + CHUNK]
        part[:] = drawn(table, np.frombuffer(more(8 * len(part)), "<u8"), more)
    return values


def drawn(table: Table, words: NDArray[np.uint64], more: Callable[[int], bytes]) -> Integers:
    """Return the values (n,) that uniform `words` (n,) stand for; `more` gives further bytes."""
    numbers = (words >> np.uint64(1)).view(np.int64)
    at: NDArray[np.int32] = table.guide[numbers >> table.shift]
    behind = np.flatnonzero(table.high[at] < numbers)
    for _ in range(STEPS):
        at[behind] += 1
        behind = behind[table.high[at[behind]] < numbers[behind]]
    if behind.size:
        at[behind] = np.searchsorted(table.high, numbers[behind])
    for i in np.flatnonzero(table.high[at] == numbers).tolist():
        at[i] = _refined(table, int(numbers[i]), int.from_bytes(more(LOW // 8)))
    sizes = at.astype(np.int64)
    signs = (words & np.uint64(1)).view(np.int64)
    values: Integers = (sizes ^ -signs) + signs  # −size where the bit is 1
    return values


def _refined(table: Table, number: int, rest: int) -> int:
    """Return how many bounds are at most the number of 63 + 128 bits."""
    whole = number << LOW | rest
    return bisect_right(range(len(table.high)), whole, key=table.bound)


@functools.lru_cache(maxsize=4)
def table_of(variance: int) -> Table:
    """Return the table of a variance: up to a second, and 60 bytes per entry."""
    masses = _masses(variance)
    total = masses[0] + 2 * sum(masses[1:])
    sums = accumulate((2 * mass for mass in masses[1:]), initial=masses[0])
    bounds = [((one << (HIGH + LOW)) - 1) // total for one in sums]
    high = np.array([bound >> LOW for bound in bounds], np.int64)
    low = tuple((bound & (1 << LOW) - 1).to_bytes(LOW // 8) for bound in bounds)
    bits = min(20, max(8, len(bounds).bit_length() + 2))
    shift = HIGH - bits
    guide = np.searchsorted(high, np.arange(2**bits, dtype=np.int64) << shift).astype(np.int32)
    return Table(high=high, low=low, guide=guide, shift=shift)


def _masses(variance: int) -> list[int]:
    """Return P[X = k] for k = 0 … K up to a common factor, as whole numbers."""
    last = _last(variance)
    above, here = 0, START
    masses = [here]
    for k in range(last, 0, -1):
        above, here = here, above + 2 * k * here // variance
        masses.append(here)
    masses.reverse()
    return masses


def _last(variance: int) -> int:
    """Return K."""

    def excess(k: int) -> float:
        return k * math.asinh(k / variance) - k * k / (math.hypot(k, variance) + variance) - TAIL

    low, high = 0, 1
    while excess(high) < 0:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if excess(middle) >= 0 else (middle, high)
    return high
