"""How the learning rate changes over a whole run. Pure arithmetic.

    warm-up   (step + 1) / w                 steps 0 … w − 1, w = ⌈warmup × total⌉
    constant  1
    linear    (total − step) / (total − w)
    cosine    (1 + cos(π (step − w) / (total − w))) / 2

Rounds continue where the last one ended: `step` counts from the first step of the run.
"""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(
    step: int, total: int, warmup: float, schedule: Literal["constant", "linear", "cosine"]
) -> float:
    """Return the factor in (0, 1] on the learning rate at `step` of `total`.

    `warmup` is a share of the run's steps in [0, 1). Raises ValueError unless
    0 <= step < total.
    """
    if not 0 <= step < total:
        raise ValueError(f"expected a step in [0, {total}), got {step}")
    if not 0 <= warmup < 1:
        raise ValueError(f"expected warmup in [0, 1), got {warmup}")
    warm = math.ceil(warmup * total)
    if step < warm:
        return (step + 1) / warm
    if schedule == "linear":
        return (total - step) / (total - warm)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
    return 1.0
