"""Local DP-SGD on the adapter: Opacus computes, the plan decides, the end checks.

One step (Abadi et al. 2016, arXiv:1607.00133, algorithm 1), over n records:

    B ~ every record with chance q, independently          Poisson sampling
    g_i = ∇ w_{y_i} ℓ_i                                     one record's gradient
    ḡ_i = g_i · min(1, C / ‖g_i‖)                           clipping "flat"
        = g_i · C / (‖g_i‖ + 0.01)                          clipping "automatic" (AUTO-S; Bu et
                                                            al. 2022, arXiv:2206.07136)
    g̃ = (Σ_{i in B} ḡ_i + σC · N(0, 1)) / (q n)            then SGD or AdamW

The norm runs over all values that are trained together, and over no others: gradients of
frozen ranks are zero before it, and no noise is added to them (active.py). With FedProx
(training.py), μ (w − w_t) is added to g̃: it is made of what the noisy steps before have
already released, so it is post-processing and costs no privacy. The class weight w_{y_i} is
fixed in advance and inside the gradient, so ‖ḡ_i‖ <= C whatever it is. q, n, C and σ are the
plan's and do not depend on the batch; an empty batch is a step of noise alone. No loss, norm
or batch size is returned. That a fit was refused is not covered by the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from opacus import GradSampleModule
from opacus.accountants import PRVAccountant
from opacus.utils.module_utils import has_trainable_params
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from anabranch.client.privacy import DpPlan, Spend, sampling_rate
from anabranch.client.tuning.active import only
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples, collate
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.noisy import NoisyOptimizer
from anabranch.client.tuning.randomness import Randomness
from anabranch.client.tuning.schedule import learning_rate_factor
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import LORA_A, LORA_B
from anabranch.protocols.tables import Training

PHYSICAL_BATCH = 64  # records whose gradients are in memory at once


@dataclass(frozen=True, kw_only=True)
class PrivateFit:
    """What a round of private training may tell: what it spent, which equals its plan."""

    spend: Spend


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
    generator: torch.Generator | None = None,
    physical_batch: int = PHYSICAL_BATCH,
) -> PrivateFit:
    """Run `steps` steps of DP-SGD in place; on return the adapter is safe to publish under `plan`.

    What is in `part` or `kept` is trained, clipped and noised together; every other value is
    the same afterwards, bit for bit. `step_offset` steps of the run came before. Raises
    PrivacyError, with the adapter as it was, if the plan is for other data or fewer steps, a
    module mixes records, what ran is not what was planned, or nothing was trained. Either way
    the classifier keeps no hooks and no gradients. A `generator` makes batches and noise
    reproducible and thereby VOIDS the guarantee: it is for tests. `physical_batch` bounds
    memory and changes no result.
    """
    _require_planned(plan, config, len(examples), steps, step_offset)
    randomness = Randomness.fresh() if generator is None else Randomness.reproducible(generator)
    accountant = PRVAccountant()
    with only(classifier, part, kept) as active:
        try:
            with per_record_gradients(classifier) as model:
                optimizer = NoisyOptimizer(
                    active, config, plan, len(examples), randomness, proximal_mu
                )
                optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(plan.sample_rate))
                gradients = _run(
                    model,
                    optimizer,
                    examples,
                    plan,
                    config,
                    range(step_offset, step_offset + steps),
                    physical_batch,
                )
            require_as_planned(accountant.history, plan.spend(steps))
            require_trained(active.parameters, active.start, gradients, _factors(classifier))
        except BaseException:
            active.undo()
            raise
    return PrivateFit(spend=plan.spend(steps))


@contextmanager
def per_record_gradients(classifier: nn.Module) -> Iterator[GradSampleModule]:
    """Attach Opacus' hooks, in training mode, and leave nothing of them behind.

    Raises PrivacyError if a module mixes records or has no gradient per record. With
    reduction "sum" the gradient of record i is that of its own term, whatever the batch.
    """
    modes = {module: module.training for module in classifier.modules()}
    owners = [m for m in classifier.modules() if has_trainable_params(m)]
    hooks = [owner.register_forward_pre_hook(_with_input_gradients) for owner in owners]
    classifier.train()
    try:
        _require_separable(classifier)
        wrapped = GradSampleModule(classifier, loss_reduction="sum")
        try:
            yield wrapped
        finally:
            wrapped.to_standard_module()
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
            for name in ("activations", "max_batch_len"):  # left behind by a failed backward pass
                module.__dict__.pop(name, None)
        for parameter in classifier.parameters():
            parameter.grad = None
            parameter.__dict__.pop("summed_grad", None)


def _with_input_gradients(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Let inputs of the lowest trained layers ask for a gradient: torch warns where none does."""
    return tuple(
        x.detach().requires_grad_() if x.is_floating_point() and not x.requires_grad else x
        for x in inputs
    )


