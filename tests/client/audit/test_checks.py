"""Each test of the mechanism: honest data pass as often as promised, dishonest data do not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from anabranch.client.audit import checks
from anabranch.client.audit.checks import Check, Floats, Ints

TRIALS, LEVEL = 300, 0.05
SIGMA, RATE, PEOPLE = 1.5, 0.2, 200


def noise(rng: np.random.Generator, *shape: int) -> Floats:
    return SIGMA * rng.normal(size=shape)


def level(rng: np.random.Generator, scale: float = 1.0) -> Check:
    return checks.noise_level(scale * noise(rng, 20, 10), SIGMA)


def per_tensor(rng: np.random.Generator, scale: float = 1.0) -> Check:
    values = noise(rng, 20, 10)
    values[:, 3] *= scale
    tensors = np.array([0, 0, 0, 2, 1, 1, 1, 1, 1, 1])
    return checks.noise_per_tensor([(tensors, values), (tensors[4:], values[:, 4:])], SIGMA)


def following(rng: np.random.Generator, power: float = 0.0, level: float = LEVEL) -> Check:
    drawn = rng.binomial(PEOPLE, RATE, 60)
    z = noise(rng, 60, 8) * (RATE * PEOPLE / drawn[:, None]) ** power
    sizes, runs = np.full(60, 8), np.repeat([0, 1], 30)
    return checks.noise_and_batch((z**2).sum(1), sizes, drawn, runs, rng, level)


def shared(rng: np.random.Generator, weight: float = 0.0) -> Check:
    a, b = noise(rng, 100), noise(rng, 100)
    return checks.shared_noise("clients", [(a, weight * a + math.sqrt(1 - weight**2) * b)])


def clipped(rng: np.random.Generator, norm: float = 1.0) -> Check:
    return checks.clipping(norm + noise(rng, 400), SIGMA)


def rate(rng: np.random.Generator, factor: float = 1.0) -> Check:
    trials = np.full(50, PEOPLE)
    return checks.sampling_rate(rng.binomial(trials, factor * RATE), trials, RATE)


def batches(rng: np.random.Generator, counts: Ints | None = None, level: float = LEVEL) -> Check:
    trials = np.full(50, PEOPLE)
    drawn = rng.binomial(trials, RATE) if counts is None else counts
    return checks.dispersion("batch sizes", drawn, trials, RATE, rng, level)


HONEST: list[Callable[[np.random.Generator], Check]] = [
    level,
    following,
    shared,
    clipped,
    rate,
    batches,
]
DISHONEST: dict[str, Callable[[np.random.Generator], Check]] = {
    "noise off": lambda rng: level(rng, 0.0),
    "σ halved": lambda rng: level(rng, 0.5),
    "one value without noise": lambda rng: per_tensor(rng, 0.0),
    "divided by the batch": lambda rng: following(rng, 3.0, 1e-3),
    "one stream": lambda rng: shared(rng, 1.0),
    "half a stream": lambda rng: shared(rng, 0.5),
    "clipped to 2 C": lambda rng: clipped(rng, 2.0),
    "rate doubled": lambda rng: rate(rng, 2.0),
    "batches of a fixed size": lambda rng: batches(rng, np.full(50, 40), 1e-3),
    "batches too unlike": lambda rng: batches(rng, np.tile([20, 60], 25), 1e-3),
}


@pytest.mark.parametrize("check", HONEST, ids=lambda f: f.__name__)
def test_honest_data_fail_as_often_as_the_level_says(
    check: Callable[[np.random.Generator], Check],
) -> None:
    """p-values are uniform, or larger: at most LEVEL of them are below it."""
    rng = np.random.default_rng(11)
    values = np.array([check(rng).p_value for _ in range(TRIALS)])

    assert (values < LEVEL).mean() <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / TRIALS)
    assert 0.4 < values.mean() < 0.65


@pytest.mark.parametrize("bug", DISHONEST)
def test_dishonest_data_fail(bug: str) -> None:
    assert all(DISHONEST[bug](np.random.default_rng(seed)).p_value < 1e-2 for seed in range(5))


def test_more_noise_than_planned_is_no_failure() -> None:
    assert level(np.random.default_rng(0), 2.0).p_value > 0.99


def test_the_interval_of_sigma_covers_it() -> None:
    rng = np.random.default_rng(3)
    covered = [low <= SIGMA <= high for low, high in (_interval(rng) for _ in range(400))]

    assert np.mean(covered) == pytest.approx(0.95, abs=0.04)


def _interval(rng: np.random.Generator) -> tuple[float, float]:
    return checks.sigma_interval(noise(rng, 100))


def test_with_full_batches_everybody_is_in_every_one() -> None:
    rng, trials = np.random.default_rng(0), np.full(5, PEOPLE)
    for counts, p in ((trials, 1.0), (trials - 1, 0.0)):
        assert checks.sampling_rate(counts, trials, 1.0).p_value == p
        assert checks.dispersion("batch sizes", counts, trials, 1.0, rng, LEVEL).p_value == p


def test_looking_at_every_tensor_is_paid_for() -> None:
    values = noise(np.random.default_rng(4), 20, 3) * np.array([1.0, 0.8, 1.0])
    alone = checks.noise_level(values[:, 1], SIGMA).p_value

    found = checks.noise_per_tensor([(np.arange(3), values)], SIGMA).p_value

    assert 0.001 < alone < 0.2
    assert found == pytest.approx(3 * alone, rel=1e-9)


def test_a_simulated_p_value_is_never_0() -> None:
    null = np.arange(1.0, 100.0)  # 99 values

    assert checks.two_sided(1e9, null) == checks.two_sided(-1e9, null) == 2 / 100
    assert checks.two_sided(98.5, null) == 4 / 100
    assert checks.two_sided(50.0, null) == 1


def test_a_p_value_can_get_below_the_level_it_is_made_for() -> None:
    for small in (1e-2, 1e-3, 1e-4):
        count, most = checks.simulated(small)
        assert checks.two_sided(1e9, np.zeros(count)) < small
        assert most >= 50


def test_steps_are_counted_without_chance() -> None:
    assert checks.steps_taken(20, 20).p_value == 1
    assert checks.steps_taken(21, 20).p_value == 0
