"""One training step, in every variant: without privacy, ours, and Opacus in three modes.

variant      per-record gradients                   clip, noise and step
plain        none                                   the product's optimiser (training.py)
private      the product's, engine "fast"           the product's, noise from ChaCha20
own_opacus   the product's, engine "opacus"         the same
hooks        GradSampleModule                       DPOptimizer
ew           GradSampleModuleExpandedWeights        DPOptimizer
ghost        GradSampleModuleFastGradientClipping   DPOptimizerFastGradientClipping; two passes

Opacus runs as it ships, with its own noise from torch's generator. All variants collate the
batch in every step, and have the same optimiser, the same C and the same σ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleExpandedWeights, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.nn import functional

from anabranch.client.privacy import DpPlan
from anabranch.client.tuning.active import only
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples, collate
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.noisy import PrivateStep
from anabranch.client.tuning.private import private_steps
from anabranch.client.tuning.randomness import Randomness
from anabranch.client.tuning.training import make_optimizer, weighted_cross_entropy
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.tables import Engine, Training

Step = Callable[[Examples], object]
Variant = Callable[[Classifier, Training, DpPlan], AbstractContextManager[Step]]


def plan(noise_multiplier: float = 1.0, clipping_norm: float = 1.0) -> DpPlan:
    """Return a plan whose expected batch is all records: its ε plays no part in a step."""
    return DpPlan(
        noise_multiplier=noise_multiplier,
        clipping="flat",
        clipping_norm=clipping_norm,
        sample_rate=1.0,
        steps=1_000_000,
        delta=1e-5,
        epsilon=1.0,
    )


@contextmanager
def plain(classifier: Classifier, config: Training, _: DpPlan) -> Iterator[Step]:
    """Yield the step of training.py's `fit`, without its clipping of the whole gradient."""
    optimizer = make_optimizer(trainable_parameters(classifier), config)

    def step(batch: Examples) -> float:
        logits = _logits(classifier, batch)
        loss = weighted_cross_entropy(logits, batch.labels, None)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    yield step


@contextmanager
def private(
    classifier: Classifier, config: Training, dp: DpPlan, engine: Engine = "fast"
) -> Iterator[PrivateStep]:
    """Yield the product's private step; RuntimeError if another engine runs than asked for."""
    randomness = Randomness.fresh()
    with (
        only(classifier, WHOLE) as active,
        private_steps(
            classifier, active, dp, config, config.batch_size, randomness, engine=engine
        ) as step,
    ):
        if step.engine != engine:
            raise RuntimeError(f"asked for engine {engine!r}, {step.engine!r} runs")
        yield step


@contextmanager
def own_opacus(classifier: Classifier, config: Training, dp: DpPlan) -> Iterator[Step]:
    """Yield the product's private step on its reference engine."""
    with private(classifier, config, dp, "opacus") as step:
        yield step


@contextmanager
def hooks(classifier: Classifier, config: Training, dp: DpPlan) -> Iterator[Step]:
    """Yield the step of Opacus' default mode."""
    with quiet():
        yield _one_pass(GradSampleModule(classifier), dp_optimizer(classifier, config, dp))


@contextmanager
def ew(classifier: Classifier, config: Training, dp: DpPlan) -> Iterator[Step]:
    """Yield the step of Opacus' ExpandedWeights mode, its cheapest."""
    with quiet():
        model = GradSampleModuleExpandedWeights(classifier)
        yield _one_pass(model, dp_optimizer(classifier, config, dp))


@contextmanager
def ghost(classifier: Classifier, config: Training, dp: DpPlan) -> Iterator[Step]:
    """Yield the step of Opacus' ghost clipping."""
    with quiet():
        model = GradSampleModuleFastGradientClipping(classifier, max_grad_norm=dp.clipping_norm)
        optimizer = DPOptimizerFastGradientClipping(
            make_optimizer(trainable_parameters(classifier), config),
            noise_multiplier=dp.noise_multiplier,
            max_grad_norm=dp.clipping_norm,
            expected_batch_size=config.batch_size,
        )
        criterion = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss())
        model.train()

        def step(batch: Examples) -> None:
            optimizer.zero_grad()
            criterion(_logits(model, batch), batch.labels).backward()
            optimizer.step()

        yield step


VARIANTS: Mapping[str, Variant] = {
    "plain": plain,
    "private": private,
    "own_opacus": own_opacus,
    "hooks": hooks,
    "ew": ew,
    "ghost": ghost,
}


def _one_pass(model: nn.Module, optimizer: DPOptimizer) -> Step:
    model.train()

    def step(batch: Examples) -> None:
        optimizer.zero_grad()
        functional.cross_entropy(_logits(model, batch), batch.labels).backward()
        optimizer.step()

    return step


def dp_optimizer(classifier: Classifier, config: Training, dp: DpPlan) -> DPOptimizer:
    """Return Opacus' optimiser for a classifier in one of its modules of one pass."""
    return DPOptimizer(
        make_optimizer(trainable_parameters(classifier), config),
        noise_multiplier=dp.noise_multiplier,
        max_grad_norm=dp.clipping_norm,
        expected_batch_size=config.batch_size,
    )


def _logits(model: nn.Module, batch: Examples) -> Tensor:
    logits: Tensor = model(*collate(batch.features))
    return logits


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what torch and Opacus warn of: hooks on layers whose input asks for no gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
