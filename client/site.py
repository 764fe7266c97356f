"""A site: a folder on its owner's disk, and what it does when the coordinator asks.

    site.toml        what its owner decides (site_file.py)
    ledger.sqlite    privacy spent on its records, over all runs; ledger.head says how far it is
    personal/        what it trains for itself and never sends (personal.py)
    clipping/        where adaptive clipping goes on (private_round.py)
    feedback/        what a codec left out of earlier deltas (feedback.py)
    runs/            the configuration that each run began with
    answers/         its last answers, and where an unfinished round stands (answers.py)
    secure/          its part in secure sums: what was given, what waits (sums/site.py)

`Site.train` is the whole way of a delta: contract, base model, prefix cache, local training
(private if the run says so), ledger, delta, frame. It can be asked again at any time, and its
process killed at any time: a round is done once. It knows nothing of Flower. What goes wrong
is logged to the standard error of the site's process; the text of an unforeseen error never
leaves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from anabranch.client.answers import Answers
from anabranch.client.data.records import Records, load_records, split
from anabranch.client.local import Learned, Local, train_alone
from anabranch.client.memory import give_back
from anabranch.client.models import MODELS, Models
from anabranch.client.one_round import (
    Asked,
    Place,
    came_of,
    framed,
    metrics_of,
    schedule_of,
)
from anabranch.client.one_round import (
    Begun as Begun,
)
from anabranch.client.one_round import (
    round_seed as round_seed,
)
from anabranch.client.policy.policy_file import columns_never
from anabranch.client.private_round import settle
from anabranch.client.question import key_of
from anabranch.client.refusals import (
    MACHINE,
    Tells,
    explains,
    failures,
    kept_back,
    outside,
    tells,
)
from anabranch.client.requirements import (
    require_evaluated,
    require_one_configuration,
    require_part,
    require_within_budget,
)
from anabranch.client.site_file import SiteFile, read_site
from anabranch.client.sums.site import InSums
from anabranch.client.tuning.checkpoint import SECONDS, Watch
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Dense, Examples
from anabranch.client.tuning.training import steps_per_round
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError, PrivacyError
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.messages import Assignment, Evaluated, Trained
from anabranch.storage.files import write_atomic

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """The training records as `fit` takes them, or why they are not."""

    examples: Examples
    identities: Callable[[], Sequence[bytes]]
    failed: Exception | None = None


class Site(InSums):
    """One participant. Raises ConfigError for a wrong site.toml, naming the field."""

    def __init__(
        self,
        folder: Path,
        models: Models = MODELS,
        file: SiteFile | None = None,
        watch: Watch | None = None,
        *,
        save_every: float = SECONDS,
        process_per_message: bool = False,
    ) -> None:
        """`file` is that of a simulated client, which keeps no answers and is not watched in
        training; None: read site.toml.

        `watch` is told ("preparing" | "training" | "evaluating", step, steps), and of training
        each step; an AnabranchError that it raises ends the round, which goes on from there when
        it is asked again. `save_every` seconds of training are lost at most with the process.
        `process_per_message`: the next message is answered by another process (client/app.py).
        """
        self.folder = folder
        self._file = read_site(folder) if file is None else file
        self.name = self._file.name
        self._models = models
        device, max_rank = self._file.device, self._file.max_rank
        self._place = Place(self.name, folder, device, max_rank, models)
        self._answers = Answers(folder) if file is None else None
        self.watch, self._save_every = watch, save_every
        self.on_zeros: Callable[[], None] | None = None  # told of an update that counts as zeros
        self.process_per_message = process_per_message
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

    def records(self, config: RunConfig) -> tuple[Records, Records]:
        """Return (training, held-out) records; raise DataError if the contract is broken."""
        never = columns_never(self.folder)
        key = f"{config.digest()} {sorted(never)}"
        if (held := self._records.get(key)) is None:  # read once: threads may replace it
            try:
                records = load_records(self.data, config, never)
            except DataError as error:  # it is sent on
                if explains(config, self._file.budget):
                    raise DataError(outside(error, self.data)) from None
                raise DataError(kept_back(error, self.name)) from None
            except MACHINE as error:
                if explains(config, self._file.budget):
                    raise
                raise DataError(kept_back(error, self.name)) from None
            held = split(records, config.training.holdout, config.seed)
            self._records = {key: held}
        return held

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        """Admit every run: what the owner allows is decided in client/policy, before this."""

    def sizes(self, config: RunConfig) -> tuple[Sized, Sized]:
        """Return the (training, held-out) records, which only have to be counted."""
        return self.records(config)

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
        require_within_budget(self._file.budget, assignment.config)
        if self._answers is None:
            begun = self.prepare(assignment, adapter)
            report, sent = self.finish(begun, train_alone(begun.local))
            give_back()
            return report, framed(sent)
        key = key_of(assignment, adapter)
        try:
            with self._answers.alone(self.ledger):
                held = self._answers.held(key)
                report, frame = held or self._answer(self._answers, key, assignment, adapter)
            return self._kept_for_sums(assignment, adapter, report, frame)
        except PrivacyError as error:
            raise self._outward(error) from error

    def _answer(
        self, answers: Answers, key: str, assignment: Assignment, adapter: Adapter
    ) -> tuple[Trained, bytes]:
        """Train and commit a round that is not done; what it changes is in place afterwards."""
        attempt = answers.begin(key, assignment, self.ledger)
        device = self._file.device
        asked = Asked(answers, key, attempt, device, self.watch, self._save_every)
        begun = self._prepare(assignment, adapter, asked)
        try:
            came = came_of(begun, train_alone(begun.local), self.folder)
        except BaseException as error:
            if not begun.stopped(error):
                answers.forget(key)  # it is sent that training failed: see answers.py
            raise
        if came.zeros:
            self._say_zeros(assignment)
        answers.commit(key, came.framed)
        give_back()
        return answers.complete(key, self.ledger)

    def prepare(self, assignment: Assignment, adapter: Adapter) -> Begun:
        """Return this round's training, ready to begin; a private round is reserved then.

        For whoever trains many clients together: what is prepared is to be given to `finish`
        once, and is not among the answers. Raises what `train` does. Where members make the noise
        of a sum, frozen layers that fail on the records do not raise: the update will be zeros.
        """
        return self._prepare(assignment, adapter, None)

    def _prepare(self, assignment: Assignment, adapter: Adapter, asked: Asked | None) -> Begun:
        config, started = assignment.config, time.perf_counter()
        self._tell("preparing")
        require_within_budget(self._file.budget, config)
        self._require_one_configuration(assignment)
        count = len(self.sizes(config)[0])
        require_part(assignment, adapter.spec, self.max_rank)
        classifier, start = self._place.shared(assignment, adapter)
        beside = self._place.private(assignment, adapter)
        told = tells(config)
        prepared = self._ready(config, classifier, told)
        examples, identities = prepared.examples, prepared.identities
        progress, aside = None, None
        if asked is not None:
            progress = asked.progress("shared", start, identities())
            aside = asked.progress("private", beside.start, identities()) if beside else None
        local = Local(
            name=self.name,
            classifier=classifier,
            start=start,
            examples=examples,
            training=config.training,
            steps=self._steps(assignment, count),
            schedule=schedule_of(config, assignment.round, count),
            seed=round_seed(config.seed, self.name, assignment.round),
            proximal_mu=config.federation.proximal_mu,
            part=assignment.part,
            kept=config.kept,
            private=self._reserve(assignment, identities(), asked, start.spec)
            if config.privacy
            else None,
            progress=progress,
            tells=told,
            failed=prepared.failed,
        )
        return Begun(
            assignment=assignment,
            adapter=adapter,
            local=local,
            beside=beside,
            started=started,
            progress=(progress, aside),
        )

    def finish(self, begun: Begun, learned: Learned) -> tuple[Trained, Delta | bytes]:
        """Return the report, and what is sent: the delta, or its frame in the run's codec.

        A delta stands for its frame in full precision, which whoever sends it makes. A private
        round is settled, and what the site keeps is written, before this returns.
        """
        came, report = came_of(begun, learned, self.folder), None
        if came.zeros:
            self._say_zeros(begun.assignment)
        if begun.local.private is not None and came.cost is not None:
            try:
                report = settle(begun.local.private, came.cost)
            except PrivacyError as error:
                raise self._outward(error) from error
        for path, data in came.changes.items():
            write_atomic(self.folder / path, data)
        trained = msgspec.structs.replace(came.report, **(report or {}))
        return self._kept_for_sums(begun.assignment, begun.adapter, trained, came.sent)

    def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
        """Return metrics of `adapter` on the held-out records; refused in a private run.

        Refused, too, in a run whose configuration asks no site to evaluate.

        Tensors that the run keeps at the site take the place of those in `adapter`. Metrics of
        the model with the private adapter, if there is one yet, have names with "personal_".
        """
        config = assignment.config
        require_evaluated(config)
        require_within_budget(self._file.budget, config)
        self._tell("preparing")
        if self._answers is not None and self._answers.pending:
            with self._answers.alone(self.ledger):
                pass  # what the site keeps is in its place now
        _, held = self.records(config)
        if len(held) == 0:
            raise DataError("no held-out records: set training.holdout above 0")
        shared = self._place.shared(assignment, adapter)
        features = self._held_features(config, shared[0], held)
        self._tell("evaluating")
        beside = self._place.private(assignment, adapter)
        metrics = metrics_of(shared, beside, features, held.labels)
        return Evaluated(site=self.name, num_examples=len(held), metrics=metrics)

    def _tell(self, activity: str) -> None:
        """Tell whoever watches what is done now."""
        if self.watch is not None:
            self.watch(activity, 0, 0)

    def _require_one_configuration(self, assignment: Assignment) -> None:
        require_one_configuration(self.folder, assignment)

    def _say_zeros(self, assignment: Assignment) -> None:
        """Tell this machine, and nobody else, that a round came to nothing."""
        log.warning(
            "%s: its update of round %d of run %s is zeros",
            self.name,
            assignment.round,
            assignment.run,
        )
        if self.on_zeros is not None:
            self.on_zeros()

    def _ready(self, config: RunConfig, classifier: Classifier, told: Tells) -> _Prepared:
        """Return the training records; where nothing is told, even if the frozen layers fail."""
        try:
            return _Prepared(*self._training(config, classifier))
        except failures(told) as error:
            train, _ = self.records(config)
            none = Dense(torch.zeros(len(train), 0))  # what is charged are the rows, not these
            examples = Examples(none, torch.from_numpy(train.labels))
            return _Prepared(examples, train.identities, error)

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
        return self._models.cache(config).prepare(classifier, held.inputs)

    def _steps(self, assignment: Assignment, num_examples: int) -> int:
        return steps_per_round(num_examples, assignment.config.training)
