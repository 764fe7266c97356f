"""What a private training on a device promises, computed before it starts.

    σ  noise_multiplier   standard deviation of the noise on the sum of gradients, over C
    C  clipping_norm      L2 bound on one record's gradient
    q  sample_rate        chance that a record is in a batch (Poisson sampling)

ε comes from the Rényi accountant (protocols/rdp.py), an upper bound. The noise is a little more
than a site plans for the same budget: sites compose more tightly, with a library that a device
does not have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from anabranch.edge.runtime.device_file import Budget
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.rdp import epsilon_of, least_noise
from anabranch.protocols.spend import (
    LARGEST_EPSILON,
    LARGEST_NOISE,
    MOST_STEPS,
    SMALLEST_DELTA,
    Spend,
)
from anabranch.protocols.tables import Privacy, Training

LEAST_BATCH = 1e-3  # records expected in a batch; below it the noisy mean leaves float32


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """Everything that decides (ε, δ) of a training, and nothing that does not (no seed)."""

    noise_multiplier: float
    clipping_norm: float
    sample_rate: float
    steps: int  # that `epsilon` is of: with plan_for, those of the whole run
    delta: float
    epsilon: float
    budget: float | None = None  # ε that the run may spend at δ; None: no budget of its own

    def __post_init__(self) -> None:
        self.spend(self.steps)
        for name in ("clipping_norm", "delta", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")

    def spend(self, steps: int) -> Spend:
        """Return what `steps` steps of this plan spend."""
        return Spend(
            noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=steps
        )


def plan_for(privacy: Privacy, training: Training, steps: int, num_examples: int) -> DevicePlan:
    """Return the plan with the least noise that keeps `steps` steps, the whole run, within (ε, δ).

    q = min(1, batch_size / num_examples), δ = 1 / (10 num_examples) unless given. The same
    arguments give the same plan. Raises PrivacyError if δ >= 1/n, no noise up to LARGEST_NOISE
    reaches ε, or the run asks for what a device cannot do: clipping other than flat, class
    weights.
    """
    _require_feasible(privacy, training)
    delta = delta_for(privacy.delta, num_examples)
    require_countable(delta, steps)
    sample_rate = min(1.0, training.batch_size / num_examples)
    noise_multiplier = least_noise(privacy.epsilon, delta, sample_rate, steps)
    spend = Spend(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
    return DevicePlan(
        noise_multiplier=noise_multiplier,
        clipping_norm=privacy.clipping_norm,
        sample_rate=sample_rate,
        steps=steps,
        delta=delta,
        epsilon=epsilon_of([spend], delta),
        budget=privacy.epsilon,
    )


def plan_given(
    *,
    noise_multiplier: float,
    clipping_norm: float,
    sample_rate: float,
    delta: float,
    training: Training,
    steps: int,
    num_examples: int,
    privacy: Privacy | None = None,
) -> DevicePlan:
    """Return the plan that a gateway's task gives (edge.proto, RecordPrivacy) for its `steps`.

    `privacy` is what the signed bundle asks for: its ε is the budget of the run, and its δ counts
    if it is smaller. Raises PrivacyError for values outside their range, δ >= 1/n, an ε above
    LARGEST_EPSILON, or one above the bundle's.
    """
    if privacy is not None:
        _require_feasible(privacy, training)
        delta = min(delta, delta_for(privacy.delta, num_examples))
    _require_weights(training)
    require_countable(delta_for(delta, num_examples), steps)
    if not 1e-6 <= clipping_norm <= 1e6:  # tables.ClippingNorm: float32 beyond it
        raise PrivacyError(f"the task's clipping_norm is {clipping_norm:g}, not in 1e-6 … 1e6")
    if not (noise_multiplier <= LARGEST_NOISE and sample_rate * num_examples >= LEAST_BATCH):
        raise PrivacyError(
            f"the task's noise multiplier {noise_multiplier:g} with an expected batch of "
            f"{sample_rate * num_examples:g} of {num_examples} records leaves nothing to learn "
            f"from: expected at most {LARGEST_NOISE:g} and at least {LEAST_BATCH:g}"
        )
    try:
        spend = Spend(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
    except ValueError as error:
        raise PrivacyError(f"the task's privacy cannot be kept: {error}") from None
    epsilon = epsilon_of([spend], delta)
    budget = None if privacy is None else privacy.epsilon
    most = LARGEST_EPSILON if budget is None else budget
    if epsilon > most:
        raise PrivacyError(
            f"the task's {steps} steps with noise multiplier {noise_multiplier:g} at sample rate "
            f"{sample_rate:g} cost epsilon {epsilon:.3f} at delta = {delta:g}, above {most:g} of "
            f"{'any training' if budget is None else 'its bundle'}. Nothing is trained"
        )
    return DevicePlan(
        noise_multiplier=noise_multiplier,
        clipping_norm=clipping_norm,
        sample_rate=sample_rate,
        steps=steps,
        delta=delta,
        epsilon=epsilon,
        budget=budget,
    )


def require_private(budget: Budget | None, plan: DevicePlan | None) -> None:
    """Raise PrivacyError if a device with a budget would train without privacy (plan None).

    For every training whose result may leave the device.
    """
    if budget is not None and plan is None:
        raise PrivacyError(
            "the [budget] of device.toml allows private training alone, and this one has no "
            "[privacy]: it could cost any epsilon. Nothing is trained"
        )


def _require_feasible(privacy: Privacy, training: Training) -> None:
    if privacy.clipping != "flat":
        raise PrivacyError(
            f"privacy.clipping = {privacy.clipping!r}: devices clip flat alone, on this or the "
            'other side. Set clipping = "flat" in the run that the bundle is made of'
        )
    _require_weights(training)


def _require_weights(training: Training) -> None:
    if training.class_weights != "none":
        raise PrivacyError(
            f"training.class_weights = {training.class_weights!r}: private training on a device "
            "has no class weights, and clips gradients without them. Leave them out of the run"
        )


def delta_for(delta: float | None, num_examples: int) -> float:
    """Return δ, 1 / (10 n) unless given. Raises PrivacyError unless 0 < δ < 1/n."""
    if num_examples < 1:
        raise PrivacyError("0 records: nothing can be trained on privately")
    if delta is None:
        return 1 / (10 * num_examples)
    if not 0 < delta < 1 / num_examples:
        raise PrivacyError(
            f"delta = {delta:g} is not above 0 and below 1/n = {1 / num_examples:g} of this "
            f"device's {num_examples} records: it would allow releasing whole records. Set it to "
            f"at most {1 / (10 * num_examples):g}"
        )
    return delta


def require_countable(delta: float, steps: int) -> None:
    """Raise PrivacyError for a δ or steps beyond what the accountant counts."""
    if delta < SMALLEST_DELTA or not 1 <= steps <= MOST_STEPS:
        raise PrivacyError(
            f"delta = {delta:g} and {steps} steps: expected delta of at least {SMALLEST_DELTA:g} "
            f"and 1 to {MOST_STEPS} steps, which is what can be accounted for"
        )
