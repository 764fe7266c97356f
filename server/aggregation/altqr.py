"""AltQR-LoRA: alternate as RoLoRA does, and make the frozen factor a frame first.

    odd rounds:    A^T = Q T    A <- Q^T,  B <- B T^T      then   B <- B + Σ_k p_k ΔB_k
    even rounds:   B   = Q T    B <- Q,    A <- T A        then   A <- A + Σ_k p_k ΔA_k

The product B A is the same before and after the QR. The alternation is that of RoLoRA
(arXiv:2502.01755), the random choice of ranks for weak clients after FSLoRA (arXiv:2501.19389);
the re-gauge is this project's. Because the frozen factor is an isometry, a learning rate, a
clipping norm and DP noise mean the same in every round: noise ξ on B enters the product as ξ A
with ‖ξ A‖_F = ‖ξ‖_F.

Factors of two rounds have different gauges: no server optimiser, no late deltas.
"""

from __future__ import annotations

from anabranch.protocols.adapter import Adapter
from anabranch.server.aggregation.factor import merge_factor, part_of
from anabranch.server.aggregation.gauge import orthonormal_columns, orthonormal_rows, regauged
from anabranch.server.aggregation.mean import Combine, weighted_mean
from anabranch.server.aggregation.products import Weighting
from anabranch.server.aggregation.rolora import turn
from anabranch.server.aggregation.rule import Rule


def altqr(
    weighting: Weighting = "examples", *, seed: int = 0, combine: Combine = weighted_mean
) -> Rule[None]:
    """Return AltQR-LoRA; `seed` decides which ranks a weak client trains."""

    def open_round(state: None, adapter: Adapter, number: int) -> Adapter:
        gauge = orthonormal_rows if turn(number) == "B" else orthonormal_columns
        return regauged(adapter, gauge)

    return Rule(
        name="altqr",
        init=lambda adapter: (None, adapter),
        merge=merge_factor(weighting, combine),
        open=open_round,
        part=part_of(turn, seed),
        regauges=True,
    )
