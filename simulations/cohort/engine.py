"""Trains many clients together over one frozen base; the numbers are those of one at a time.

    Locals ─► groups that can be batched ─► micro-cohorts (planner.py) ─► steps ─► Learned
        └──── what cannot be batched, with the reason ─► client/local.train_alone

A micro-cohort runs every step once for all its clients: frozen matrices multiply the rows of all
of them, what is trained is stacked along a first axis. Results equal those of `train_alone` to
rounding, client by client, whatever the cohort is.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from anabranch.client.local import (
    Learned,
    Local,
    nothing_learned,
    require_frozen,
    require_records,
    train_alone,
    train_unchecked,
)
from anabranch.client.tuning.active import union
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Dense, lengths
from anabranch.client.tuning.text import CUT_BETWEEN_LAYERS, TextClassifier
from anabranch.protocols.errors import AnabranchError, ConfigError, ModelError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import require_same_spec
from anabranch.simulations.cohort.grouped import Unbatchable, why_not
from anabranch.simulations.cohort.kernels import packs
from anabranch.simulations.cohort.packed import why_not as why_not_packed
from anabranch.simulations.cohort.planner import Work, micro_cohorts
from anabranch.simulations.cohort.precision import BaseDtype, products_for
from anabranch.simulations.cohort.private import can_batch, train_private_cohort
from anabranch.simulations.cohort.products import FLOAT32, Products
from anabranch.simulations.cohort.stacked import Masks
from anabranch.simulations.cohort.steps import train_together

log = logging.getLogger(__name__)

DIGEST_EVERY = 20  # calls of `train`: on MiniLM a digest takes 50 ms

Outcome = Learned | AnabranchError

NOT_PACKED = 'base_dtype = "bf16" is for packed texts: in float32'
PRIVATE_FLOAT32 = 'base_dtype = "bf16" is not for private rounds: in float32'

# Text encoders of which padding to another client's length is known to change nothing.
PADDED_ALIKE = CUT_BETWEEN_LAYERS | {"distilbert", "albert"}


class CohortEngine:
    """Trains cohorts. `reasons` counts the clients that were trained alone, or not in bfloat16."""

    def __init__(self, base_dtype: BaseDtype = "fp32") -> None:
        """`base_dtype = "bf16"`: see precision.py; clients that are not packed stay in float32."""
        self.reasons: Counter[str] = Counter()
        self._base_dtype = base_dtype
        self._products: WeakKeyDictionary[Classifier, Products] = WeakKeyDictionary()
        self._frozen = _Frozen()
        self._unchecked: dict[Classifier, list[int]] = {}  # trained alone in this call: ids

    def train(self, locals: Sequence[Local]) -> list[Outcome]:
        """Return what came of every Local, in order; an error is that client's alone.

        A Local of no steps learns nothing: its values are those it began with, its loss is None.
        Where a frozen weight changed, all clients of that classifier have a ModelError.
        """
        found: dict[int, Outcome] = {}
        groups: dict[tuple[int, str], list[tuple[int, Masks]]] = {}
        private: list[int] = []
        known = _Known()
        for i, local in enumerate(locals):
            try:
                outcome = self._by_itself(local, known)
                if outcome is None and local.private is not None:
                    private.append(i)
                elif outcome is None:
                    key = (id(local.classifier), local.training.optimizer)
                    groups.setdefault(key, []).append((i, known.masks(local)))
                else:
                    found[i] = outcome
            except AnabranchError as error:
                found[i] = error
        for members in groups.values():
            trained = self._together([locals[i] for i, _ in members], [m for _, m in members])
            found.update(zip((i for i, _ in members), trained, strict=True))
        if private:
            if self._base_dtype != "fp32":
                self._say(locals[private[0]], PRIVATE_FLOAT32, len(private))
            trained = train_private_cohort([locals[i] for i in private])
            found.update(zip(private, trained, strict=True))
        changed = self._changed()
        return [changed.get(id(local), found[i]) for i, local in enumerate(locals)]

    def _changed(self) -> dict[int, ModelError]:
        """Return an error for every client trained alone whose frozen base is not what it was."""
        errors: dict[int, ModelError] = {}
        for classifier, clients in self._unchecked.items():
            try:
                self._frozen.require(classifier)
            except ModelError as error:
                errors.update(dict.fromkeys(clients, error))
        self._unchecked.clear()
        return errors

    def _by_itself(self, local: Local, known: _Known) -> Outcome | None:
        """Return what came of a client that is not trained together with others; else None."""
        if local.failed is not None:
            return nothing_learned(local, local.failed)
        reason = known.why_not(local)
        if reason is not None and (local.steps or local.private is not None):
            return self._alone(local, reason)
        if local.private is not None:
            return None
        require_same_spec(local.classifier.spec, local.start.spec)
        if local.steps == 0:
            known.masks(local)  # refuses a part that is not there
            return Learned(after=local.start, steps=0)
        require_records(local)
        return None

    def _together(self, locals: Sequence[Local], masks: Sequence[Masks]) -> list[Outcome]:
        """Train clients of one classifier and one optimiser, in micro-cohorts."""
        classifier = locals[0].classifier
        cohorts = micro_cohorts(
            list(map(_work_of(classifier), locals)),
            width=classifier.head.in_features,
            values=classifier.spec.num_values,
        )
        found: dict[int, Outcome] = {}
        try:
            products = self._products_of(classifier)
        except ConfigError as error:
            return [error] * len(locals)
        for cohort in cohorts:
            members = [locals[i] for i in cohort]
            try:
                how = self._for_batches(members, products)
                trained = train_together(members, [masks[i] for i in cohort], how)
            except Unbatchable as error:
                trained = [self._alone(local, str(error)) for local in members]
            found.update(zip(cohort, trained, strict=True))
        try:
            self._frozen.require(classifier)
        except ModelError as error:
            return [error] * len(locals)
        return [found[i] for i in range(len(locals))]

    def _products_of(self, classifier: Classifier) -> Products:
        """Return how frozen weights are multiplied: measured once per classifier."""
        products = self._products.get(classifier)
        if products is None:
            products = self._products[classifier] = products_for(self._base_dtype, classifier)
        return products

    def _for_batches(self, members: Sequence[Local], products: Products) -> Products:
        """Return float32, and say so, where the batches of these clients are not packed."""
        if products is FLOAT32 or packs(members):
            return products
        self._say(members[0], NOT_PACKED, len(members))
        return FLOAT32

    def _say(self, local: Local, reason: str, clients: int) -> None:
        if not self.reasons[reason]:
            log.warning("%s: %s", local.name, reason)
        self.reasons[reason] += clients

    def _alone(self, local: Local, reason: str) -> Outcome:
        """Train one client by itself; say why, once per reason."""
        if not self.reasons[reason]:
            log.warning("%s: trained one client at a time: %s", local.name, reason)
        self.reasons[reason] += 1
        try:
            if local.private is not None:
                return train_alone(local)
            self._unchecked.setdefault(local.classifier, []).append(id(local))
            return train_unchecked(local)
        except AnabranchError as error:
            return error


class _Frozen:
    """Checks that nothing wrote to a frozen weight, without hashing a large base every time.

    torch counts the writes to a tensor. The digest, which sees what torch does not, is computed
    when the counts or the memory differ from the last time's, and at every DIGEST_EVERY-th call.
    """

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[Classifier, tuple[list[tuple[int, int]], int]]
        self._seen = WeakKeyDictionary()

    def require(self, classifier: Classifier) -> None:
        """Raise ModelError if the base is not what it was loaded as."""
        frozen = [p for p in classifier.base.parameters() if not p.requires_grad]
        tensors = [*frozen, *classifier.base.buffers()]
        now = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        before, calls = self._seen.get(classifier, ([], 0))
        if now != before or calls % DIGEST_EVERY == 0:
            require_frozen(classifier)
        self._seen[classifier] = now, calls + 1


class _Known:
    """What is the same for many Locals of one call, found out once."""

    def __init__(self) -> None:
        self._masks: dict[tuple[int, Part, Part | None], Masks] = {}
        self._reasons: dict[tuple[int, str | None], str | None] = {}

    def masks(self, local: Local) -> Masks:
        """Return what the client trains. Raises IncompatibleAdapter for a part not there."""
        key = (id(local.classifier), local.part, local.kept)
        if key not in self._masks:
            self._masks[key] = union(local.classifier.spec, local.part, local.kept)
        return self._masks[key]

    def why_not(self, local: Local) -> str | None:
        """Return why this client cannot be trained together with others, if it cannot."""
        classifier, private = local.classifier, local.private
        key = (id(classifier), None if private is None else private.engine)
        if key not in self._reasons:
            if private is not None:
                self._reasons[key] = _padding(classifier) or can_batch(local)
            else:
                self._reasons[key] = _padding(classifier) or why_not(classifier)
        return self._reasons[key]


def _padding(classifier: Classifier) -> str | None:
    """Return why records of different clients may not be padded to one length, if so."""
    if not isinstance(classifier, TextClassifier) or classifier.cut == classifier.num_stages:
        return None
    model_type = classifier.config.model_type
    if model_type in PADDED_ALIKE:
        return None
    return f"padding may change what a text encoder of type {model_type!r} says of a record"


def _work_of(classifier: Classifier) -> Callable[[Local], Work]:
    """Return what tells the planner all it has to know of a client of this classifier."""
    tokens, packed = _tokens(classifier), why_not_packed(classifier) is None

    def work(local: Local) -> Work:
        examples = local.examples
        rows = _length(examples.features, packed) if tokens is None else tokens
        records = min(local.training.batch_size, len(examples))
        return Work(steps=local.steps, rows=math.ceil(records * rows))

    return work


def _tokens(classifier: Classifier) -> int | None:
    """Return the rows that the trained layers see of a record; None: that is up to its length."""
    if classifier.cut == classifier.num_stages:
        return 1
    if isinstance(classifier, TextClassifier):
        return None
    return int(getattr(classifier.base, "num_patches", 1))


def _length(features: Sequence[Tensor], packed: bool) -> float:
    """Return the rows of a text: of the longest where all are padded, of the mean where not."""
    if isinstance(features, Dense):
        return int(features.data.shape[1])
    sizes = lengths(features)
    return sum(sizes) / len(sizes) if packed else max(sizes)
