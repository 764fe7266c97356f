"""One round of a site between its question and its answer, as functions of what is given.

    Site.prepare ─► Begun ─► train_alone, or a cohort ─► Came ─► settled, written, sent

Nothing here writes to the site's folder: what a round changes is in Came, and whoever holds it
decides how that gets to the disk (answers.py; Site.finish for simulated clients).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anabranch.client import feedback, personal
from anabranch.client.answers import Answers
from anabranch.client.local import Learned, Local
from anabranch.client.models import Models
from anabranch.client.private_round import Cost, close_round
from anabranch.client.question import Attempt, Outcome
from anabranch.client.refusals import failures
from anabranch.client.tuning.checkpoint import Steps, Watch
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import load_adapter
from anabranch.client.tuning.metrics import evaluate
from anabranch.client.tuning.training import Schedule, predict, steps_per_round
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import IncompatibleAdapter, RunError
from anabranch.protocols.messages import Assignment, Trained
from anabranch.protocols.spec import require_same_spec
from anabranch.protocols.tables import Device

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Begun:
    """A round between `prepare` and `finish`."""

    assignment: Assignment
    adapter: Adapter  # as it was received
    local: Local
    beside: personal.Beside | None
    started: float  # of time.perf_counter()
    progress: tuple[Steps | None, Steps | None] = (None, None)  # of the shared fit, the private

    def stopped(self, error: BaseException) -> bool:
        """Return whether this ends the round from outside: the watch, or the end of the process."""
        if not isinstance(error, Exception):
            return True
        return any(steps is not None and steps.stopped is error for steps in self.progress)


@dataclass(frozen=True)
class Asked:
    """A question that was taken up."""

    answers: Answers
    key: str
    attempt: Attempt
    device: Device
    watch: Watch | None
    save_every: float  # seconds

    def progress(self, fit: str, start: Adapter, records: Sequence[bytes]) -> Steps:
        """Return where one of the round's fits is kept, for the inputs that it has now.

        `records` are the identities of what is trained on, in order: batches are drawn by it.
        """
        return Steps(
            path=self.answers.steps(self.key, fit),
            inputs=inputs_of(self.key, fit, start, records, self.device),
            watch=self.watch,
            seconds=self.save_every,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Came:
    """What a round came to, with what is sent as it is at hand."""

    report: Trained  # without what settling adds
    sent: Delta | bytes
    changes: dict[str, bytes]  # path in the site's folder -> contents
    cost: Cost | None
    zeros: bool  # whether failures are told to nobody, and nothing was learned

    @property
    def framed(self) -> Outcome:
        """Return it as it is written down."""
        return Outcome(
            report=self.report, frame=framed(self.sent), changes=self.changes, cost=self.cost
        )


def came_of(begun: Begun, learned: Learned, folder: Path) -> Came:
    """Return what came of a round at the site in `folder`: report, delta, files that change.

    The private adapter is trained here, after all that is sent, which does not depend on it.
    Raises ModelError for a memory of error feedback that cannot be read.
    """
    assignment, config, local = begun.assignment, begun.assignment.config, begun.local
    done: dict[str, Any] = {"steps": learned.steps, "loss": learned.loss}
    changes: dict[str, bytes] = {}
    cost = None
    if local.private is not None:
        assert learned.private is not None  # a private Local is trained privately
        cost, said, changes = close_round(local.private, learned.private)
        done |= said
    delta = learned.delta(local)
    sent: Delta | bytes = delta
    if config.uplink.codec != "fp32" or config.uplink.error_feedback:
        seed = round_seed(config.seed, f"{local.name}/uplink", assignment.round)
        rng = np.random.default_rng(seed)
        sent, memory = feedback.send(
            delta, begun.adapter, config.uplink, rng, folder, assignment.run
        )
        changes |= memory
    if config.kept is not None:
        kept = learned.after.only(config.kept)
        changes |= personal.kept_tensors(folder, assignment.run).replaced(kept)
    if begun.beside is not None:
        changes |= _fit_beside(begun, begun.beside, folder)
    report = Trained(
        site=local.name,
        num_examples=len(local.examples),
        seconds=time.perf_counter() - begun.started,
        **done,
    )
    zeros = local.tells == "nothing" and not any(array.any() for array in delta.arrays.values())
    return Came(report=report, sent=sent, changes=changes, cost=cost, zeros=zeros)


def _fit_beside(begun: Begun, beside: personal.Beside, folder: Path) -> dict[str, bytes]:
    """Return the private adapter's file as it is to be; {}: one that diverges stays."""
    assignment, number = begun.assignment, begun.assignment.round
    if begun.local.failed is not None:
        log.warning("%s leaves its private adapter as it was", begun.local.name)
        return {}
    try:
        own = personal.train(
            beside,
            begun.adapter,
            begun.local.examples,
            assignment.config,
            number=number,
            seed=round_seed(assignment.config.seed, f"{begun.local.name}/personal", number),
            progress=begun.progress[1],
            to_the_end=begun.local.tells == "nothing",
        )
    except failures(begun.local.tells, RunError, IncompatibleAdapter) as error:
        # the shared delta does not depend on it
        if begun.stopped(error):
            raise
        log.warning("%s leaves its private adapter as it was: %s", begun.local.name, error)
        return {}
    return personal.private_adapter(folder, assignment.run).replaced(own)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a site finds its models, and what it has kept of a run."""

    name: str  # of the site
    folder: Path
    device: Device
    max_rank: int | None
    models: Models

    def shared(self, assignment: Assignment, adapter: Adapter) -> tuple[Classifier, Adapter]:
        """Return the run's classifier, and what was received with what the site has kept."""
        config = assignment.config
        classifier = self.models.classifier(config, self.device)
        require_same_spec(classifier.spec, adapter.spec)
        if config.kept is None:
            return classifier, adapter
        kept = personal.kept_tensors(self.folder, assignment.run).load(adapter.spec)
        return classifier, personal.with_kept(adapter, config.kept, kept)

    def private(self, assignment: Assignment, adapter: Adapter) -> personal.Beside | None:
        """Return the model with the private adapter; None in a run without."""
        config = assignment.config
        if not config.personal.rank:
            return None
        lora = personal.wider(config, self.max_rank)
        classifier = self.models.classifier(config, self.device, lora)
        own = personal.private_adapter(self.folder, assignment.run).load(classifier.spec)
        seed = round_seed(config.seed, f"{self.name}/personal", assignment.round)
        start = personal.beside(classifier.spec, adapter, own, np.random.default_rng(seed))
        return personal.Beside(classifier=classifier, start=start, trained=own is not None)


