"""Privacy noise that the members of a secure sum make together, as data, and what one member adds.

    S    bound   ℓ2 bound on what one client, or one record, changes in the sum
    R    S in steps of the grid: step = S / R
    d    values of an update
    D1, D2       sensitivities of the vector of whole numbers, ℓ1 and ℓ2
    V    variance of the noise in every sum that is opened, at least, in steps²
    σ    noise multiplier, √V / D2
    N, M members that advertised keys, of those that were invited
    c    ⌊colluding M⌋: members that may tell the coordinator all they know
    a    honest members in every sum that can be opened, at least: needed − c (plan.py), and on a
         sparse graph, where a coordinator that lies may open sums of fewer, at most k + 2 − t
         (graph.py)

Each member adds Skellam noise (skellam.py) of variance ⌈V / a⌉ before it masks. Skellam noise is
closed under sums, so what is opened has noise of variance V or more that nobody knows: from a
honest members V, from each further one V / a more. The sum mod 2^b, and all that is made of it,
is post-processing: a ring that is too narrow costs accuracy and no privacy.

Unit "client". Neighbouring runs differ in one client's update, which is zeros in one of them. The
update is clipped to S and rounded to the grid at random; the rounding is drawn again until its
norm is within D2, with D2² the lesser of (R + √d)² and

    R² + d/4 + √(2 ln(1/β)) (R + √d/2)       β = e^(−1/2)

(Kairouz, Liu, Steinke 2021, arXiv:2102.06387, proposition 22 there: one draw fails with a chance
of at most β). The norm of whole numbers is exact, so no floating point is in the guarantee. That
a client took part is not hidden: the coordinator sees who does.

Unit "record". Neighbouring records of a site differ by one record, added or removed, whose part of
the sum is at most S. Values x are rounded as ⌊x + u⌋, u uniform and independent of all records. Of
neighbours x and x + g the results, with the same u, differ by g rounded at random, so the bound
above holds outside of an event of chance β over u; β is charged to δ (`slack`). That g is within
S holds in real numbers. Gradients of records are float32, their sum is taken in float64 and the
update rounded to float32 once: that moves it by at most 2⁻²³ of S for each record of the batch
(config_noise.MOST_BATCH). One percent of S is kept for it, and for the last bits of gradients,
which depend on what is computed beside them (MARGIN); it is not hardened beyond.

Of both, D1 <= min(√d D2, D2²), which whole numbers keep.

The published mechanisms rotate updates (Hadamard) to make large values rare, and let the others
wrap around. Here values beyond `reach` are cut to it, which makes no sensitivity larger, and
the ring is wide enough for what is left, so nothing is rotated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from anabranch.protocols import rdp
from anabranch.protocols.errors import ConfigError, PrivacyError
from anabranch.protocols.secagg.graph import company_of
from anabranch.protocols.secagg.ring import RINGS, Ring, RingArray
from anabranch.protocols.secagg.skellam import KEY_BYTES, MOST_VARIANCE, Integers, skellam
from anabranch.protocols.spend import Skellam, Spend, Unit
from anabranch.protocols.tables import SecureAggregation

Floats = NDArray[np.float64]
Random = Callable[[int], bytes]

BETA = math.exp(-0.5)  # of a client's rounding, which is drawn again
SLACK = 1e-3  # share of δ that the rounding of records takes, over all rounds
MARGIN = 0.01  # of a record's bound: for updates and gradients in float32
LEAST_RESOLUTION = 64  # R
FINENESS = 4.0  # R in √d, where the noise allows: rounding then adds 1.6 % to D2²
SPREAD = 9.0  # standard deviations of noise that the ring holds
TRIES = 200  # of a client's rounding: one in 10⁴⁰ needs more
CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class DistributedNoise:
    """Everything that decides (ε, δ) of noise that members make together."""

    unit: Unit
    bound: float  # S
    resolution: int  # R
    values: int  # d, at most
    reach: float  # values of an update are cut to ±reach
    noise_multiplier: float  # σ
    sample_rate: float  # q: chance that a record is in a batch; a client: 1
    rounds: int  # T
    slack: float  # β of one round that is charged to δ; a client: 0
    delta: float
    epsilon: float  # what all rounds cost, at most the budget

    @property
    def step(self) -> float:
        """Return the distance of neighbouring points of the grid."""
        return self.bound / self.resolution

    @property
    def squared(self) -> int:
        """Return D2², a whole number."""
        return squared_bound(self.resolution, self.values, self.slack or BETA)

    @property
    def sensitivities(self) -> Skellam:
        """Return D1, D2 and what a round costs of δ."""
        return Skellam(
            l1=math.sqrt(self.squared * min(self.values, self.squared)),
            l2=math.sqrt(self.squared),
            slack=self.slack,
        )

    @property
    def variance(self) -> int:
        """Return V."""
        return math.ceil(self.noise_multiplier**2 * self.squared)

    def local_variance(self, honest: int) -> int:
        """Return what each member's noise has where `honest` of those in the sum are."""
        return -(-self.variance // honest)

    def spend(self, rounds: int = 1, sample_rate: float | None = None) -> Spend:
        """Return what `rounds` rounds spend, of a site with its own sampling rate if given."""
        return Spend(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate if sample_rate is None else sample_rate,
            steps=rounds,
            skellam=self.sensitivities,
            unit=self.unit,
        )


def plan_noise(
    unit: Unit,
    *,
    bound: float,
    values: int,
    reach: float,
    epsilon: float,
    delta: float,
    rounds: int,
    sample_rate: float = 1.0,
) -> DistributedNoise:
    """Return the least noise, σ to PRECISION, that keeps all rounds within (epsilon, delta).

    The grid is as fine as rounding needs, and coarser where the noise is so large that it would
    be beyond what is drawn. Raises PrivacyError if no noise reaches ε.
    """
    slack = SLACK * delta / rounds if unit == "record" else 0.0
    resolution = max(LEAST_RESOLUTION, math.ceil(FINENESS * math.sqrt(values)))
    while True:
        found = DistributedNoise(
            unit=unit,
            bound=bound,
            resolution=resolution,
            values=values,
            reach=reach,
            noise_multiplier=1.0,
            sample_rate=sample_rate,
            rounds=rounds,
            slack=slack,
            delta=delta,
            epsilon=epsilon,
        )
        sensitivities = found.sensitivities
        sigma = rdp.least_noise(epsilon, delta, sample_rate, rounds, sensitivities)
        found = replace(found, noise_multiplier=sigma)
        if found.variance <= MOST_VARIANCE:
            return replace(found, epsilon=rdp.epsilon_of([found.spend(rounds)], delta))
        if resolution <= LEAST_RESOLUTION:
            raise PrivacyError(
                f"epsilon = {epsilon:g} at delta = {delta:g} over {rounds} rounds needs noise of "
                f"{sigma:.1f} x the bound on one {unit}, and nothing can be learned from that: "
                "take a larger epsilon or fewer rounds"
            )
        resolution = max(LEAST_RESOLUTION, resolution // 2)


def squared_bound(resolution: int, values: int, beta: float) -> int:
    """Return D2² of a vector of norm R, rounded at random, but for a chance of `beta`."""
    root = math.sqrt(values)
    likely = resolution**2 + values / 4
    likely += math.sqrt(2 * math.log(1 / beta)) * (resolution + root / 2)
    return math.ceil(min((resolution + root) ** 2, likely))


def honest_members(advertised: int, invited: int, secure: SecureAggregation) -> int:
    """Return a of a sum to which `invited` members were asked, and `advertised` sent keys.

    All colluding ones among the invited are taken to be in the sum: a coordinator decides whose
    keys arrive. Raises ConfigError if there are too few others for a sum.
    """
    return company_of(
        advertised,
        invited,
        minimum=secure.minimum,
        share=secure.threshold,
        colluding=secure.colluding,
        grouped=False,
    ).honest


def ring_limit(
    noise: DistributedNoise, members: int, secure: SecureAggregation
) -> tuple[Ring, float]:
    """Return the ring of a sum, and the `limit` with which Grid(ring, members, limit) has `step`.

    The ring is the narrowest, or the one in the configuration, that holds the sum of all updates
    and SPREAD standard deviations of noise, if all send keys. Where few do, each makes more noise,
    and it holds less of it: that costs accuracy. Raises ConfigError if there is none.
    """
    local = noise.local_variance(honest_members(members, members, secure))
    largest = members * (math.ceil(noise.reach / noise.step) + 1)
    largest += math.ceil(SPREAD * math.sqrt(members * local))
    for bits in RINGS if secure.ring is None else (secure.ring,):
        ring = Ring(bits)
        levels = min((2 ** (bits - 1) - 1) // members - 1, 2**40)
        if levels >= 1 and largest <= 2 ** (bits - 1) - 1:
            return ring, noise.step * levels
    wanted = next((bits for bits in RINGS if largest <= 2 ** (bits - 1) - 1), RINGS[-1])
    raise ConfigError(
        f"secure_aggregation.ring = {secure.ring}: the sum of {members} updates and their noise "
        f"reaches {largest} steps of the grid. Set it to {wanted}, or leave it out"
    )


def noised(
    values: NDArray[np.floating[Any]],
    noise: DistributedNoise,
    honest: int,
    random: Random,
) -> Integers:
    """Return what a member puts into the sum: its update (d,) in steps, rounded, with its noise.

    `values` are the update as it was computed: a client's is clipped to S here, a record's sum is
    taken to change by at most S with one record. `random` gives keys, from `secrets` in a real
    run. An update that is not finite counts as zeros: a refusal would tell of it. A result is
    masked and sent once; the round that needs another has to be reserved again.

    Raises PrivacyError for more values than planned, or a variance that cannot be drawn.
    """
    if values.ndim != 1 or len(values) > noise.values:
        raise PrivacyError(
            f"an update of shape {values.shape}: the noise is planned for a vector of at most "
            f"{noise.values} values. Nothing is sent"
        )
    scaled = _scaled(values, noise)
    if noise.unit == "client":
        rounded = rounded_within(scaled, noise.squared, random)
    else:
        rounded = dithered(scaled, random)
    return rounded + skellam(noise.local_variance(honest), len(values), random)


def in_ring(values: Integers, ring: Ring) -> RingArray:
    """Return whole numbers (d,) mod 2^bits, as the ring has them; of 24 bits the lower ones."""
    return values.astype(np.uint64).astype(ring.dtype)


def rounded_within(values: Floats, most: int, random: Random) -> Integers:
    """Return `values` (d,), in steps, rounded at random to whole numbers with Σ x² <= `most`.

    Drawn again until it is; after TRIES draws, which a vector within the bound of squared_bound
    practically never needs, towards zero. Raises PrivacyError if that is beyond `most`, too.
    """
    for _ in range(TRIES):
        rounded = dithered(values, random)
        if _square(rounded) <= most:
            return rounded
    rounded = np.trunc(values).astype(np.int64)
    if _square(rounded) > most:
        raise PrivacyError(
            f"an update is beyond its bound, a squared norm of {most} steps²: it was not clipped. "
            "Nothing is sent"
        )
    return rounded


def dithered(values: Floats, random: Random) -> Integers:
    """Return ⌊x + u⌋ of `values` x (d,), u uniform on the multiples of 2⁻³² in [0, 1)."""
    stream = Cipher(ChaCha20(random(KEY_BYTES), nonce=bytes(16)), mode=None).encryptor()
    result = np.empty(len(values), np.int64)
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        words = np.frombuffer(stream.update(bytes(4 * len(part))), "<u4")
        moved = words * 2.0**-32
        np.add(moved, part, out=moved)
        np.copyto(result[start : start + CHUNK], np.floor(moved, out=moved), casting="unsafe")
    return result


def _scaled(values: NDArray[np.floating[Any]], noise: DistributedNoise) -> Floats:
    """Return the update in steps: clipped if it is a client's, every value within the reach."""
    scaled = values.astype(np.float64)
    norm = float(np.linalg.norm(scaled))
    if not math.isfinite(norm):
        return np.zeros_like(scaled)
    factor = 1 / noise.step
    if noise.unit == "client" and norm > noise.bound:
        factor *= noise.bound / norm
    scaled *= factor
    most = noise.reach / noise.step
    return np.clip(scaled, -most, most, out=scaled)


def _square(values: Integers) -> int:
    """Return Σ x², exact: no chunk of it can overflow."""
    largest = int(np.abs(values).max(initial=0))
    if largest * largest * CHUNK >= 2**62:
        return sum(x * x for x in values.tolist())
    parts = (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))
    return sum(int(part @ part) for part in parts)
