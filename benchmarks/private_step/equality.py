"""Whether the private step computes what Opacus' hooks compute, on the benchmark's own models.

n_i is the norm of record i's gradient over all trained values, S the sum of the clipped
gradients with C = the median norm, so that half of the records are clipped.

    norms    max over i of |n_i − n_i'| / n_i'
    sums     max over tensors of max |S − S'| / max |S'|

S is what the private step leaves in p.grad, times the expected batch, with a noise multiplier
too small to be seen in float32. n_i is the norm of S for a batch of record i alone and a C
that no norm reaches. The learning rate is too small to move a weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import torch
from opacus import GradSampleModule
from torch import Tensor
from torch.nn import functional

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples, collate
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.protocols.tables import Engine, Training
from benchmarks.private_step import steps, workloads
from benchmarks.private_step.workloads import Workload

SILENT = 1e-30  # a noise multiplier, and a learning rate, that changes no float32
NO_CLIPPING = 1e6


@dataclass(frozen=True, eq=False)
class Gradients:
    """Norms (B,) of the records' gradients, and the clipped sum of each tensor by name."""

    norms: Tensor
    sums: Mapping[str, Tensor]


def differences(workload: Workload) -> tuple[float, float]:
    """Return the largest relative differences in norms and sums between "fast" and Opacus."""
    classifier = workloads.classifier(workload)
    batch = workloads.batch(workload, classifier)
    config = msgspec.structs.replace(workloads.training(workload), learning_rate=SILENT)
    norms = opacus(classifier, batch, config, NO_CLIPPING).norms
    clipping_norm = float(norms.median())
    theirs = opacus(classifier, batch, config, clipping_norm)
    ours = product(classifier, batch, config, clipping_norm)
    return relative(ours, theirs)


def relative(ours: Gradients, theirs: Gradients) -> tuple[float, float]:
    """Return the largest relative differences in norms and in sums."""
    norms = float(((ours.norms - theirs.norms).abs() / theirs.norms).max())
    sums = max(
        float((ours.sums[name] - wanted).abs().max() / wanted.abs().max())
        for name, wanted in theirs.sums.items()
    )
    return norms, sums


def opacus(
    classifier: Classifier, batch: Examples, config: Training, clipping_norm: float
) -> Gradients:
    """Return what GradSampleModule and DPOptimizer compute, on a copy of the classifier."""
    classifier = copy.deepcopy(classifier)
    with steps.quiet():
        model = GradSampleModule(classifier)
        optimizer = steps.dp_optimizer(classifier, config, steps.plan(SILENT, clipping_norm))
        model.train()
        functional.cross_entropy(model(*collate(batch.features)), batch.labels).backward()
        norms = torch.cat([g.flatten(1) for g in optimizer.grad_samples], dim=1).norm(dim=1)
        optimizer.clip_and_accumulate()
    names = {id(p): name for name, p in trainable_parameters(classifier).items()}
    return Gradients(norms, {names[id(p)]: p.summed_grad for p in optimizer.params})


def product(
    classifier: Classifier,
    batch: Examples,
    config: Training,
    clipping_norm: float,
    engine: Engine = "fast",
) -> Gradients:
    """Return what the product's private step computes; the classifier is left as it was."""
    alone = [
        _sums(classifier, batch.take([i]), config, NO_CLIPPING, engine) for i in range(len(batch))
    ]
    norms = [torch.cat([s.flatten() for s in sums.values()]).norm() for sums in alone]
    return Gradients(torch.stack(norms), _sums(classifier, batch, config, clipping_norm, engine))


def _sums(
    classifier: Classifier, batch: Examples, config: Training, norm: float, engine: Engine
) -> dict[str, Tensor]:
    """Return the clipped sum that one step on `batch` leaves, by name."""
    with steps.private(classifier, config, steps.plan(SILENT, norm), engine) as step:
        step(batch)
        return {
            name: config.batch_size * p.grad.detach().clone()
            for name, p in trainable_parameters(classifier).items()
            if p.grad is not None
        }
