"""What a site trains for itself and never sends.

Two things lie in `<site>/personal/`, one frame each (docs/wire-format.md), for every run:

    <run>.kept.adapter   tensors that the method leaves at the site (RunConfig.kept): B and the
                         head with FedSA-LoRA (Guo et al. 2024, arXiv:2410.01463), the head with
                         personal.head = "local". The site's model is the shared tensors with
                         these in their places.
    <run>.adapter        a private adapter beside the shared one (personal.rank > 0).

The private adapter is Ditto's personal model (Li et al. 2021, arXiv:2012.04221, eq. 1)

    v_k = argmin_v  F_k(v) + λ/2 · ‖v − w‖²

where w, the shared model as received, is W0 + s B A with head h_t, and v is W0 + s (B A + D C)
with a head h of its own. C (r_p, in) and D (out, r_p) are trained, A and B are frozen. The
distance is that of effective weights,

    ‖v − w‖² = Σ_layers ‖s D C‖_F² + ‖h − h_t‖²,      ‖D C‖_F² = tr((DᵀD)(C Cᵀ))

so it does not depend on how B A is written as factors, which some methods change every round.
C starts uniform in ±1/sqrt(in), D at zero: v is w. All dense tensors count as h.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from anabranch.client.tuning.checkpoint import Progress
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import load_adapter, read_adapter, trainable_parameters
from anabranch.client.tuning.training import Schedule, fit, steps_per_round
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ModelError, ProtocolError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Lora
from anabranch.storage.files import write_atomic

FOLDER = "personal"
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # it becomes a file name
KEPT = ".kept"  # no run's name ends so: its private adapter would be what another run has kept


@dataclass(frozen=True)
class Kept:
    """One adapter file of a site and run: read whole or refused, written whole or not at all."""

    folder: Path  # the site's
    file: str

    def load(self, spec: AdapterSpec) -> Adapter | None:
        """Return what is kept, None if nothing is yet; raise ModelError if it cannot be read."""
        name = f"{FOLDER}/{self.file}"
        try:
            data = (self.folder / name).read_bytes()
            return wire.decode_adapter(data, spec)
        except FileNotFoundError:
            return None
        except (OSError, ProtocolError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ModelError(
                f"{name} in the site's folder cannot be used: {reason}. Put a copy of it back, "
                "or delete it: the site then begins again from the values that it receives"
            ) from None

    def save(self, adapter: Adapter) -> None:
        """Replace what is kept."""
        for path, data in self.replaced(adapter).items():
            write_atomic(self.folder / path, data)

    def replaced(self, adapter: Adapter) -> dict[str, bytes]:
        """Return what `save` writes: path in the site's folder -> bytes."""
        return {f"{FOLDER}/{self.file}": wire.encode(adapter)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Beside:
    """The classifier of shared and private ranks, and what it holds when a round begins."""

    classifier: Classifier
    start: Adapter
    trained: bool  # whether the site has trained its private adapter before


def kept_tensors(folder: Path, run: str) -> Kept:
    """Return the file of the tensors that a method leaves at the site."""
    return Kept(folder, f"{checked_run(run)}{KEPT}.adapter")


def private_adapter(folder: Path, run: str) -> Kept:
    """Return the file of the private adapter."""
    return Kept(folder, f"{checked_run(run)}.adapter")


def checked_run(run: str) -> str:
    """Return the name of a run, which becomes a file name; raise ProtocolError if it cannot."""
    if not RUN.fullmatch(run):
        raise ProtocolError(
            "run: expected up to 200 letters, digits, '.', '_' and '-', the first a letter or "
            f"digit, got {run[:50]!r}"
        )
    if run.lower().endswith(KEPT):
        raise ProtocolError(f"run: expected a name that does not end in {KEPT!r}, got {run[:50]!r}")
    return run


def with_kept(received: Adapter, part: Part, kept: Adapter | None) -> Adapter:
    """Return what was received with the site's own whole tensors in `part`, if it has any."""
    if kept is None:
        return received
    own = part.take(received.spec, kept.arrays)
    return Adapter(received.spec, {**received.arrays, **own})


def trained_rank(spec: AdapterSpec, part: Part, kept: Part | None) -> int:
    """Return how many ranks of a factor are trained."""
    ranks = (
        spec.rank if one.ranks is None else len(one.ranks)
        for one in (part, kept)
        if one is not None and one.factors != "none"
    )
    return max(ranks, default=0)


def wider(config: RunConfig, max_rank: int | None) -> Lora:
    """Return the LoRA that holds shared and private ranks; alpha / rank stays what it was.

    A machine with a limit on the rank gets a private adapter of at most that rank.
    """
    shared = config.adapter
    private = config.personal.rank if max_rank is None else min(config.personal.rank, max_rank)
    rank = shared.rank + private
    return msgspec.structs.replace(shared, rank=rank, alpha=shared.alpha * rank / shared.rank)


def private_part(spec: AdapterSpec, shared: AdapterSpec) -> Part:
    """Return what is private of a wider adapter; without a layer to adapt, the head alone."""
    if spec.rank == shared.rank:
        return Part(factors="none")
    return Part(ranks=tuple(range(shared.rank, spec.rank)))


def beside(
    spec: AdapterSpec, shared: Adapter, own: Adapter | None, rng: np.random.Generator
) -> Adapter:
    """Return the adapter of `spec` with the shared ranks first and the private ones after them.

    `own` holds the private values; without it they start where the model is the shared one.
    """
    rank = shared.spec.rank
    arrays = dict(shared.arrays if own is None else own.arrays)
    for _, name_a, name_b in spec.factors():
        a, b = (np.zeros(spec.shapes[name], np.float32) for name in (name_a, name_b))
        if own is None:
            bound = 1 / math.sqrt(a.shape[1])
            a[rank:] = rng.uniform(-bound, bound, a[rank:].shape)
        else:
            a[rank:], b[:, rank:] = own.arrays[name_a][rank:], own.arrays[name_b][:, rank:]
        a[:rank], b[:, :rank] = shared.arrays[name_a], shared.arrays[name_b]
        arrays |= {name_a: a, name_b: b}
    return Adapter(spec, arrays)


def ditto(classifier: Classifier, shared: Adapter, pull: float) -> Callable[[], Tensor]:
    """Return the penalty λ/2 · ‖v − w‖² of a classifier that holds `beside(…, shared, …)`."""
    spec, rank = classifier.spec, shared.spec.rank
    parameters = trainable_parameters(classifier)
    pairs = [(parameters[a], parameters[b]) for _, a, b in spec.factors()]
    factors = {name for _, a, b in spec.factors() for name in (a, b)}
    dense = [
        (p, torch.from_numpy(shared.arrays[name]).to(p.device))
        for name, p in parameters.items()
        if name not in factors
    ]

    def penalty() -> Tensor:
        squares = [(p - p_t).square().sum() for p, p_t in dense]
        for a, b in pairs:
            c, d = a[rank:], b[:, rank:]
            squares.append(spec.scaling**2 * ((d.T @ d) * (c @ c.T)).sum())
        return pull / 2 * torch.stack(squares).sum()

    return penalty


def train(
    beside: Beside,
    shared: Adapter,
    examples: Examples,
    config: RunConfig,
    *,
    number: int,
    seed: int,
    progress: Progress | None = None,
    to_the_end: bool = False,
) -> Adapter:
    """Return the private adapter after round `number`, with zeros in the shared ranks.

    [training] decides how, without noise, for `personal.local_epochs` epochs. Raises RunError
    or IncompatibleAdapter if it is not finite, and what `progress` raises; `to_the_end`: see fit.
    """
    classifier = beside.classifier
    training = msgspec.structs.replace(
        config.training, local_epochs=config.personal.local_epochs, local_steps=None
    )
    steps = steps_per_round(len(examples), training)
    part = private_part(classifier.spec, shared.spec)
    load_adapter(classifier, beside.start)
    fit(
        classifier,
        examples,
        training,
        steps=steps,
        schedule=Schedule(
            first_step=(number - 1) * steps, total_steps=config.federation.rounds * steps
        ),
        seed=seed,
        part=part,
        penalty=ditto(classifier, shared, config.personal.pull),
        progress=progress,
        to_the_end=to_the_end,
    )
    return read_adapter(classifier).only(part)
