"""One private round: a cohort at once against Opacus' hooks, client after client.

20 clients of 50 records take 5 steps of DP-SGD with an expected batch of 10 (Poisson sampling),
LoRA of rank 8 on all linear layers of a small vision transformer, and the head. Its cut lies above
the patches: a record is 16 tokens of width d, computed once. Records are digits (scikit-learn's).

    cohort   anabranch.simulations.cohort.private.train_private_cohort, as a simulation calls it:
             sampling, noise (ChaCha20), accounting and all checks included
    hooks    opacus.GradSampleModule and DPOptimizer at their best: wrapped once and reused by all
             clients, batches drawn in advance, no accountant, noise from torch's generator

Both see the same records in every step. Seconds are CPU seconds of one thread, in turn.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata

import msgspec
import numpy as np
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from anabranch.client.local import Learned, Local
from anabranch.client.privacy import DpPlan, sampling_rate
from anabranch.client.private_round import PrivateRound
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Dense, Examples
from anabranch.client.tuning.lora import load_adapter, read_adapter, trainable_parameters
from anabranch.client.tuning.randomness import Randomness
from anabranch.client.tuning.training import Schedule, make_optimizer
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Column, Contract, Federation, Lora, Model, Task, Training
from anabranch.simulations.cohort.private import train_private_cohort
from anabranch.simulations.population.books import SimulatedBooks
from benchmarks.harness import Figure, alternate, ratio
from benchmarks.private_step.steps import quiet

SEED = 0
CLIENTS, RECORDS, STEPS, BATCH, RANK = 20, 50, 5, 10, 8
TARGETS = ("query", "key", "value", "output", "up", "down")
DEPTHS = {64: 2, 128: 4}  # width -> blocks
GOALS = {64: ">= 2.5", 128: ">= 1.25"}
REPEATS, QUICK = 9, 3
TRAINING = Training(
    optimizer="sgd", momentum=0.0, learning_rate=0.05, batch_size=BATCH, local_steps=STEPS
)


@dataclass(frozen=True, eq=False)
class Workload:
    """The clients of one round."""

    classifier: Classifier
    locals: Sequence[Local]

    def again(self) -> list[Local]:
        """Return the round with its randomness at the beginning."""
        return [dataclasses.replace(one, private=_private(i)) for i, one in enumerate(self.locals)]


def figures(*, quick: bool = False) -> list[Figure]:
    """Return private_round.speedup_hooks_d64 and _d128."""
    torch.set_num_threads(1)
    return [_figure(width, QUICK if quick else REPEATS) for width in DEPTHS]


def _figure(width: int, repeats: int) -> Figure:
    work = workload(width)
    with quiet():
        peer = hooks(work)
        variants: dict[str, Callable[[], object]] = {"hooks": peer, "cohort": lambda: cohort(work)}
        for run in variants.values():
            run()
        seconds = alternate(variants, repeats, clock=time.process_time)
    value, spread = ratio(seconds["hooks"], seconds["cohort"])
    milliseconds = {name: 1000 * float(np.median(times)) for name, times in seconds.items()}
    return Figure(
        figure=f"private_round.speedup_hooks_d{width}",
        value=value,
        unit="x",
        target=GOALS[width],
        spread=spread,
        peer=f"opacus {metadata.version('opacus')} GradSampleModule and DPOptimizer, reused",
        note=", ".join(f"{name} {ms:.0f} ms" for name, ms in milliseconds.items())
        + f" of CPU a round; {CLIENTS} clients x {STEPS} steps x expected batch {BATCH}",
    )


def cohort(work: Workload) -> list[Learned]:
    """Train the round as one cohort. Raises what a client's training raised."""
    learned = []
    for outcome in train_private_cohort(work.again()):
        if not isinstance(outcome, Learned):
            raise outcome
        learned.append(outcome)
    return learned


