"""FFA-LoRA: A is frozen for ever, clients train B (Sun et al. 2024, arXiv:2403.12313, section 4).

    B_{t+1} = B_t + Σ_k p_k ΔB_k            A: orthonormal rows, fixed

The paper freezes A as it was drawn; here its rows are made orthonormal first, the product
unchanged. That is FedSVD (arXiv:2505.12805), whose SVD only turns A inside its own row space.

A never changes, so server optimisers and late deltas fit. The row space of A bounds what can be
learned: take altqr where that matters.
"""

from __future__ import annotations

from anabranch.protocols.adapter import Adapter
from anabranch.server.aggregation.factor import merge_factor, part_of
from anabranch.server.aggregation.gauge import orthonormal_rows, regauged
from anabranch.server.aggregation.mean import Combine, weighted_mean
from anabranch.server.aggregation.products import Weighting
from anabranch.server.aggregation.rule import Rule


def ffa(
    weighting: Weighting = "examples", *, seed: int = 0, combine: Combine = weighted_mean
) -> Rule[None]:
    """Return FFA-LoRA with orthonormal A; `seed` decides which ranks a weak client trains."""

    def init(adapter: Adapter) -> tuple[None, Adapter]:
        return None, regauged(adapter, orthonormal_rows)

    return Rule(
        name="ffa",
        init=init,
        merge=merge_factor(weighting, combine, "B"),
        part=part_of(lambda number: "B", seed),
    )
