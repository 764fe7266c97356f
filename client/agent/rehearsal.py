"""One batch of a site's own records, trained and thrown away: does it work, how long will it take?

    prepare_s            load the base once, and encode every record:  load + n / b · encoding of b
    seconds_per_round    steps of a round × one step

n records, b of them in a batch. The step is the run's own: private where the run is. No ledger is
opened, no answer is stored, nothing is written, and of the step only its time is kept: that it
was taken tells nobody anything of a record, so it costs no privacy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import torch

from anabranch.client.data.records import Records
from anabranch.client.models import Models
from anabranch.client.privacy import plan_for
from anabranch.client.tuning.active import only
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.private import private_steps
from anabranch.client.tuning.randomness import Randomness
from anabranch.client.tuning.training import Schedule, fit, steps_per_round
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError
from anabranch.protocols.tables import Device, Privacy

T = TypeVar("T")
ONCE_MORE_S = 2.0  # a first step is slower than those that follow: up to this, a second is taken


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A base model that can be trained here."""

    classifier: Classifier
    models: Models
    seconds: float

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the base's weights, hex."""
        return self.classifier.base_digest


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What one batch says about a round."""

    step_s: float
    steps: int  # of a round
    prepare_s: float  # once per run
    private: bool

    @property
    def seconds_per_round(self) -> float:
        """Return the estimate for one round's training."""
        return self.steps * self.step_s


def load(config: RunConfig, device: Device, max_rank: int | None = None) -> Loaded:
    """Load the base with an adapter of at most `max_rank`, apart from any other in this process.

    Raises ModelError or ConfigError.
    """
    started = time.perf_counter()
    models, lora = Models(), config.adapter
    if max_rank is not None and lora.rank > max_rank:
        lora = msgspec.structs.replace(lora, rank=max_rank)
    classifier = models.classifier(config, device, lora)
    return Loaded(classifier=classifier, models=models, seconds=time.perf_counter() - started)


def rehearse(loaded: Loaded, config: RunConfig, train: Records) -> Rehearsal:
    """Take one step on the first records of `train`; what was loaded is then to be dropped.

    Raises DataError without records, PrivacyError if the run's privacy cannot be had with so
    many, RunError if the loss is not finite, ModelError.
    """
    if not len(train):
        raise DataError("no records to train on")
    classifier, training = loaded.classifier, config.training
    batch = train.take(range(min(training.batch_size, len(train))))
    encoding, features = _timed(
        lambda: loaded.models.cache(config).prepare(classifier, batch.inputs), classifier
    )
    examples = Examples(features, torch.from_numpy(batch.labels))

    def plain() -> None:
        fit(
            classifier,
            examples,
            training,
            steps=1,
            schedule=Schedule(total_steps=1),
            seed=config.seed,
            proximal_mu=config.federation.proximal_mu,
        )

    step = plain
    if config.privacy is not None:
        step = _private_step(classifier, examples, config, config.privacy, len(train))
    step_s, _ = _timed(step, classifier)
    if step_s < ONCE_MORE_S:
        step_s = min(step_s, _timed(step, classifier)[0])
    return Rehearsal(
        step_s=step_s,
        steps=steps_per_round(len(train), training),
        prepare_s=loaded.seconds + encoding * len(train) / len(batch),
        private=config.privacy is not None,
    )


def _private_step(
    classifier: Classifier, examples: Examples, config: RunConfig, privacy: Privacy, records: int
) -> Callable[[], None]:
    plan = plan_for(privacy, config.training, config.federation.rounds, records)

    def step() -> None:
        with (
            only(classifier, WHOLE) as active,
            private_steps(
                classifier,
                active,
                plan,
                config.training,
                records,
                Randomness.fresh(),
                engine=privacy.engine,
            ) as take,
        ):
            take(examples)

    return step


def _timed(work: Callable[[], T], classifier: Classifier) -> tuple[float, T]:
    started = time.perf_counter()
    result = work()
    if classifier.device.type == "cuda":
        torch.cuda.synchronize(classifier.device)
    return time.perf_counter() - started, result
