"""Canaries that ride along in private training, and what is seen of every step.

Notation: P values are trained together; m canaries, a fair coin S_i each; C the clipping norm.

The P values are dealt out at random, the same number to each canary. Canary i's direction v_i
has a random sign on each of its values and 0 elsewhere, so that directions are orthonormal and
m <= P. Its gradient is LOUDNESS · C · v_i, far above C: clipping has to act. Canaries that are in
go through fit_private's own sampler, clipping, sum and noise as further records (probe.py).

Of every noisy mean gradient g̃ we look at q n g̃ / C, that is sum and noise in units of C:

    score of i      Σ over steps of ⟨v_i, ·⟩, for canaries in and out
    contributions   ⟨v_i, ·⟩ in the steps that drew canary i: at most 1, plus noise σ
    noise           the values dealt to canaries that are out or to nobody: no canary reaches
                    them. If the records are silent (replay.py), what is there is noise alone
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.client.audit.checks import Floats, Ints

LOUDNESS = 10.0  # a canary's gradient norm before clipping, over C
NOISE_VALUES = 1024  # values of every step that are kept for tests of the noise


@dataclass(frozen=True, eq=False)
class Directions:
    """m orthonormal directions in R^P: canary i has signs[i] at the values groups[i]."""

    groups: Ints  # (m, group): indices into the P values, no two the same
    signs: Floats  # (m, group): ±1
    spare: Ints  # values that no canary has

    @property
    def unit(self) -> float:
        """Return |v_i| at its values."""
        return float(self.groups.shape[1] ** -0.5)

    def project(self, values: Floats) -> Floats:
        """Return ⟨v_i, values⟩ for all i, (m,)."""
        projected: Floats = (values[self.groups] * self.signs).sum(axis=1) * self.unit
        return projected


def draw_directions(trained: Ints, count: int, rng: np.random.Generator) -> Directions:
    """Deal the values at `trained` out to `count` canaries; the rest of them is spare."""
    if not 1 <= count <= len(trained):
        raise ValueError(f"expected 1 to {len(trained)} canaries, got {count}")
    dealt = rng.permutation(trained)
    size = len(dealt) // count
    groups = dealt[: size * count].reshape(count, size)
    signs = rng.choice([-1.0, 1.0], groups.shape)
    return Directions(groups=groups, signs=signs, spare=dealt[size * count :])


@dataclass(frozen=True, eq=False, kw_only=True)
class Seen:
    """What was seen of one fit."""

    scores: Floats  # (m,) summed over its steps, in units of C
    drawn: Ints  # (steps,) records and canaries per step
    population: int  # records and included canaries
    participation: Ints  # (included,) how often each was drawn
    contributions: Floats  # one for every draw of a canary
    noise_at: Ints  # (K,) which of the P values are noise alone, ascending
    noise_tensors: Ints  # (K,) which tensor each is of
    noise: NDArray[np.float32]  # (steps, K), in units of C


@dataclass(eq=False, kw_only=True)
class Canaries:
    """A Probe (probe.py) for one fit; `seen` is complete when the fit has returned."""

    directions: Directions
    tensors: Ints  # (P,) which tensor each value is of, by its place among the adapter's names
    included: NDArray[np.bool_]  # (m,)
    records: int  # n
    expected_batch: float  # q n
    clipping_norm: float
    count: int = field(init=False)
    _now: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._in = np.flatnonzero(self.included)
        self.count = len(self._in)
        d = self.directions
        quiet = np.concatenate([d.groups[~self.included].ravel(), d.spare])
        self._noise_at = _spread(quiet, self.tensors)
        self._scores = np.zeros(len(self.included))
        self._participation = np.zeros(self.count, np.int64)
        self._drawn: list[int] = []
        self._contributions: list[Floats] = []
        self._noise: list[NDArray[np.float32]] = []

    def gradients(self, drawn: Sequence[int], size: int) -> Tensor:
        """Return LOUDNESS · C · v_i of the included canaries drawn, (len(drawn), size)."""
        at = list(drawn)
        self._now += at
        rows = np.zeros((len(at), size), np.float32)
        d, chosen = self.directions, self._in[at]
        values = LOUDNESS * self.clipping_norm * d.unit * d.signs[chosen]
        np.put_along_axis(rows, d.groups[chosen], values.astype(np.float32), axis=1)
        return torch.from_numpy(rows)

    def observe(self, records: int, gradients: Mapping[str, Tensor]) -> None:
        """See one noisy mean gradient, and how many records it drew."""
        flat = torch.cat([gradients[name].detach().flatten() for name in sorted(gradients)])
        scale = self.expected_batch / self.clipping_norm
        values = flat.cpu().double().numpy() * scale
        projected = self.directions.project(values)
        self._scores += projected
        self._drawn.append(records)
        self._participation[self._now] += 1
        self._contributions.append(projected[self._in[self._now]])
        self._noise.append(values[self._noise_at].astype(np.float32))
        self._now = []

    @property
    def seen(self) -> Seen:
        """Return what was seen so far."""
        steps = len(self._drawn)
        return Seen(
            scores=self._scores,
            drawn=np.array(self._drawn, np.int64),
            population=self.records + self.count,
            participation=self._participation,
            contributions=np.concatenate([*self._contributions, np.zeros(0)]),
            noise_at=self._noise_at,
            noise_tensors=self.tensors[self._noise_at],
            noise=np.array(self._noise, np.float32).reshape(steps, len(self._noise_at)),
        )


def _spread(values: Ints, tensors: Ints) -> Ints:
    """Return up to NOISE_VALUES of `values`, ascending, from every tensor in turn.

    Within a tensor the order is random and the same for all fits, so that fits share values.
    """
    order = np.random.default_rng(0).permutation(len(tensors))
    dealt = values[np.lexsort((order[values], tensors[values]))]
    _, first, counts = np.unique(tensors[dealt], return_index=True, return_counts=True)
    turn = np.arange(len(dealt)) - np.repeat(first, counts)
    return np.sort(dealt[np.argsort(turn, kind="stable")][:NOISE_VALUES])
