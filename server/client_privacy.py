"""Client-level privacy of what the coordinator publishes: the plan, the draws, what is kept back.

    q = min(1, cohort / N)      T = rounds      δ = min(1/1000, 1 / (10 N)) unless given
    z   the least noise multiplier with which T Poisson-subsampled Gaussian mechanisms of rate q
        are (ε, δ)-DP, by the same PRV accountant as record-level privacy (client/privacy.py)

Neighbouring federations differ by one client with all its records, added or removed. The
mechanism is in server/aggregation/private.py; docs/client_privacy.md says what it means.

The amplification by sampling holds against those who do not know who was drawn. So the draw
comes from the same secret stream as the noise, never from `seed`, which is in the run's file,
and what a run publishes does not say who took part (`published`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from anabranch.client.privacy import Spend, epsilon_of, least_noise
from anabranch.protocols import rdp
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.secagg.agreed_noise import noise_of, values_of
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import ClientPrivacy, Federation
from anabranch.server.aggregation.private import ClientPlan as ClientPlan
from anabranch.server.result import Result

# Noise per coordinate is z S / (q N), a client's part of the mean at most S / (q N). With N = 20
# clients, all asked in each of 50 rounds, ε = 3 needs z = 7.4: 0.37 S in every coordinate. With
# N = 100 and cohorts of 20 in 100 rounds it is z = 2.3, 0.11 S: the least that adapters bear.
LEAST_POPULATION = 100
LARGEST_DELTA = 1e-3  # that a client is betrayed outright


def plan_for(privacy: ClientPrivacy, federation: Federation) -> ClientPlan:
    """Return the plan with the least noise that keeps all rounds within the budget.

    Raises PrivacyError for fewer than LEAST_POPULATION clients, with the noise that they would
    need; for δ >= 1/N; and if no noise multiplier reaches ε.
    """
    population = privacy.population
    delta = default_delta(population) if privacy.delta is None else privacy.delta
    if delta >= 1 / population:
        raise PrivacyError(
            f"client_privacy.delta = {delta:g} is not below 1/N = {1 / population:g} of "
            f"{population} clients: it would allow releasing whole clients. Set it to at most "
            f"{default_delta(population):g}, or leave it out"
        )
    rate = cohort_rate(federation.cohort, population)
    noise = _least_noise(privacy.epsilon, delta, rate, federation.rounds)
    if population < LEAST_POPULATION:
        raise PrivacyError(_too_few(privacy, federation, delta, rate, noise))
    spend = Spend(noise_multiplier=noise, sample_rate=rate, steps=federation.rounds)
    return ClientPlan(
        population=population,
        sample_rate=rate,
        rounds=federation.rounds,
        noise_multiplier=noise,
        clipping_norm=privacy.clipping_norm,
        adaptive=privacy.clipping == "adaptive",
        target_quantile=privacy.target_quantile,
        max_examples=privacy.max_examples,
        delta=delta,
        epsilon=epsilon_of([spend], delta),
    )


def plan_of(config: RunConfig) -> ClientPlan | None:
    """Return the plan of a run, None without [client_privacy]; raises as plan_for does.

    None, too, with [secure_aggregation]: the members make the noise (secagg/agreed_noise.py).
    """
    if config.client_privacy is None or config.secure_aggregation is not None:
        return None
    return plan_for(config.client_privacy, config.federation)


def default_delta(population: int) -> float:
    """Return min(1/1000, 1 / (10 N))."""
    return min(LARGEST_DELTA, 1 / (10 * population))


def cohort_rate(cohort: int | None, population: int) -> float:
    """Return q; 1 without a cohort: every client is asked in every round."""
    return 1.0 if cohort is None else min(1.0, cohort / population)


def epsilon_after(plan: ClientPlan, rounds: int) -> float:
    """Return what the first `rounds` rounds of the plan cost, at its δ."""
    if rounds < 1:
        return 0.0
    spend = Spend(
        noise_multiplier=plan.noise_multiplier, sample_rate=plan.sample_rate, steps=rounds
    )
    return epsilon_of([spend], plan.delta)


def summed_noise(config: RunConfig, spec: AdapterSpec, rounds: int) -> dict[str, float] | None:
    """Return what the first `rounds` rounds of noised secure sums cost a client, for the log.

    None: the run's sums are not noised for clients.
    """
    noise = noise_of(config, values_of(spec))
    if noise is None or noise.unit != "client":
        return None
    return {
        "noise_multiplier": noise.noise_multiplier,
        "clipping_norm": noise.bound,
        "epsilon": rdp.epsilon_of([noise.spend(rounds)], noise.delta),
    }


class PoissonCohorts:
    """Draws cohorts: every client with chance q, independently, in every round."""

    def __init__(self, plan: ClientPlan, sample: Callable[[int, float], Iterable[int]]) -> None:
        self._plan, self._sample = plan, sample
        self.met: set[str] = set()  # every client that was ever connected

    def draw(self, connected: Sequence[str]) -> list[str]:
        """Return who of the connected clients is asked, in their order; nobody is an answer.

        A client that is not connected was drawn or not, and does not take part. Raises
        PrivacyError once more than `population` different clients have been connected.
        """
        self.met.update(connected)
        if len(self.met) > self._plan.population:
            raise PrivacyError(
                f"{len(self.met)} clients have been connected, and client_privacy.population = "
                f"{self._plan.population} fixed how many may be drawn: plan a new run for all of "
                "them"
            )
        return [connected[i] for i in self._sample(len(connected), self._plan.sample_rate)]


def published(result: Result) -> Result:
    """Return a client-private result without anything that tells who took part, or how many.

    What stays is a function of the private means and of the coordinator's own records; and of
    the clock. The coordinator's own view is in events.jsonl.
    """
    history = tuple(
        replace(
            report,
            asked=(),
            trained={},
            failed={},
            delta_norms={},
            ages={},
            evaluated={},
            client={},
            bytes_up=0,
            bytes_down=0,
        )
        for report in result.history
    )
    return replace(result, history=history, sites={}, bytes_up=0, bytes_down=0)


def _least_noise(epsilon: float, delta: float, rate: float, rounds: int) -> float:
    try:
        return least_noise(epsilon, delta, rate, rounds)
    except PrivacyError:
        raise PrivacyError(
            f"client_privacy.epsilon = {epsilon:g} at delta = {delta:g} cannot be reached in "
            f"{rounds} rounds with cohorts of {rate:.4f} of the population: take a larger epsilon, "
            "fewer rounds or a smaller cohort"
        ) from None


def _too_few(
    privacy: ClientPrivacy, federation: Federation, delta: float, rate: float, noise: float
) -> str:
    n = privacy.population
    return (
        f"client_privacy.population = {n}: too few clients for client-level privacy, which needs "
        f"at least {LEAST_POPULATION}; epsilon = {privacy.epsilon:g} at delta = {delta:g} over "
        f"{federation.rounds} rounds would take noise multiplier {noise:.2f}, in every round noise "
        f"of {noise / (rate * n):.3g} x clipping_norm on each coordinate of the mean update. "
        "Protect records instead: leave [client_privacy] out and set [privacy], which is "
        "record-level DP at the sites"
    )
