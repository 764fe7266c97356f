"""One step of private training whose noise is added later, in a secure sum.

    B ~ every record with chance q, independently           Poisson sampling
    g = Σ_{i in B} ḡ_i / b                                   ḡ_i clipped to C, b = batch_size
    update = − lr · g

As in private.py, but for three things. No noise is added: the members of the secure sum add it to
the sum of their updates (protocols/secagg/noise.py), so what is returned here must never leave
by itself. The denominator is b at every site, whatever number of records it has: one record is
lr · C / b of the update everywhere, which is what the noise is made for. And the update is computed
from the gradient, not as a difference of weights: that a float32 weight rounds would move an
update by more than one record does. For the same reason the sum is taken in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from anabranch.client.privacy import DpPlan, Spend
from anabranch.client.tuning.active import only
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import HEAD
from anabranch.client.tuning.private import PHYSICAL_BATCH, private_steps, require_planned
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Engine, Training


@dataclass(frozen=True, kw_only=True, eq=False)
class Unnoised:
    """What a site learned in one round, without noise: for the secure sum alone."""

    update: dict[str, NDArray[np.float32]]  # of every tensor that is trained, in full shape
    spend: Spend
    engine: Engine


def fit_unnoised(
    classifier: Classifier,
    examples: Examples,
    plan: DpPlan,
    config: Training,
    *,
    step_offset: int,
    part: Part = WHOLE,
    engine: Engine = "fast",
    randomness: Randomness | None = None,
    physical_batch: int = PHYSICAL_BATCH,
) -> Unnoised:
    """Return − lr · (sum of clipped gradients of one Poisson batch) / batch_size.

    The adapter is as it was. One record more or less changes the update by at most
    lr · C / batch_size in ℓ2 norm, up to what noise.MARGIN is for. Raises PrivacyError if the
    plan is for other data, for local noise, or a module mixes records.
    """
    if plan.together is None:
        raise PrivacyError("this plan has noise of its own: train with fit_private")
    require_planned(plan, config, len(examples), 1, step_offset)
    randomness = randomness or Randomness.fresh()
    with only(classifier, part, None) as active:
        try:
            with private_steps(
                classifier,
                active,
                plan,
                config,
                len(examples),
                randomness,
                engine=engine,
                physical_batch=physical_batch,
            ) as step:
                chosen = randomness.sample(len(examples), plan.sample_rate)
                sums = step.unnoised(examples.take(chosen))
                update = {name: _scaled(sums[name], name, config) for name in active.parameters}
        finally:
            active.undo()
    return Unnoised(update=update, spend=plan.spend(1), engine=step.engine)


def _scaled(total: torch.Tensor, name: str, config: Training) -> NDArray[np.float32]:
    """Return − lr / batch_size times the sum of a tensor's gradients, rounded once.

    What is beyond float32 becomes infinite, and the update counts as zeros.
    """
    rate = config.learning_rate
    if name.startswith(f"{HEAD}.") and config.head_learning_rate is not None:
        rate = config.head_learning_rate
    with np.errstate(over="ignore"):
        update: NDArray[np.float32] = (total.cpu().numpy() * (-rate / config.batch_size)).astype(
            np.float32
        )
    return update
