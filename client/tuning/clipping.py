"""How one record's gradient is bounded, and how the bound moves. Pure arithmetic.

C clipping norm, g the record's gradient over all L trained tensors, g_l that of one of them.

    flat        g · min(1, C / (‖g‖ + 10⁻⁶))         Abadi et al. 2016, arXiv:1607.00133
    automatic   g · C / (‖g‖ + 0.01)                 AUTO-S; Bu et al. 2022, arXiv:2206.07136
    per-layer   g_l · min(1, (C/√L) / (‖g_l‖ + 10⁻⁶))     McMahan et al. 2018, arXiv:1710.06963
    adaptive    flat, with a C that follows a quantile of the norms (below)

All have ‖ḡ‖ < C, for per-layer because Σ_l C²/L = C². 10⁻⁶ is Opacus' and guards g = 0.

Adaptive (Andrew et al. 2021, arXiv:1905.03871): z is the plan's noise multiplier and m = qn the
expected batch. One step releases two sums at once,

    Σ ḡ_i + z_g C · N(0, I)                    z_g = (z⁻² − (2σ_b)⁻²)^(−1/2)     theorem 1
    Σ (b_i − ½) + σ_b · N(0, 1)                b_i = 1 if ‖g_i‖ was within C, σ_b = max(m/20, z)

b_i − ½ is ±½, so the second has sensitivity ½ and is a Gaussian mechanism of noise multiplier
2σ_b: together z_g⁻² + (2σ_b)⁻² = z⁻², exactly what the plan accounts. σ_b >= z keeps the root
real. Then, with b̃ = ½ + (that noisy sum) / m, the noisy share of records within C, and t the
target quantile,

    C ← C · exp(−0.2 (b̃ − t))                  eq. 2 there

which needs no data: more records within C than wanted make C smaller. C stays within a factor
of 10⁴ of the plan's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anabranch.client.privacy import DpPlan
from anabranch.protocols.tables import Clipping

STABILITY = 1e-6  # Opacus'
AUTOMATIC_STABILITY = 0.01  # gamma of AUTO-S, the value of the paper
LEARNING_RATE = 0.2  # of ln C
COUNT_SHARE = 1 / 20  # σ_b as a share of the expected batch: the paper's
RANGE = 1e4  # how far C may go from the plan's, as a factor


def clipping_factors(clipping: Clipping, norms: Tensor, clipping_norm: float | Tensor) -> Tensor:
    """Return what every gradient is multiplied by.

    `norms` and the result are (R,), norms over all tensors; with "per-layer" both are (L, R),
    norms of each tensor. `clipping_norm` is one for all records, or (R,).
    """
    if clipping == "automatic":
        return clipping_norm / (norms + AUTOMATIC_STABILITY)
    bound = clipping_norm / math.sqrt(len(norms)) if clipping == "per-layer" else clipping_norm
    return (bound / (norms + STABILITY)).clamp_(max=1.0)


def count_noise(noise_multiplier: float, expected_batch: float) -> float:
    """Return σ_b, the noise on the number of records within C."""
    return max(expected_batch * COUNT_SHARE, noise_multiplier)


def gradient_noise(noise_multiplier: float, count_sigma: float) -> float:
    """Return z_g. Raises ValueError unless the count alone costs less than the plan."""
    if 2 * count_sigma <= noise_multiplier:
        raise ValueError(f"expected count noise above {noise_multiplier / 2}, got {count_sigma}")
    return 1 / math.sqrt(noise_multiplier**-2 - (2 * count_sigma) ** -2)


def joint_noise(gradient_sigma: float, count_sigma: float) -> float:
    """Return the noise multiplier of both releases together: what the accountant counts."""
    return 1 / math.sqrt(gradient_sigma**-2 + (2 * count_sigma) ** -2)


def within(factors: Tensor) -> Tensor:
    """Return Σ (b_i − ½) for factors (R,) of flat clipping."""
    return (factors >= 1).sum() - len(factors) / 2


def next_norm(clipping_norm: float, plan: DpPlan, noisy_sum: float, expected_batch: float) -> float:
    """Return C after a step that released `noisy_sum`."""
    share = 0.5 + noisy_sum / expected_batch
    exponent = -LEARNING_RATE * (share - plan.target_quantile)
    start = plan.clipping_norm
    logarithm = min(max(math.log(clipping_norm / start) + exponent, -_SPAN), _SPAN)
    return start * math.exp(logarithm)


_SPAN = math.log(RANGE)


def total_norms(norms: Tensor) -> Tensor:
    """Return the norms (R,) over all blocks for norms (K, R) of each."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(norms, dim=0)
