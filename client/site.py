"""A site: a folder on its owner's disk, and what it does when the coordinator asks.

    site.toml        what its owner decides (site_file.py)
    ledger.sqlite    privacy spent on its records, over all runs; ledger.head says how far it is
    personal/        what it trains for itself and never sends (personal.py)
    clipping/        where adaptive clipping goes on (private_round.py)
    runs/            the configuration that each run began with

`Site.train` is the whole way of a delta: contract, base model, prefix cache, local training
(private if the run says so), ledger, delta, frame. It knows nothing of Flower. What goes wrong
is logged to the standard error of the site's process; the text of an unforeseen error never
leaves.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anabranch.client import feedback, personal
from anabranch.client.data.records import Records, load_records, split
from anabranch.client.ledger import Ledger
from anabranch.client.local import Learned, Local, train_alone
from anabranch.client.memory import give_back
from anabranch.client.models import MODELS, Models
from anabranch.client.private_round import Books, PrivateRound, close_round, open_round
from anabranch.client.site_file import SiteFile, ledger_of, read_site, witness_folder
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import load_adapter
from anabranch.client.tuning.metrics import evaluate
from anabranch.client.tuning.randomness import Randomness
from anabranch.client.tuning.training import Schedule, predict, steps_per_round
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import (
    ConfigError,
    DataError,
    IncompatibleAdapter,
    PrivacyError,
    ProtocolError,
    RunError,
)
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.messages import Assignment, Evaluated, Trained
from anabranch.protocols.spec import AdapterSpec, require_same_spec
from anabranch.storage.files import write_atomic

log = logging.getLogger(__name__)


class Site:
    """One participant. Raises ConfigError for a wrong site.toml, naming the field."""

    def __init__(self, folder: Path, models: Models = MODELS, file: SiteFile | None = None) -> None:
        self.folder = folder
        self._file = read_site(folder) if file is None else file  # given: of a simulated client
        self.name = self._file.name
        self._models = models
        self._records: dict[str, tuple[Records, Records]] = {}
        self._prepared: dict[tuple[str, int], tuple[Records, Sequence[torch.Tensor]]] = {}

    @property
    def data(self) -> Path:
        """Return the file or folder of the records."""
        return (self.folder / self._file.data).resolve()

    @property
    def max_rank(self) -> int | None:
        """Return the highest LoRA rank this machine trains; None: any."""
        return self._file.max_rank

    @property
    def ledger(self) -> Ledger:
        """Return the site's privacy ledger."""
        return ledger_of(self.folder, self._file)

    def records(self, config: RunConfig) -> tuple[Records, Records]:
        """Return (training, held-out) records; raise DataError if the contract is broken."""
        digest = config.digest()
        if (held := self._records.get(digest)) is None:  # read once: threads may replace it
            try:
                records = load_records(self.data, config)
            except DataError as error:  # it is sent on
                raise DataError(self._outside(error, config)) from None
            held = split(records, config.training.holdout, config.seed)
            self._records = {digest: held}
        return held

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        """Admit every run: what the owner allows is decided in client/policy, before this."""

    def sizes(self, config: RunConfig) -> tuple[Sized, Sized]:
        """Return the (training, held-out) records, which only have to be counted."""
        return self.records(config)

    def _outside(self, error: DataError, config: RunConfig) -> str:
        """Return what the coordinator may read of a broken contract; the log has all of it.

        Whoever writes the contract could find out a cell by asking again and again with other
        bounds: where privacy is asked for, it learns that something is wrong and no more.
        """
        if config.privacy is None and self._file.budget is None:
            return str(error).replace(str(self.data), "records")  # where files lie is not told
        log.error("%s: %s", self.name, error)
        return (
            "the records do not keep the data contract of this run; at the site, `anabranch site "
            "check` lists what is wrong"
        )

    def train(self, assignment: Assignment, adapter: Adapter) -> tuple[Trained, bytes]:
        """Return what this site learned from `adapter` in one round, the delta as one frame.

        The delta is of `assignment.part`. Tensors that the run keeps at the site are trained
        with it, in a private run by the same noisy steps: the part depends on them. The private
        adapter is trained after it, without noise: it never leaves, and nothing that is sent
        depends on it.

        Raises DataError (contract), ConfigError (a part beyond `max_rank`),
        IncompatibleAdapter (wrong base or shapes), PrivacyError (privacy cannot be established)
        or ModelError (the base model changed, or what the site keeps cannot be read).
        """
        begun = self.prepare(assignment, adapter)
        try:
            learned = train_alone(begun.local)
        except PrivacyError as error:
            raise self._outward(error) from error
        report, sent = self.finish(begun, learned)
        give_back()
        return report, sent if isinstance(sent, bytes) else wire.encode(sent)

    def prepare(self, assignment: Assignment, adapter: Adapter) -> Begun:
        """Return this round's training, ready to begin; a private round is reserved then.

        Raises what `train` does.
        """
        config, started = assignment.config, time.perf_counter()
        self._require_within_budget(config)
        self._require_one_configuration(assignment)
        count = len(self.sizes(config)[0])
        self._require_part(assignment, adapter.spec)
        classifier, start = self._shared(assignment, adapter)
        beside = self._private(assignment, adapter)
        examples, identities = self._training(config, classifier)
        local = Local(
            name=self.name,
            classifier=classifier,
            start=start,
            examples=examples,
            training=config.training,
            steps=self._steps(assignment, count),
            schedule=_schedule(assignment, count),
            seed=round_seed(config.seed, self.name, assignment.round),
            proximal_mu=config.federation.proximal_mu,
            part=assignment.part,
            kept=config.kept,
            private=self._reserve(assignment, identities()) if config.privacy else None,
        )
        return Begun(
            assignment=assignment, adapter=adapter, local=local, beside=beside, started=started
        )

    def finish(self, begun: Begun, learned: Learned) -> tuple[Trained, Delta | bytes]:
        """Return the report, and what is sent: the delta, or its frame in the run's codec.

        A delta stands for its frame in full precision, which whoever sends it makes. What the
        site keeps is written, and a private round is settled, before this returns.
        """
        assignment, config, local = begun.assignment, begun.assignment.config, begun.local
        done: dict[str, Any] = {"steps": learned.steps, "loss": learned.loss}
        if local.private is not None:
            done |= self._settle(local.private, learned)
        delta = learned.after.minus(
            local.start,
            num_examples=len(local.examples),
            part=assignment.part,
            steps=learned.steps,
        )
        sent: Delta | bytes = delta
        if config.uplink.codec != "fp32" or config.uplink.error_feedback:
            seed = round_seed(config.seed, f"{self.name}/uplink", assignment.round)
            rng = np.random.default_rng(seed)
            sent = feedback.send(
                delta, begun.adapter, config.uplink, rng, self.folder, assignment.run
            )
        if config.kept is not None:
            kept = learned.after.only(config.kept)
            personal.kept_tensors(self.folder, assignment.run).save(kept)
        if begun.beside is not None:
            self._fit_beside(assignment, begun.adapter, begun.beside, local.examples)
        report = Trained(
            site=self.name,
            num_examples=len(local.examples),
            seconds=time.perf_counter() - begun.started,
            **done,
        )
        return report, sent

    def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
        """Return metrics of `adapter` on the held-out records; refused in a private run.

        Tensors that the run keeps at the site take the place of those in `adapter`. Metrics of
        the model with the private adapter, if there is one yet, have names with "personal_".
        """
        config = assignment.config
        if config.privacy is not None:
            raise PrivacyError(
                "client evaluation would release metrics that [privacy] does not cover: set "
                "federation.client_evaluation = false"
            )
        self._require_within_budget(config)
        _, held = self.records(config)
        if len(held) == 0:
            raise DataError("no held-out records: set training.holdout above 0")
        classifier, start = self._shared(assignment, adapter)
        load_adapter(classifier, start)
        features = self._held_features(config, classifier, held)
        metrics = evaluate(predict(classifier, features), held.labels)
        beside = self._private(assignment, adapter)
        if beside is not None and beside.trained:
            load_adapter(beside.classifier, beside.start)
            own = evaluate(predict(beside.classifier, features), held.labels)
            metrics |= {f"personal_{name}": value for name, value in own.items()}
        return Evaluated(site=self.name, num_examples=len(held), metrics=metrics)

    def _require_within_budget(self, config: RunConfig) -> None:
        """Refuse a run without [privacy] where the owner has set a budget: it costs any ε."""
        budget = self._file.budget
        if budget is not None and config.privacy is None:
            raise PrivacyError(
                f"the run has no [privacy], and the [budget] of site.toml allows epsilon = "
                f"{budget.epsilon:g} over all runs: nothing is trained. Add [privacy] to run.toml"
            )

    def _require_one_configuration(self, assignment: Assignment) -> None:
        """Refuse a run that goes on with another configuration than it began with.

        What a site keeps of a run goes into its later rounds: nothing that was trained without
        noise may get into a round that is accounted for.
        """
        file = self.folder / "runs" / personal.checked_run(assignment.run)
        digest = assignment.config.digest().encode()
        if not file.exists():
            write_atomic(file, digest)
        elif file.read_bytes() != digest:
            raise ProtocolError(
                f"run {assignment.run} began with another configuration than it is asked to go on "
                "with here: a new configuration is a new run"
            )

    def _require_part(self, assignment: Assignment, spec: AdapterSpec) -> None:
        """Refuse a part that this machine does not train, or that holds what stays here."""
        part, kept = assignment.part, assignment.config.kept
        if part.whole and kept is None and self.max_rank is None:
            return  # of any adapter
        part.shapes(spec)  # refuses ranks that are not there, before anything is spent
        rank = personal.trained_rank(spec, part, kept)
        if self.max_rank is not None and rank > self.max_rank:
            raise ConfigError(
                f"asked to train rank {rank}, but max_rank = {self.max_rank} in site.toml: take a "
                "lower lora.rank, a method that gives every site ranks it can train, or raise "
                "max_rank"
            )
        both = set() if kept is None else set(part.names(spec)) & set(kept.names(spec))
        if both:
            raise ProtocolError(f"{min(both)} stays at the site in this run, but was asked for")

    def _shared(self, assignment: Assignment, adapter: Adapter) -> tuple[Classifier, Adapter]:
        """Return the run's classifier, and what was received with what the site has kept."""
        config = assignment.config
        classifier = self._models.classifier(config, self._file.device)
        require_same_spec(classifier.spec, adapter.spec)
        if config.kept is None:
            return classifier, adapter
        kept = personal.kept_tensors(self.folder, assignment.run).load(adapter.spec)
        return classifier, personal.with_kept(adapter, config.kept, kept)

    def _private(self, assignment: Assignment, adapter: Adapter) -> personal.Beside | None:
        """Return the model with the private adapter; None in a run without."""
        config = assignment.config
        if not config.personal.rank:
            return None
        lora = personal.wider(config, self.max_rank)
        classifier = self._models.classifier(config, self._file.device, lora)
        own = personal.private_adapter(self.folder, assignment.run).load(classifier.spec)
        seed = round_seed(config.seed, f"{self.name}/personal", assignment.round)
        start = personal.beside(classifier.spec, adapter, own, np.random.default_rng(seed))
        return personal.Beside(classifier=classifier, start=start, trained=own is not None)

    def _fit_beside(
        self,
        assignment: Assignment,
        shared: Adapter,
        beside: personal.Beside,
        examples: Examples,
    ) -> None:
        """Train and keep the private adapter; one that diverges stays as it was."""
        config, number = assignment.config, assignment.round
        seed = round_seed(config.seed, f"{self.name}/personal", number)
        try:
            own = personal.train(beside, shared, examples, config, number=number, seed=seed)
        except (RunError, IncompatibleAdapter) as error:  # the shared delta does not depend on it
            log.warning("%s leaves its private adapter as it was: %s", self.name, error)
            return
        personal.private_adapter(self.folder, assignment.run).save(own)

    def _training(
        self, config: RunConfig, classifier: Classifier
    ) -> tuple[Examples, Callable[[], Sequence[bytes]]]:
        """Return the training records as `fit` takes them, and what gives their identities."""
        train, _ = self.records(config)
        features = self._features(config, classifier, train)
        return Examples(features, torch.from_numpy(train.labels)), train.identities

    def _features(
        self, config: RunConfig, classifier: Classifier, train: Records
    ) -> Sequence[torch.Tensor]:
        """Return the training records as `fit` takes them: encoded once per run and thread."""
        key = (config.digest(), threading.get_ident())
        of, features = self._prepared.get(key, (None, ()))
        if of is not train:  # the file was read again: what is charged must be what is trained
            features = self._models.cache(config).prepare(classifier, train.inputs)
            self._prepared = {key: (train, features)}
        return features

    def _held_features(
        self, config: RunConfig, classifier: Classifier, held: Records
    ) -> Sequence[torch.Tensor]:
        """Return the held-out records as `predict` takes them."""
        return self._models.cache(config).prepare(classifier, held.inputs)

    def _steps(self, assignment: Assignment, num_examples: int) -> int:
        """Return the optimiser steps of this round."""
        return steps_per_round(num_examples, assignment.config.training)

    def _reserve(self, assignment: Assignment, rows: Sequence[bytes]) -> PrivateRound:
        """Plan and reserve a private round; an error's text leaves without the site's paths."""
        try:
            return open_round(
                assignment,
                rows,
                folder=self.folder,
                ledger=self.books,
                budget=self._file.budget,
                randomness=self._randomness(assignment),
            )
        except PrivacyError as error:
            raise self._outward(error) from error

    @property
    def books(self) -> Books:
        """Return where a private round is reserved and settled: the site's ledger."""
        return self.ledger

    def _randomness(self, assignment: Assignment) -> Randomness | None:
        """Return where the noise of a private round comes from; None: the operating system."""
        return None

    def _settle(self, round: PrivateRound, learned: Learned) -> dict[str, Any]:
        assert learned.private is not None  # a private Local is trained privately
        try:
            return close_round(round, learned.private)
        except PrivacyError as error:
            raise self._outward(error) from error

    def _outward(self, error: PrivacyError) -> PrivacyError:
        """Return an error that does not say where files lie; the log has all of it."""
        if (text := self._without_paths(str(error))) == str(error):
            return error
        log.warning("%s: %s", self.name, error)
        return PrivacyError(text)

    def _without_paths(self, text: str) -> str:
        folders = {self.folder, self.folder.absolute(), self.folder.resolve()}
        witnesses = witness_folder(self._file)
        for folder in folders if witnesses is None else folders | {witnesses}:
            text = text.replace(f"{folder}{os.sep}", "")
        return text


@dataclass(frozen=True, kw_only=True, eq=False)
class Begun:
    """A round between `prepare` and `finish`."""

    assignment: Assignment
    adapter: Adapter  # as it was received
    local: Local
    beside: personal.Beside | None
    started: float  # of time.perf_counter()


def _schedule(assignment: Assignment, num_examples: int) -> Schedule:
    """Return where a round stands in the run, in full rounds of this site."""
    steps = steps_per_round(num_examples, assignment.config.training)
    return Schedule(
        first_step=(assignment.round - 1) * steps,
        total_steps=assignment.config.federation.rounds * steps,
    )


def round_seed(seed: int, site: str, round_number: int) -> int:
    """Return the seed of one site's shuffling in one round: the same on every engine."""
    text = f"{seed}/{site}/{round_number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
