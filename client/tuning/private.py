"""Local DP-SGD on the adapter: an engine computes, the plan decides, the end checks.

One step (Abadi et al. 2016, arXiv:1607.00133, algorithm 1), over n records:

    B ~ every record with chance q, independently          Poisson sampling
    g_i = ∇ w_{y_i} ℓ_i                                     one record's gradient
    ḡ_i = g_i, bounded by C                                 clipping.py: four ways
    g̃ = (Σ_{i in B} ḡ_i + σC · N(0, 1)) / (q n)            then SGD or AdamW

The norm runs over all values that are trained together, and over no others: gradients of
frozen ranks are zero before it, and no noise is added to them (active.py). With FedProx
(training.py), μ (w − w_t) is added to g̃: it is made of what the noisy steps before have
already released, so it is post-processing and costs no privacy. The class weight w_{y_i} is
fixed in advance and inside the gradient, so ‖ḡ_i‖ <= C whatever it is. q, n and σ are the
plan's and do not depend on the batch, nor does C, except through the noisy count that
adaptive clipping pays for; an empty batch is a step of noise alone. A record whose gradient is
not finite counts as 0. No loss, norm or batch size is returned, and whether a fit is refused does
not depend on gradients: if every one is 0, noise alone is published, and the log says so.

Engines "fast" (fast.py) and "opacus" (opacus_engine.py) compute g_i; all that follows is the same
code (noisy.py). Noise comes from a ChaCha20 stream (randomness.py) and is added in float32: sums
and noise are NOT hardened against attacks on the low bits of floating-point numbers.

A fit that was stopped goes on from its last state (checkpoint.py): values and moments after k noisy
steps, C, and what the accountant was told of them. Later steps are drawn anew, batches and noise,
with a key of their own: what is published is one chain of as many noisy steps as were planned, each
given the values before it. Steps that were lost with their process were read by nobody, so they
cost nothing, as long as what ends a process does not look at records, and at most one chain is ever
published (client/answers.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anabranch.client.privacy import DpPlan, Spend, sampling_rate
from anabranch.client.tuning.active import Active, only, union
from anabranch.client.tuning.checkpoint import Progress, State, put_back, tensors_of
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.fast import fast_gradients
from anabranch.client.tuning.flat import Flat
from anabranch.client.tuning.known import unknown_tensors
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.noisy import Gradients, PrivateStep
from anabranch.client.tuning.probe import Probe
from anabranch.client.tuning.randomness import Randomness
from anabranch.client.tuning.training import make_optimizer
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.schedule import learning_rate_factor
from anabranch.protocols.spec import LORA_A, LORA_B
from anabranch.protocols.tables import Engine, Training

log = logging.getLogger(__name__)

PHYSICAL_BATCH = 64  # records whose gradients are in memory at once
ROUNDING = 1e-12  # relative, of a noise multiplier
NOISE_ALONE = (
    "every record's gradient was zero in this fit: its update is noise alone. If the model is "
    "saturated, lower training.learning_rate"
)


@dataclass(frozen=True, kw_only=True)
class PrivateFit:
    """What a round of private training may tell: what it spent, which equals its plan."""

    spend: Spend
    engine: Engine  # that computed the gradients: "opacus" where "fast" does not know a layer
    clipping_norm: float  # C after the last step: adaptive clipping goes on from here


def fit_private(
    classifier: Classifier,
    examples: Examples,
    plan: DpPlan,
    config: Training,
    *,
    steps: int,
    step_offset: int,
    proximal_mu: float = 0.0,
    part: Part = WHOLE,
    kept: Part | None = None,
    engine: Engine = "fast",
    clipping_norm: float | None = None,
    probe: Probe | None = None,
    generator: torch.Generator | None = None,
    randomness: Randomness | None = None,
    physical_batch: int = PHYSICAL_BATCH,
    progress: Progress | None = None,
    silent: bool = False,
) -> PrivateFit:
    """Run `steps` steps of DP-SGD in place; on return the adapter is safe to publish under `plan`.

    What is in `part` or `kept` is trained, clipped and noised together; every other value is
    the same afterwards, bit for bit. `step_offset` steps of the run came before, and
    `clipping_norm` is where they left C (None: the plan's). The canaries of a `probe` are
    records n, n + 1, …, drawn by the same sampler. Raises PrivacyError, with the adapter as it
    was, if the plan is for other data or fewer steps, a module mixes records, what ran is not
    what was planned, or nothing was trained. Either way the classifier keeps no hooks, no
    gradients and no replaced function. A `generator`, or a `randomness` that somebody knows, makes
    batches and noise reproducible and thereby VOIDS the guarantee: it is for tests and simulations
    (docs/simulation.md). `physical_batch` bounds memory and changes no result. `progress` is told
    of every step and says where to go on from, with a `randomness` that no step before has read.
    `silent`: where nothing was trained the adapter is as it was, which is logged and not raised.
    """
    if plan.together is not None:
        raise PrivacyError("this plan's noise is added in a secure sum: train with fit_unnoised")
    require_planned(plan, config, len(examples), steps, step_offset)
    if generator is not None:
        randomness = Randomness.reproducible(generator)
    randomness = randomness or Randomness.fresh()
    accountant = new_accountant()
    with only(classifier, part, kept) as active:
        try:
            with private_steps(
                classifier,
                active,
                plan,
                config,
                len(examples),
                randomness,
                proximal_mu=proximal_mu,
                engine=engine,
                physical_batch=physical_batch,
                clipping_norm=clipping_norm,
            ) as step:
                run, trained = range(step_offset, step_offset + steps), active.parameters
                learned = _run(
                    step, trained, examples, plan, config, run, accountant, probe, progress
                )
            require_as_planned(accountant.history, plan.spend(steps))
            if not trained_or_silent(active, factors_of(classifier), silent):
                active.undo()
        except BaseException:
            active.undo()
            raise
    if not learned:
        log.warning(NOISE_ALONE)
    return PrivateFit(spend=plan.spend(steps), engine=step.engine, clipping_norm=step.clipping_norm)


@contextmanager
def private_steps(
    classifier: Classifier,
    active: Active,
    plan: DpPlan,
    config: Training,
    num_examples: int,
    randomness: Randomness,
    *,
    proximal_mu: float = 0.0,
    engine: Engine = "fast",
    physical_batch: int = PHYSICAL_BATCH,
    clipping_norm: float | None = None,
) -> Iterator[PrivateStep]:
    """Yield what takes one logical step on a given batch; leave nothing of it behind.

    Nothing here samples or accounts: only fit_private gives a guarantee. Where `engine` is
    "fast" and a trained tensor belongs to a layer it does not know, Opacus computes all
    gradients, and the log says so. Raises PrivacyError if a module mixes the records of a
    batch, no engine knows a trained layer, or the clipping norm is not above 0 and finite.
    """
    require_separable(classifier)
    norm = first_norm(plan, clipping_norm)
    flat = Flat(active.parameters)
    weights = None if config.class_weights == "none" else torch.tensor(config.class_weights)
    with flat.attached() as vectors, _engine(engine, classifier, active, weights) as gradients:
        yield PrivateStep(
            gradients,
            flat,
            make_optimizer(vectors, config),
            active,
            plan,
            num_examples=num_examples,
            randomness=randomness,
            proximal_mu=proximal_mu,
            physical_batch=physical_batch,
            clipping_norm=norm,
        )


def _engine(
    engine: Engine, classifier: Classifier, active: Active, weights: Tensor | None
) -> AbstractContextManager[Gradients]:
    """Return the engine that was asked for, or Opacus where it does not know a layer."""
    if engine == "fast":
        unknown = unknown_tensors(classifier, active.parameters)
        if not unknown:
            return fast_gradients(classifier, active.parameters, weights, active.masks.keys())
        log.info(
            "gradients per record come from Opacus: the fast path does not know the layers of %s",
            ", ".join(unknown),
        )
    from anabranch.client.tuning.opacus_engine import opacus_gradients  # Opacus takes a second

    return opacus_gradients(classifier, active.parameters, weights)


def engine_for(engine: Engine, classifier: Classifier, part: Part, kept: Part | None) -> Engine:
    """Return the engine that computes the gradients of a part where `engine` is asked for."""
    trained = trainable_parameters(classifier)
    names = union(classifier.spec, part, kept)
    unknown = unknown_tensors(classifier, {name: trained[name] for name in names})
    return "opacus" if unknown else engine


def new_accountant() -> Any:
    """Return Opacus' PRVAccountant, which is told what was drawn."""
    from opacus.accountants import PRVAccountant  # here and not above: it takes a second

    return PRVAccountant()


def require_as_planned(ran: Sequence[tuple[float, float, int]], planned: Spend) -> None:
    """Raise PrivacyError unless the accountant saw exactly the planned (σ, q, steps).

    σ may differ by rounding: adaptive clipping splits it in two, and the parts are what ran.
    """
    expected = [(planned.noise_multiplier, planned.sample_rate, planned.steps)]
    equal = len(ran) == 1 and ran[0][1:] == expected[0][1:]
    if not (equal and math.isclose(ran[0][0], expected[0][0], rel_tol=ROUNDING)):
        raise PrivacyError(
            f"planned (σ, q, steps) = {expected}, ran {list(ran)}: the update is discarded"
        )


def _run(
    step: PrivateStep,
    trained: Mapping[str, nn.Parameter],
    examples: Examples,
    plan: DpPlan,
    config: Training,
    steps: range,
    accountant: Any,
    probe: Probe | None,
    progress: Progress | None,
) -> bool:
    """Take the `steps` that are left; return False if all gradients were 0, as far as is known."""
    records, rate = len(examples), plan.sample_rate
    learning_rates = [group["lr"] for group in step.optimizer.param_groups]
    found: set[bool] = set()
    taken = 0

    def state() -> State:
        return State(
            step=taken,
            tensors=tensors_of(trained, step.optimizer),
            ran=tuple(accountant.history),
            clipping_norm=step.clipping_norm,
        )

    if progress is not None and (before := progress.resumed()) is not None:
        put_back(before.tensors, trained, step.optimizer)
        accountant.history = list(before.ran)
        step.clipping_norm = first_norm(plan, before.clipping_norm)
        taken, found = before.step, {True}
    for at in steps[taken:]:
        factor = learning_rate_factor(at, plan.steps, config.warmup, config.schedule)
        for group, learning_rate in zip(step.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = learning_rate * factor
        sampled = step.randomness.sample(records + (probe.count if probe else 0), rate)
        canaries = [i - records for i in sampled if i >= records]
        rows = probe.gradients(canaries, step.size) if probe and canaries else None
        learned = step(examples.take([i for i in sampled if i < records]), rows)
        for sigma in step.drawn:  # as many as there were draws of noise: one
            accountant.step(noise_multiplier=sigma, sample_rate=rate)
        step.drawn.clear()
        if probe is not None:
            gradients = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
            probe.observe(len(sampled), gradients)
        if sampled:
            found.add(learned)
        taken += 1
        if progress is not None:
            progress.after(taken, len(steps), state)
    return found != {False}


def first_norm(plan: DpPlan, clipping_norm: float | None) -> float:
    """Return the C that training begins with; PrivacyError unless it is above 0 and finite."""
    norm = plan.clipping_norm if clipping_norm is None else clipping_norm
    if not 0 < norm < math.inf:
        raise PrivacyError(f"expected a clipping norm above 0, got {norm}")
    return norm


def require_planned(
    plan: DpPlan, config: Training, num_examples: int, steps: int, step_offset: int
) -> None:
    """Raise PrivacyError unless the plan is for these records, and covers these steps."""
    if num_examples < 1 or plan.sample_rate != sampling_rate(config.batch_size, num_examples):
        raise PrivacyError(
            f"the plan samples records at rate {plan.sample_rate:.6f}, but an expected batch of "
            f"{config.batch_size} of {num_examples} records needs another: make the plan for "
            "the records it is used on"
        )
    if steps < 1 or step_offset < 0 or step_offset + steps > plan.steps:
        raise PrivacyError(
            f"steps {step_offset} to {step_offset + steps} are not within the plan's {plan.steps}"
        )
    if config.class_weights == "balanced":
        raise PrivacyError(
            "training.class_weights = 'balanced' is computed from the labels, which the plan "
            "does not cover: give one fixed number per label"
        )


def require_separable(classifier: nn.Module) -> None:
    """Raise PrivacyError if one record's gradient can depend on another record."""
    for name, module in classifier.named_modules():
        if isinstance(module, _BatchNorm):  # Opacus looks at trainable ones only
            raise PrivacyError(
                f"{name} is a {type(module).__name__}: it mixes the records of a batch. Take a "
                "base with LayerNorm or GroupNorm"
            )


def factors_of(classifier: Classifier) -> dict[str, Tensor]:
    """Return every factor of the adapter by name, trained or not."""
    factors = (name for _, a, b in classifier.spec.factors() for name in (a, b))
    parameters = trainable_parameters(classifier)
    return {name: parameters[name] for name in factors}


def require_trained(active: Active, factors: Mapping[str, Tensor]) -> None:
    """Raise PrivacyError if training cannot have done anything, whatever the records are.

    Only what was trained must have moved, which noise alone does; `factors` are all factors,
    trained or frozen: ranks whose product stays 0 have no gradient.
    """
    for name, parameter in active.parameters.items():
        if not bool(parameter.isfinite().all()):
            raise PrivacyError(f"{name} is not finite after private training: lower learning_rate")
        if torch.equal(parameter, active.start[name]):
            raise PrivacyError(f"{name} did not change in private training: nothing was trained")
        if name.endswith((LORA_A, LORA_B)):
            layer = name.removesuffix(LORA_A).removesuffix(LORA_B)
            ranks = _ranks(name, active)
            b, a = factors[layer + LORA_B][:, ranks], factors[layer + LORA_A][ranks]
            if not bool((b @ a).any()):
                raise PrivacyError(f"B · A of {layer} has rank 0 after training")


def trained_or_silent(active: Active, factors: Mapping[str, Tensor], silent: bool) -> bool:
    """Return whether training can have done something; raise as require_trained unless `silent`."""
    try:
        require_trained(active, factors)
    except PrivacyError as error:
        if not silent:
            raise
        log.error("its update counts as zeros: %s", error)
        return False
    return True


def _ranks(name: str, active: Active) -> Tensor | slice:
    """Return which rank indices of a factor are trained."""
    mask = active.masks.get(name)
    if mask is None:
        return slice(None)
    return mask.any(1 if name.endswith(LORA_A) else 0)