def metrics_of(
    shared: tuple[Classifier, Adapter],
    beside: personal.Beside | None,
    features: Sequence[torch.Tensor],
    labels: NDArray[np.int64],
) -> dict[str, float]:
    """Return metrics of the shared model, and of the private one if it was ever trained."""
    classifier, start = shared
    load_adapter(classifier, start)
    metrics = evaluate(predict(classifier, features), labels)
    if beside is not None and beside.trained:
        load_adapter(beside.classifier, beside.start)
        own = evaluate(predict(beside.classifier, features), labels)
        metrics |= {f"personal_{name}": value for name, value in own.items()}
    return metrics


def framed(sent: Delta | bytes) -> bytes:
    """Return the frame of what is sent."""
    return sent if isinstance(sent, bytes) else wire.encode(sent)


def inputs_of(key: str, fit: str, start: Adapter, records: Sequence[bytes], device: str) -> str:
    """Return the digest of all that decides a fit: its question, values, records and software."""
    from anabranch.client.policy.code import code_digest  # here and not above: it reads sources

    rows = hashlib.sha256(b"".join(records)).hexdigest()
    values = wire.digest(wire.encode(start))
    parts = (key, fit, values, rows, code_digest(), torch.__version__, device)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def schedule_of(config: RunConfig, number: int, num_examples: int) -> Schedule:
    """Return where round `number` stands in the run, in full rounds of this site."""
    steps = steps_per_round(num_examples, config.training)
    return Schedule(first_step=(number - 1) * steps, total_steps=config.federation.rounds * steps)


def round_seed(seed: int, site: str, round_number: int) -> int:
    """Return the seed of one site's shuffling in one round: the same on every engine."""
    text = f"{seed}/{site}/{round_number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
