"""RoLoRA: B in odd rounds, A in even ones (Chen et al. 2025, arXiv:2502.01755, Algorithm 1).

    odd:   B_{t+1} = B_t + Σ_k p_k ΔB_k        even:   A_{t+1} = A_t + Σ_k p_k ΔA_k

The gauge stays, so a server optimiser fits: each factor has its own moments, which wait while
the other one is trained.
"""

from __future__ import annotations

from anabranch.server.aggregation.factor import Factor, merge_factor, part_of
from anabranch.server.aggregation.mean import Combine, weighted_mean
from anabranch.server.aggregation.products import Weighting
from anabranch.server.aggregation.rule import Rule


def rolora(
    weighting: Weighting = "examples", *, seed: int = 0, combine: Combine = weighted_mean
) -> Rule[None]:
    """Return RoLoRA; `seed` decides which ranks a weak client trains."""
    return Rule(
        name="rolora",
        init=lambda adapter: (None, adapter),
        merge=merge_factor(weighting, combine),
        part=part_of(turn, seed),
    )


def turn(number: int) -> Factor:
    """Return the factor that a round trains; rounds are numbered from 1."""
    return "B" if number % 2 else "A"
