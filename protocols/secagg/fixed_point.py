"""Numbers in the ring: a common grid for the members' values, and exact counters beside them.

Grid. All members round to the same multiples of one step, so their sum is a sum of integers:

    levels = ⌊(2^(b−1) − 1) / n⌋ − 1  (at most 2³²),    step = limit / levels
    encode(x) = ⌊factor · x / step + r⌋ mod 2^b,    r uniform in [0, 1)
    decode(sum) = step · (the sum as a signed integer) = Σ factor · x + error

An encoded value is at most levels + 1 in size, and n (levels + 1) ≤ 2^(b−1) − 1: whatever the
members send within the limit, the sum does not overflow. The rounding is stochastic: the error
of one member is below one step and zero on average, up to 2⁻²⁰ of a step and the last bits of
float64 (r has 32 bits, of a ChaCha20 keystream; nobody without its key can predict it).

Counters. A non-negative integer below 2⁴⁸ (a number of records, of steps) is cut into digits of
d bits, one ring value each, lowest first, with n (2^d − 1) < 2^b: no digit of a sum overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.errors import ConfigError, DataError
from anabranch.protocols.secagg.masks import KEY_BYTES, cipher
from anabranch.protocols.secagg.ring import RINGS, Ring, RingArray, RingBits

MAX_LEVELS = 1 << 32  # above a float32's 24 bits, and float64 keeps 20 bits of r beside it
CHUNK = 1 << 15  # values: five buffers of a chunk fit the second-level cache
COUNTER_BITS = 48

Values = NDArray[np.float32] | NDArray[np.float64]


class OutOfRange(DataError):
    """Values that the grid does not have. The text holds none of them; `detail` is not to be sent.

    Text and class say as much of the update as that it is refused.
    """

    def __init__(self, text: str, detail: str) -> None:
        super().__init__(text)
        self.detail = detail  # how many, where, the first one: for the log of whoever has them


@dataclass(frozen=True)
class Grid:
    """The common grid of `members` whose values stay within ±limit."""

    ring: Ring
    members: int
    limit: float

    def __post_init__(self) -> None:
        """Refuse a grid without room for a value."""
        if self.members < 1:
            raise ConfigError(f"expected 1 member or more, got {self.members}")
        if not 1e-30 <= self.limit <= 1e30:  # false for NaN
            raise ConfigError(
                f"expected secure_aggregation.range between 1e-30 and 1e30, got {self.limit}"
            )
        if self.levels < 1:
            raise ConfigError(
                f"a ring of {self.ring.bits} bits has no room for the sum of {self.members} "
                "members; take a wider secure_aggregation.ring"
            )

    @property
    def levels(self) -> int:
        """The limit in steps."""
        return min(((1 << (self.ring.bits - 1)) - 1) // self.members - 1, MAX_LEVELS)

    @property
    def step(self) -> float:
        """The distance of neighbouring points of the grid."""
        return self.limit / self.levels

    def encode(self, values: Values, factor: float, random: Callable[[int], bytes]) -> RingArray:
        """Return `factor` · `values` (d,) in steps, rounded at random, as ring elements (d,).

        `factor` in (0, 1] is the member's weight; `random(32)` gives the key of the rounding.
        Raises OutOfRange, before anything is encoded, for values that are not finite or beyond
        ±limit. |decode(encode(x)) − factor · x| < step; the mean error is 0 (see above).
        """
        if not 0 < factor <= 1:
            raise ValueError(f"expected a factor in (0, 1], got {factor}")
        if values.ndim != 1 or values.dtype not in (np.float32, np.float64):
            raise ValueError(
                f"expected a vector of float32 or float64, got {values.dtype} {values.shape}"
            )
        self._check(values)
        return self._round(values, factor / self.step, random(KEY_BYTES))

    def decode(self, total: RingArray) -> NDArray[np.float64]:
        """Return Σ factor · values (d,) from the sum of the members' encoded vectors."""
        return np.multiply(self.ring.signed(total), self.step, dtype=np.float64)

    def _check(self, values: Values) -> None:
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if -self.limit <= low and high <= self.limit:  # false for NaN
            return
        wrong = ~(np.abs(values) <= np.float64(self.limit))  # a float32 may round to the limit
        at, count = int(np.argmax(wrong)), int(np.count_nonzero(wrong))
        finite = math.isfinite(low) and math.isfinite(high)
        beyond = f"the largest {max(-low, high):g}" if finite else "training diverged"
        detail = f"{count} of {len(values)} values; number {at} is {values[at]}, {beyond}"
        if not finite:
            raise OutOfRange(
                "the update has values that are not finite, and is not sent: training diverged; "
                "lower the learning rate",
                detail,
            )
        raise OutOfRange(
            f"the update has values beyond secure_aggregation.range = ±{self.limit:g}, and is not "
            "sent: raise secure_aggregation.range, or lower the learning rate",
            detail,
        )

    def _round(self, values: Values, scale: float, key: bytes) -> RingArray:
        size = min(CHUNK, len(values))
        zeros, keystream = memoryview(bytes(4 * size)), memoryview(bytearray(4 * size))
        words = np.frombuffer(keystream, "<u4")
        scaled, dither = np.empty(size), np.empty(size)
        result = self.ring.zeros(len(values))
        signed = result.view(f"<i{self.ring.dtype.itemsize}")
        stream = cipher("chacha20", key).encryptor()
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK]
            count = len(part)
            stream.update_into(zeros[: 4 * count], keystream)
            y, r = scaled[:count], dither[:count]
            np.multiply(part, scale, out=y, dtype=np.float64)
            np.multiply(words[:count], 2.0**-32, out=r)
            np.add(y, r, out=y)
            np.floor(y, out=y)
            np.copyto(signed[start : start + count], y, casting="unsafe")
        return result


