"""Client-level privacy of what the coordinator publishes: the plan, and how much noise it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClientPlan:
    """Everything that decides client-level (ε, δ) of a run; neighbours differ by one client."""

    population: int  # N
    sample_rate: float  # q: chance that a client is in a round's cohort (Poisson sampling)
    rounds: int
    noise_multiplier: float  # z: noise on the sum of clipped updates, over S
    clipping_norm: float  # S, the first one if adaptive
    adaptive: bool
    target_quantile: float
    max_examples: int | None  # weights min(n_k / max_examples, 1); None: all weigh 1
    delta: float
    epsilon: float  # what the whole run costs, at most the budget