def accumulate(
    model: nn.Module,
    optimizer: NoisyOptimizer,
    batch: Examples,
    weights: Tensor | None,
    physical_batch: int,
) -> bool:
    """Do one logical step on `batch`, which may be empty; return whether a gradient was not 0.

    The batch is cut into physical ones of like length. They are clipped and added up one
    after another; noise, the accountant and the optimiser see one step.
    """
    optimizer.zero_grad()
    optimizer.found = False
    if len(batch) == 0:
        for p in optimizer.params:
            p.grad_sample = p.new_zeros((0, *p.shape))
        optimizer.step()
        return False
    order = sorted(range(len(batch)), key=lambda i: len(batch.features[i]))
    chunks = [order[i : i + physical_batch] for i in range(0, len(order), physical_batch)]
    for chunk in chunks:
        record_losses(model, batch.take(chunk), weights).sum().backward()
        _require_per_record(optimizer, len(chunk))
        optimizer.signal_skip_step(do_skip=chunk is not chunks[-1])
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.found


def record_losses(model: nn.Module, batch: Examples, weights: Tensor | None) -> Tensor:
    """Return w_{y_i} × the cross-entropy of every record, (B,)."""
    device = next(model.parameters()).device
    features, mask = collate(batch.features)
    labels = batch.labels.to(device)
    logits = model(features.to(device), None if mask is None else mask.to(device))
    losses = functional.cross_entropy(logits, labels, reduction="none")
    if not losses.requires_grad:
        raise PrivacyError("no trainable tensor takes part in the model's output: nothing to train")
    return losses if weights is None else losses * weights.to(device)[labels]


def require_as_planned(ran: Sequence[tuple[float, float, int]], planned: Spend) -> None:
    """Raise PrivacyError unless the accountant saw exactly the planned (σ, q, steps)."""
    expected = [(planned.noise_multiplier, planned.sample_rate, planned.steps)]
    if list(ran) != expected:
        raise PrivacyError(
            f"planned (σ, q, steps) = {expected}, ran {list(ran)}: the update is discarded"
        )


def _run(
    model: nn.Module,
    optimizer: NoisyOptimizer,
    examples: Examples,
    plan: DpPlan,
    config: Training,
    steps: range,
    physical_batch: int,
) -> bool:
    """Take `steps` of the run; return False if there were records but every gradient was 0."""
    weights = None if config.class_weights == "none" else torch.tensor(config.class_weights)
    rates = [group["lr"] for group in optimizer.param_groups]
    found: set[bool] = set()
    for step in steps:
        factor = learning_rate_factor(step, plan.steps, config.warmup, config.schedule)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        batch = examples.take(optimizer.randomness.sample(len(examples), plan.sample_rate))
        learned = accumulate(model, optimizer, batch, weights, physical_batch)
        if len(batch):
            found.add(learned)
    return found != {False}


def _require_planned(
    plan: DpPlan, config: Training, num_examples: int, steps: int, step_offset: int
) -> None:
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


def _require_separable(classifier: nn.Module) -> None:
    """Raise PrivacyError if one record's gradient can depend on another record."""
    for name, module in classifier.named_modules():
        if isinstance(module, _BatchNorm):  # Opacus looks at trainable ones only
            raise PrivacyError(
                f"{name} is a {type(module).__name__}: it mixes the records of a batch. Take a "
                "base with LayerNorm or GroupNorm"
            )
    errors = ModuleValidator.validate(classifier) + GradSampleModule.validate(classifier)
    if errors:
        raise PrivacyError(f"Opacus has no per-record gradients for this model: {errors[0]}")


def _require_per_record(optimizer: NoisyOptimizer, records: int) -> None:
    """Raise PrivacyError unless every parameter has one gradient per record."""
    for p in optimizer.params:
        found = None if p.grad_sample is None else tuple(p.grad_sample.shape)
        if found != (records, *p.shape):
            raise PrivacyError(
                f"a trainable tensor of shape {tuple(p.shape)} has per-record gradients of shape "
                f"{found} for {records} records: it takes no part in the output, is used outside "
                "its module, or the model moves the batch axis"
            )


def _factors(classifier: Classifier) -> dict[str, Tensor]:
    """Return every factor of the adapter by name, trained or not."""
    factors = (name for _, a, b in classifier.spec.factors() for name in (a, b))
    parameters = trainable_parameters(classifier)
    return {name: parameters[name] for name in factors}


def require_trained(
    trained: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    gradients: bool,
    factors: Mapping[str, Tensor],
) -> None:
    """Raise PrivacyError if training did nothing, as Opacus with LoRA silently can (opacus#820).

    Only what was trained must have moved; `factors` are all factors, trained or frozen.
    """
    if not gradients:
        raise PrivacyError("every record's gradient was zero: only noise was added")
    for name, parameter in trained.items():
        if not bool(parameter.isfinite().all()):
            raise PrivacyError(f"{name} is not finite after private training: lower learning_rate")
        if torch.equal(parameter, before[name]):
            raise PrivacyError(f"{name} did not change in private training: nothing was trained")
        if name.endswith((LORA_A, LORA_B)):
            layer = name.removesuffix(LORA_A).removesuffix(LORA_B)
            if not bool((factors[layer + LORA_B] @ factors[layer + LORA_A]).any()):
                raise PrivacyError(f"B · A of {layer} has rank 0 after training")
