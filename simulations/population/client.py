"""A client of a simulated population: a site whose records are rows of one shared data set.

It is there while its round is trained and gone afterwards: a population of any size costs the
memory of one cohort. What a run makes it keep (error feedback, private adapters, kept tensors)
goes into a folder of its own under the run folder, made when first needed. Nothing that is spent
here is charged to a real site's ledger.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anabranch.client.data.records import Records
from anabranch.client.models import MODELS, Models
from anabranch.client.private_round import Books
from anabranch.client.site import Begun, Site
from anabranch.client.site_file import SiteFile
from anabranch.client.sums.site import Sent
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.messages import Assignment, Trained
from anabranch.protocols.tables import Device, Training
from anabranch.simulations.population.data import Rows, SharedData

StepLimit = Callable[[str, int, int], int]  # (client, round, planned steps) -> steps it manages
TrainingOf = Callable[[str, Training], Training]  # (client, the run's) -> its own [training]
Poisoned = Callable[[str, Records], Records]  # (client, its records) -> what it trains on
Lies = Callable[[str, Assignment, Delta], Delta]  # (client, round, its delta) -> what it masks
Crash = Callable[[str, int], int | None]  # (client, round) -> steps until it dies; None: it lives


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """How a population's clients differ from a site that does as it is told."""

    step_limit: StepLimit | None = None  # partial work: who manages fewer steps
    training_of: TrainingOf | None = None  # own learning rates, batch sizes, optimisers
    poisoned: Poisoned | None = None  # what a lying client trains on; an honest one: the same
    lies: Lies | None = None  # what a lying client puts into a secure sum; elsewhere: nobody lies
    crash: Crash | None = None  # whose process dies in training
    noise_seed: int | None = None  # private noise that can be drawn again; None: it cannot


HONEST = Conduct()
PLANNED = ("step_limit", "training_of")  # of a Conduct: they would change a private round's plan


class VirtualSite(Site):
    """One client: rows `train` and `held` of the shared data."""

    def __init__(
        self,
        name: str,
        data: SharedData,
        train: Rows,
        held: Rows,
        *,
        folder: Path,
        device: Device = "cpu",
        max_rank: int | None = None,
        books: Books | None = None,
        conduct: Conduct = HONEST,
        models: Models = MODELS,
    ) -> None:
        file = SiteFile(name=name, data="-", device=device, max_rank=max_rank)
        super().__init__(folder, models, file)
        self._shared_data, self._train, self._held = data, train, held
        self._books, self._conduct = books, conduct

    def sizes(self, config: RunConfig) -> tuple[Sized, Sized]:
        """Return how many (training, held-out) records there are, without making them."""
        return range(len(self._train)), range(len(self._held))

    def records(self, config: RunConfig) -> tuple[Records, Records]:
        """Return (training, held-out) records."""
        records = self._shared_data.records
        return records.take(self._train), records.take(self._held)

    def prepare(self, assignment: Assignment, adapter: Adapter) -> Begun:
        """Return this round's training as this client does it.

        Raises what `Site.prepare` does, RunError if its process dies in training, and
        ConfigError, before anything is reserved, for a private run with a conduct that changes
        what the run's privacy was planned for.
        """
        self._require_planned(assignment.config)
        begun = super().prepare(assignment, adapter)
        self._survive(assignment, begun.local.steps)
        of = self._conduct.training_of
        if of is None:
            return begun
        training = of(self.name, begun.local.training)
        local = dataclasses.replace(begun.local, training=training)
        return dataclasses.replace(begun, local=local)

    def _training(
        self, config: RunConfig, classifier: Classifier
    ) -> tuple[Examples, Callable[[], Sequence[bytes]]]:
        data = self._shared_data
        if self._conduct.poisoned is not None:
            honest = data.records.take(self._train)
            poisoned = self._conduct.poisoned(self.name, honest)
            if poisoned is not honest:  # its inputs may be others than the shared ones
                features = super()._features(config, classifier, poisoned)
                labels = torch.from_numpy(poisoned.labels)
                return Examples(features, labels), poisoned.identities
        features = data.features(config, classifier, self._train)
        labels = torch.from_numpy(data.records.labels[self._train])
        return Examples(features, labels), lambda: data.records.take(self._train).identities()

    def _held_features(
        self, config: RunConfig, classifier: Classifier, held: Records
    ) -> Sequence[Tensor]:
        return self._shared_data.features(config, classifier, self._held)

    def _kept_for_sums(
        self, assignment: Assignment, adapter: Adapter, trained: Trained, sent: Sent
    ) -> tuple[Trained, Sent | bytes]:
        lies = self._conduct.lies
        if lies is None or assignment.config.secure_aggregation is None:
            return super()._kept_for_sums(assignment, adapter, trained, sent)
        assert isinstance(sent, Delta)  # the ring is the codec of such a run
        lie = lies(self.name, assignment, sent)
        report, _ = super()._kept_for_sums(assignment, adapter, trained, lie)
        return report, b""

    def _require_planned(self, config: RunConfig) -> None:
        """Refuse conduct that would spend something else than [privacy] has planned."""
        own = [name for name in PLANNED if getattr(self._conduct, name) is not None]
        if config.privacy is not None and own:
            raise ConfigError(
                f"{self.name}: Conduct.{own[0]} does not go with [privacy]: the steps and the "
                "batch size of a private round are fixed in advance. Leave it out"
            )

    def _survive(self, assignment: Assignment, steps: int) -> None:
        """Die in training: what was written before it, a reserved spend, stays written."""
        after = (
            None
            if self._conduct.crash is None
            else self._conduct.crash(self.name, assignment.round)
        )
        if after is not None:
            raise RunError(
                f"{self.name}: its process died after {min(after, steps)} of {steps} steps"
            )

    def _steps(self, assignment: Assignment, num_examples: int) -> int:
        planned = super()._steps(assignment, num_examples)
        limit = self._conduct.step_limit
        return planned if limit is None else limit(self.name, assignment.round, planned)

    def _require_one_configuration(self, assignment: Assignment) -> None:
        """A population lives as long as its run, which has one configuration."""

    @property
    def books(self) -> Books:
        """Return the books of this simulation."""
        assert self._books is not None  # a population with [privacy] has them
        return self._books

    def _randomness(self, assignment: Assignment) -> Randomness | None:
        seed = self._conduct.noise_seed
        if seed is None:
            return None
        text = f"{seed}/{self.name}/{assignment.round}/noise".encode()
        return Randomness(hashlib.sha256(text).digest())