def hooks(work: Workload) -> Callable[[], object]:
    """Return what trains the round with Opacus' hooks."""
    classifier = copy.deepcopy(work.classifier)
    model = GradSampleModule(classifier)
    model.train()
    plan = _plan()
    parameters = trainable_parameters(classifier)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    rounds = [_batches(one, i) for i, one in enumerate(work.locals)]

    def run() -> None:
        for steps in rounds:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(start[name])
            optimizer = DPOptimizer(
                make_optimizer(parameters, TRAINING),
                noise_multiplier=plan.noise_multiplier,
                max_grad_norm=plan.clipping_norm,
                expected_batch_size=BATCH,
            )
            for features, labels in steps:
                optimizer.zero_grad()
                functional.cross_entropy(model(features, None), labels).backward()
                optimizer.step()

    return run


def _batches(local: Local, client: int) -> list[tuple[Tensor, Tensor]]:
    """Return the batches that the cohort draws for a client."""
    randomness, found = _randomness(client), []
    size = sum(p.numel() for p in trainable_parameters(local.classifier).values())
    for _ in range(STEPS):
        sampled = randomness.sample(RECORDS, _plan().sample_rate)
        randomness.normal(size)  # the step's noise
        batch = local.examples.take(sampled)
        found.append((torch.stack(list(batch.features)), batch.labels))
    return found


def workload(width: int) -> Workload:
    """Return the round's clients."""
    classifier = load_classifier(_config(width))
    digits = load_digits()
    images = (digits.images[: CLIENTS * RECORDS, None] / 16).astype(np.float32)
    encoded = torch.stack(classifier.encode(images))
    prefix = classifier.prefix(encoded, None)
    labels = torch.from_numpy(digits.target[: CLIENTS * RECORDS].astype(np.int64))
    rng = torch.Generator().manual_seed(SEED)
    with torch.no_grad():  # B and the head start at 0: no gradient passes them
        for p in trainable_parameters(classifier).values():
            p.add_(0.05 * torch.randn(p.shape, generator=rng))
    start, locals = read_adapter(classifier), []
    for i in range(CLIENTS):
        at = torch.arange(i * RECORDS, (i + 1) * RECORDS)
        locals.append(
            Local(
                name=f"client-{i:06d}",
                classifier=classifier,
                start=start,
                examples=Examples(Dense(prefix, at), labels[at]),
                training=TRAINING,
                steps=STEPS,
                schedule=Schedule(total_steps=STEPS),
                seed=i,
                private=_private(i),
            )
        )
    load_adapter(classifier, start)
    return Workload(classifier, locals)


def _randomness(client: int) -> Randomness:
    return Randomness(hashlib.sha256(f"{SEED}/{client}".encode()).digest())


def _plan() -> DpPlan:
    return DpPlan(
        noise_multiplier=1.0,
        clipping="flat",
        clipping_norm=1.0,
        sample_rate=sampling_rate(BATCH, RECORDS),
        steps=STEPS,
        delta=1e-3,
        epsilon=10.0,
    )


def _private(client: int) -> PrivateRound:
    return PrivateRound(
        plan=_plan(),
        engine="fast",
        clipping_norm=None,
        randomness=_randomness(client),
        entry=1,
        rows=(),
        run="benchmark",
        ledger=SimulatedBooks().of("benchmark"),
    )


def _config(width: int) -> RunConfig:
    return RunConfig(
        name="private-round",
        task=Task(kind="image-classification", labels=tuple(str(i) for i in range(10))),
        data=Contract(columns={"image": Column(type="image"), "label": Column(type="label")}),
        model=msgspec.convert(
            {
                "base": "vit",
                "image_size": 8,
                "patch": 2,
                "width": width,
                "depth": DEPTHS[width],
                "heads": 4,
                "channels": 1,
            },
            Model,
        ),
        federation=Federation(rounds=1),
        lora=Lora(rank=RANK, targets=TARGETS),
        seed=SEED,
    )


if __name__ == "__main__":
    for figure in figures():
        print(f"{figure.figure:36} {figure.value:.2f} {figure.spread} {figure.note}")
