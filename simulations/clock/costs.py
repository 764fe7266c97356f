"""What a round costs a device: seconds, joules and grams of CO₂, as plain arithmetic.

Every function takes numbers or arrays of one length, and nothing else: no clock, no state.

    transfer   8 · bytes / bps                          seconds; bps is bits per second
    compute    FLOPs / (gflops · 10⁹)                   seconds; gflops is sustained, in training
    energy     compute_watts · compute_s + network_watts · network_s          joules
    CO₂        joules / 3.6·10⁶ · g/kWh                                       grams

Draws of one client in one round depend on (seed, purpose, round, client) alone, through
SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): so they
do not depend on who else takes part, on the order, or on the engine.
"""

from __future__ import annotations

import math
from typing import Any, Final, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from anabranch.simulations.population.regions import JOULES_PER_KWH

Number = TypeVar("Number", float, NDArray[np.float64])

MASK: Final = (1 << 64) - 1


def transfer_s(num_bytes: float, bps: Number) -> Number:
    """Return the seconds that `num_bytes` need at `bps` bits per second."""
    return 8 * num_bytes / bps


def compute_s(flops: Number, gflops: Number) -> Number:
    """Return the seconds that `flops` floating-point operations need."""
    return flops / (gflops * 1e9)


def joules(
    compute_s: Number, network_s: Number, compute_watts: Number, network_watts: Number
) -> Number:
    """Return the energy of training and of sending and receiving."""
    return compute_watts * compute_s + network_watts * network_s


def grams(energy: Number, g_per_kwh: Number) -> Number:
    """Return the grams of CO₂-equivalents of `energy` joules."""
    return energy / JOULES_PER_KWH * g_per_kwh


def records_used(records: int, batch_size: int, steps: int) -> int:
    """Return how often a record enters a step: shuffled epochs, the last batch of each smaller."""
    if records < 1:
        return 0
    per_epoch = math.ceil(records / batch_size)
    epochs, rest = divmod(steps, per_epoch)
    return epochs * records + min(rest * batch_size, records)


def spent(parts: tuple[float, float, float], elapsed: float) -> tuple[float, float, float]:
    """Return how much of (download, compute, upload) seconds was done after `elapsed` seconds."""
    down, compute, up = parts
    return (
        min(down, elapsed),
        min(compute, max(0.0, elapsed - down)),
        min(up, max(0.0, elapsed - down - compute)),
    )


@overload
def uniform(seed: int, purpose: int, number: int, client: int) -> float: ...
@overload
def uniform(
    seed: int, purpose: int, number: int, client: NDArray[np.uint64]
) -> NDArray[np.float64]: ...
def uniform(
    seed: int, purpose: int, number: int, client: int | NDArray[np.uint64]
) -> float | NDArray[np.float64]:
    """Return a draw in [0, 1) of a client, or of an array of them, in a round."""
    state = 0
    for value in (seed, purpose, number):
        state = _mix((state + value) & MASK)
    bits: Any = _mix((client + state) & MASK)
    drawn: float | NDArray[np.float64] = (bits >> 11) * 2.0**-53
    return drawn


def lognormal(sigma: float, first: float, second: float) -> float:
    """Return exp(sigma · z) for the standard normal z of two uniform draws (Box and Muller)."""
    if not sigma:
        return 1.0
    return math.exp(sigma * math.sqrt(-2 * math.log1p(-first)) * math.cos(2 * math.pi * second))


def _mix(value: Any) -> Any:
    """Return SplitMix64's output for a state, an int or uint64 values; both below 2⁶⁴."""
    z = (value + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)