def ring_for(members: int, value_bits: int, ring: RingBits | None = None) -> Ring:
    """Return the narrowest ring, or the one given, in which the sum cannot overflow.

    The rule: 2^(value_bits − 1) · members < 2^(bits − 1). Raises ConfigError if it is broken.
    """
    if members < 1 or value_bits < 2:
        raise ConfigError(
            f"expected 1 member or more and values of 2 bits or more, got {members} and "
            f"{value_bits}"
        )
    for bits in RINGS if ring is None else (ring,):
        if members << (value_bits - 1) < 1 << (bits - 1):
            return Ring(bits)
    raise ConfigError(
        f"values of {value_bits} bits from {members} members overflow a ring of "
        f"{RINGS[-1] if ring is None else ring} bits; lower secure_aggregation.value_bits"
        f"{'' if ring is None else ' or take a wider secure_aggregation.ring'}"
    )


def digits(members: int, ring: Ring) -> int:
    """Return d, the bits of a counter in one ring value: members · (2^d − 1) < 2^bits."""
    if members < 1:
        raise ConfigError(f"expected 1 member or more, got {members}")
    width = (((1 << ring.bits) - 1) // members + 1).bit_length() - 1
    if width < 1:
        raise ConfigError(
            f"a ring of {ring.bits} bits has no room for the counters of {members} members; "
            "take a wider secure_aggregation.ring"
        )
    return width


def slots(ring: Ring, members: int) -> int:
    """Return how many ring values a counter takes."""
    return -(-COUNTER_BITS // digits(members, ring))


def write_counters(values: Sequence[int], ring: Ring, members: int) -> RingArray:
    """Return the digits of `values` (each 0 … 2⁴⁸ − 1) as ring elements (len · slots,)."""
    width, count = digits(members, ring), slots(ring, members)
    for value in values:
        if not 0 <= value < 1 << COUNTER_BITS:
            raise DataError(f"a counter must be 0 … 2^{COUNTER_BITS} − 1, and one is not")
    mask = (1 << width) - 1
    cut = [value >> (width * i) & mask for value in values for i in range(count)]
    return np.array(cut, dtype=ring.dtype)


def read_counters(total: RingArray, ring: Ring, members: int) -> list[int]:
    """Return the sums of the members' counters, exact, from the sum of their vectors."""
    ring.check(total)
    width, count = digits(members, ring), slots(ring, members)
    if len(total) % count:
        raise ValueError(f"expected a multiple of {count} ring values, got {len(total)}")
    reduced: list[Any] = np.asarray(total, np.uint64).tolist()
    mask = (1 << ring.bits) - 1
    return [
        sum((reduced[at + i] & mask) << (width * i) for i in range(count))
        for at in range(0, len(reduced), count)
    ]
