"""From replays to the tests of an audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.client.audit import checks
from anabranch.client.audit.canaries import Seen
from anabranch.client.audit.checks import Check, Floats, Ints
from anabranch.client.audit.guesses import Guesses, best, epsilon_lower, guess, refutation
from anabranch.client.audit.replay import Replay

LEAST_VALUES = 2  # noise values that a correlation can be taken of


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is audited, in the units of one step: noise over C, chance to be drawn, steps."""

    epsilon: float
    delta: float
    sigma: float
    sample_rate: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Guessed:
    """What the guesses say of the claim."""

    best: Guesses
    p_value: float
    epsilon_lower: float


def canary_guesses(replays: Sequence[Replay], claim: Claim) -> Guessed:
    """Return the bound of guesses.py from the canaries of all replays."""
    scores = np.concatenate([one.scores for one in replays])
    included = np.concatenate([one.included for one in replays])
    rows = guess(scores, included)
    return Guessed(
        best=best(rows, claim.epsilon, claim.delta),
        p_value=refutation(rows, claim.epsilon, claim.delta),
        epsilon_lower=epsilon_lower(rows, claim.delta),
    )


def mechanism_checks(
    replays: Sequence[Replay], claim: Claim, rng: np.random.Generator, level: float
) -> list[Check]:
    """Return every direct test of one mechanism; those that nothing can be said of are left out.

    A replay in which all values are dealt to included canaries shows no noise, say. A test
    fails if its p-value is below `level`, which is fixed before (report.py).
    """
    fits = [fit for one in replays for fit in one.fits]
    found = [checks.steps_taken(len(drawn_per_step(one)), claim.steps) for one in replays]
    rows = [min(found, key=lambda check: check.p_value)]
    rows += _noise_checks(replays, fits, claim, rng, level)
    contributions = np.concatenate([fit.contributions for fit in fits])
    if len(contributions):
        rows.append(checks.clipping(contributions, claim.sigma))
    return rows + _sampling_checks(replays, fits, claim, rng, level)


def drawn_per_step(one: Replay) -> Ints:
    """Return how many records and canaries each step of a replay drew."""
    return np.concatenate([fit.drawn for fit in one.fits])


def shared_by_clients(one: Seen, other: Seen) -> list[Check]:
    """Return the test of noise shared by two clients (replay.twins)."""
    pairs = _common(one, other)
    return [checks.shared_noise("clients", pairs)] if _values(pairs) else []


def _noise_checks(
    replays: Sequence[Replay],
    fits: Sequence[Seen],
    claim: Claim,
    rng: np.random.Generator,
    level: float,
) -> list[Check]:
    noisy = [fit for fit in fits if fit.noise.size]
    if not noisy:
        return []
    noise = np.concatenate([fit.noise.ravel() for fit in noisy]).astype(np.float64)
    powers = [np.square(fit.noise, dtype=np.float64).sum(axis=1) for fit in noisy]
    sizes = [np.full(len(fit.drawn), fit.noise.shape[1]) for fit in noisy]
    of = [
        np.full(len(fit.drawn), number)
        for number, one in enumerate(replays)
        for fit in one.fits
        if fit.noise.size
    ]
    rows = [
        checks.noise_level(noise, claim.sigma),
        checks.noise_per_tensor([(f.noise_tensors, f.noise) for f in noisy], claim.sigma),
    ]
    if claim.sample_rate < 1:
        drawn = np.concatenate([fit.drawn for fit in noisy])
        rows.append(
            checks.noise_and_batch(
                np.concatenate(powers), np.concatenate(sizes), drawn, np.concatenate(of), rng, level
            )
        )
    steps = [
        (a.astype(np.float64), b.astype(np.float64))
        for fit in noisy
        for a, b in zip(fit.noise[0::2], fit.noise[1::2], strict=False)
    ]
    rounds = [
        pair
        for one in replays
        for left, right in zip(one.fits[0::2], one.fits[1::2], strict=False)
        for pair in _common(left, right)
    ]
    named = (("steps", steps), ("rounds", rounds))
    return rows + [checks.shared_noise(name, pairs) for name, pairs in named if _values(pairs)]


def _values(pairs: Sequence[tuple[Floats, Floats]]) -> bool:
    return sum(a.size for a, _ in pairs) >= LEAST_VALUES


def _common(left: Seen, right: Seen) -> list[tuple[Floats, Floats]]:
    """Return the noise of two fits at the values that both show, step by step."""
    _, at_left, at_right = np.intersect1d(left.noise_at, right.noise_at, return_indices=True)
    steps = min(len(left.noise), len(right.noise))
    if not len(at_left) or not steps:
        return []
    a, b = left.noise[:steps, at_left], right.noise[:steps, at_right]
    return [(a.astype(np.float64), b.astype(np.float64))]


def _sampling_checks(
    replays: Sequence[Replay],
    fits: Sequence[Seen],
    claim: Claim,
    rng: np.random.Generator,
    level: float,
) -> list[Check]:
    drawn = np.concatenate([fit.drawn for fit in fits])
    population = np.concatenate([np.full(len(fit.drawn), fit.population) for fit in fits])
    rate = claim.sample_rate
    rows = [
        checks.sampling_rate(drawn, population, rate),
        checks.dispersion("batch sizes", drawn, population, rate, rng, level),
    ]
    often = np.concatenate(
        [np.sum([fit.participation for fit in one.fits], axis=0) for one in replays]
    ).astype(np.int64)
    if len(often):
        steps = np.concatenate(
            [np.full(int(one.included.sum()), len(drawn_per_step(one))) for one in replays]
        )
        rows.append(checks.dispersion("participation", often, steps, rate, rng, level))
    return rows
