"""FedSA-LoRA: A is shared, B and the head stay at the sites (Guo et al. 2025, arXiv:2410.01463).

    A_{t+1} = A_t + Σ_k p_k ΔA_k            client k keeps B_k and its dense tensors

Every site ends with a model of its own, B_k A. The coordinator never sees a B_k, so it cannot
measure how far a mean of products would be from that: Merged.error is None.
"""

from __future__ import annotations

from anabranch.server.aggregation.factor import merge_factor, part_of
from anabranch.server.aggregation.mean import Combine, weighted_mean
from anabranch.server.aggregation.products import Weighting
from anabranch.server.aggregation.rule import Rule


def fedsa(
    weighting: Weighting = "examples", *, seed: int = 0, combine: Combine = weighted_mean
) -> Rule[None]:
    """Return FedSA-LoRA; `seed` decides which ranks a weak client trains."""
    return Rule(
        name="fedsa",
        init=lambda adapter: (None, adapter),
        merge=merge_factor(weighting, combine, "A", measured=False),
        part=part_of(lambda number: "A", seed, dense=False),
    )
