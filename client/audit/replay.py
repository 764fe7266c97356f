"""A run's private training once more, with canaries: everything the tests of an audit look at.

A replay is what one site did in the whole run, round after round, by `fit_private` under the
plan of `plan_for`: the product's own, with fresh noise of its own source. Other sites take no
part (what they send is public to this site's guarantee), and nothing is released: the adapter
of a replay is thrown away, and no ledger is charged.

The site's records are there and are sampled, but silent: their loss is weighted by SILENCE, which
no clipping notices, so that sum and noise show the canaries and the noise alone. The guarantee
holds for every data set, this one too, and its adversary knows all other records: that they are
silent gives the audit what the theorem gives the adversary, and no signal of records can make
noise look larger than it is.

One replay holds at most P canaries in orthonormal directions. Small adapters are replayed until
there are enough: canaries of different replays have coins of their own, and each is a record of
one replay alone, so all replays together are one (ε, δ)-DP mechanism of all coins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from anabranch.client.audit.canaries import Canaries, Seen, draw_directions
from anabranch.client.audit.checks import Floats, Ints
from anabranch.client.privacy import DpPlan
from anabranch.client.tuning.active import union
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import load_adapter
from anabranch.client.tuning.private import fit_private
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Engine, Training

SILENCE = 1e-12  # weight of every record's loss in a replay
MOST_REPLAYS = 200
MOST_CANARY_BYTES = 1 << 28  # gradients of the canaries of one step

Parts = Callable[[AdapterSpec, int], Part]  # what a site trains in a round, from 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """What is audited: one site's training in one run."""

    site: str
    config: RunConfig
    classifier: Classifier
    start: Adapter
    examples: Examples
    plan: DpPlan
    parts: Parts

    @property
    def rounds(self) -> int:
        """Return the rounds of the run."""
        return self.config.federation.rounds

    def trained(self, number: int) -> tuple[Ints, Ints]:
        """Return which of a round's P trained values move, and which tensor each of P is of."""
        spec = self.start.spec
        masks = union(spec, self.parts(spec, number), self.config.kept)
        places = {name: place for place, name in enumerate(sorted(spec.shapes))}
        moves, tensors = [], []
        for name in sorted(masks):
            mask = masks[name]
            moves.append(np.ones(spec.shapes[name], np.bool_) if mask is None else mask)
            tensors.append(np.full(moves[-1].size, places[name]))
        return np.flatnonzero(np.concatenate([m.ravel() for m in moves])), np.concatenate(tensors)

    def canaries(self, wanted: int) -> int:
        """Return how many canaries one replay holds."""
        rounds = [self.trained(number) for number in range(1, self.rounds + 1)]
        drawn_bytes = max(len(tensors) for _, tensors in rounds) * 4 * self.plan.sample_rate
        held = int(MOST_CANARY_BYTES / drawn_bytes)
        return max(1, min(wanted, held, *(len(trained) for trained, _ in rounds)))


@dataclass(frozen=True, eq=False, kw_only=True)
class Replay:
    """One replay: the coins, and what was seen of every fit, in order."""

    included: NDArray[np.bool_]  # (m,)
    fits: tuple[Seen, ...]

    @property
    def scores(self) -> Floats:
        """Return each canary's score over the whole run, (m,)."""
        total: Floats = np.sum([fit.scores for fit in self.fits], axis=0)
        return total


def replays_of(subject: Subject, wanted: int) -> list[int]:
    """Return the number of canaries of every replay, `wanted` in all unless they are too many."""
    each = subject.canaries(wanted)
    count = min(-(-wanted // each), MOST_REPLAYS)
    return [min(each, wanted - i * each) for i in range(count)]


def replay(subject: Subject, canaries: int, rng: np.random.Generator) -> Replay:
    """Train once more with `canaries` canaries; coins and directions come from `rng`.

    Every fit draws fresh directions: they are known to the adversary and may change. Raises
    PrivacyError, as the run itself would, if training is refused.
    """
    included = rng.random(canaries) < 0.5
    return Replay(included=included, fits=tuple(_train(subject, included, _fits(subject), rng)))


def twins(subject: Subject, rng: np.random.Generator) -> tuple[Seen, Seen]:
    """Return the first round of two clients with the same records and no canary.

    Both draw from their source of randomness the same amounts in the same order: if it is the
    same source, noise is the same at the same place.
    """
    nobody, first = np.zeros(1, np.bool_), _fits(subject)[:1]
    (one,), (other,) = (_train(subject, nobody, first, rng) for _ in range(2))
    return one, other


def _train(
    subject: Subject,
    included: NDArray[np.bool_],
    fits: Sequence[tuple[int, int, int]],
    rng: np.random.Generator,
) -> list[Seen]:
    """Return what was seen of `fits`, from the start; the adapter is put back."""
    load_adapter(subject.classifier, subject.start)
    silent, engine = _silent(subject.config)
    norm, found = subject.plan.clipping_norm, []
    for number, steps, offset in fits:
        trained, tensors = subject.trained(number)
        probe = Canaries(
            directions=draw_directions(trained, len(included), rng),
            tensors=tensors,
            included=included,
            records=len(subject.examples),
            expected_batch=subject.plan.sample_rate * len(subject.examples),
            clipping_norm=norm,
        )
        done = fit_private(
            subject.classifier,
            subject.examples,
            subject.plan,
            silent,
            steps=steps,
            step_offset=offset,
            part=subject.parts(subject.start.spec, number),
            kept=subject.config.kept,
            engine=engine,
            clipping_norm=norm,
            probe=probe,
        )
        norm = done.clipping_norm
        found.append(probe.seen)
    load_adapter(subject.classifier, subject.start)
    return found


def _fits(subject: Subject) -> Sequence[tuple[int, int, int]]:
    """Return (round, steps, steps before) of every fit: one per round, or per step.

    Adaptive clipping tells its norm after a fit alone, so it is asked step by step.
    """
    local = subject.config.training.local_steps
    if local is None:
        raise PrivacyError("training.local_steps is missing: this was no private run")
    each = 1 if subject.plan.clipping == "adaptive" else local
    return [
        ((offset // local) + 1, each, offset) for offset in range(0, subject.rounds * local, each)
    ]


def _silent(config: RunConfig) -> tuple[Training, Engine]:
    """Return [training] with silent records, and the engine that the run asks for."""
    assert config.privacy is not None  # a plan was made of it
    weights = (SILENCE,) * len(config.task.labels)
    return msgspec.structs.replace(config.training, class_weights=weights), config.privacy.engine
