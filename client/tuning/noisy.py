"""One logical step of DP-SGD on a given batch: clip, add up, noise once, step.

Formulas: private.py and clipping.py. Where per-record gradients come from makes no difference
here: both engines have the same clipping, the same sum, the same noise and the same optimiser.

Every draw of noise is noted with the σ that was handed to it. The accountant is told what was
noted, not what was planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from anabranch.client.privacy import DpPlan
from anabranch.client.tuning.active import Active
from anabranch.client.tuning.clipping import (
    clipping_factors,
    count_noise,
    gradient_noise,
    joint_noise,
    next_norm,
    total_norms,
    within,
)
from anabranch.client.tuning.examples import Examples, lengths
from anabranch.client.tuning.flat import Flat
from anabranch.client.tuning.per_record import Matrix, PerRecord, from_rows
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.tables import Engine


class Gradients(Protocol):
    """An engine: computes per-record gradients."""

    engine: Engine

    def gradients(self, batch: Examples) -> PerRecord:
        """Return the gradients of every record of `batch`, of one micro-batch."""


class PrivateStep:
    """Takes logical steps; made by private.private_steps.

    `optimizer` steps all trained tensors as one vector (flat.py): change its learning rates,
    do not look for the parameters in it. `clipping_norm` is the C of the next step.
    """

    def __init__(
        self,
        engine: Gradients,
        flat: Flat,
        optimizer: torch.optim.Optimizer,
        active: Active,
        plan: DpPlan,
        *,
        num_examples: int,
        randomness: Randomness,
        proximal_mu: float,
        physical_batch: int,
        clipping_norm: float,
    ) -> None:
        self.engine: Engine = engine.engine
        self.optimizer = optimizer
        self.clipping_norm = clipping_norm
        self.randomness = randomness
        self.size = len(flat.values)  # P, the number of trained values
        self.drawn: list[float] = []  # noise multipliers of the draws since the caller cleared it
        self._gradients = engine
        self._flat = flat
        self._active = active
        self._frozen = flat.mask(active.masks)
        self._plan = plan
        self._expected_batch = plan.sample_rate * num_examples
        self._proximal_mu = proximal_mu
        self._physical_batch = physical_batch

    @torch.no_grad()
    def __call__(self, batch: Examples, canaries: Tensor | None = None) -> bool:
        """Take one step on `batch`, which may be empty; return whether a gradient was not 0.

        `canaries` are gradients of further records, (m, P): tensors in ascending order of names,
        flattened. Afterwards `grad` of every trained parameter holds the noisy mean, with
        FedProx's pull. The batch is cut into physical ones of like length; noise, the
        accountant and the optimiser see one step.
        """
        self._flat.hide_gradients()
        total = self._flat.gradient.zero_()
        inside, found = self._sum(batch, canaries, total)
        self._add_noise(total, inside)
        total.div_(self._expected_batch)
        self._flat.show_gradients()
        self._active.pull(self._proximal_mu)
        self.optimizer.step()
        self._active.hold()
        return found

    @torch.no_grad()
    def unnoised(self, batch: Examples) -> dict[str, Tensor]:
        """Return the sum of the batch's clipped gradients of every trained tensor, in float64.

        No noise, no step: for a secure sum, whose members add the noise (distributed.py). In
        float32 each micro-batch would round the sum anew, and otherwise with one record less.
        """
        self._flat.hide_gradients()
        total = torch.zeros_like(self._flat.values, dtype=torch.float64)
        self._sum(batch, None, total)
        return {s.name: s.shaped(total[s.start : s.stop]) for s in self._flat.slots}

    def _sum(self, batch: Examples, canaries: Tensor | None, total: Tensor) -> tuple[float, bool]:
        """Add the clipped gradients to `total` (P,); return Σ (b_i − ½), and if one was not 0."""
        inside, found = torch.zeros(()), False
        for gradients in self._chunks(batch, canaries):
            norms, factors = self._add(gradients, total)
            found = found or bool(norms.any())
            if self._plan.clipping == "adaptive":
                inside = inside + within(factors).cpu()
        return float(inside), found

    def _chunks(self, batch: Examples, canaries: Tensor | None) -> Iterator[PerRecord]:
        """Yield the gradients of one micro-batch after another."""
        count, size = len(batch), self._physical_batch
        chunks = [batch] if 0 < count <= size else []
        if count > size:
            sizes = lengths(batch.features)
            order = sorted(range(count), key=lambda i: sizes[i])
            chunks = [batch.take(order[i : i + size]) for i in range(0, count, size)]
        for chunk in chunks:
            with torch.enable_grad():
                gradients = self._gradients.gradients(chunk)
            yield gradients
        if canaries is not None and len(canaries):
            yield from_rows(canaries.to(self._flat.values), self._flat.slots)

    def _add(self, gradients: PerRecord, total: Tensor) -> tuple[Tensor, Tensor]:
        """Add the clipped gradients to `total`; return norms (R,) and the clipping factors."""
        apart = self._plan.clipping == "per-layer"
        self._mask(gradients)
        blocks = gradients.blocks(self._flat.slots, packed=not apart)
        norms = torch.stack([block.norms() for _, block in blocks])
        whole = total_norms(norms)
        if not bool(whole.isfinite().all()):
            # No bound holds for such a gradient. It counts as 0: a refusal would tell of a record.
            bad = ~whole.isfinite()
            blocks = [(at, block.without(bad)) for at, block in blocks]
            norms, whole = norms.masked_fill(bad, 0.0), whole.masked_fill(bad, 0.0)
        clipping, bound = self._plan.clipping, self.clipping_norm
        factors = clipping_factors(clipping, norms if apart else whole, bound)
        for i, (at, block) in enumerate(blocks):
            block.add(total[at], factors[i] if apart else factors)
        return whole, factors

    def _mask(self, gradients: PerRecord) -> None:
        """Set the gradients of ranks that are not trained to zero, before any norm."""
        if self._frozen is None:
            return
        for slot in self._flat.slots:
            if slot.name in self._active.masks:
                part = gradients.parts[slot.name]
                assert isinstance(part, Matrix)  # engines make no ghosts of masked tensors
                part.rows.masked_fill_(self._frozen[slot.start : slot.stop], 0.0)

    def _add_noise(self, total: Tensor, inside: float) -> None:
        """Add Gaussian noise of standard deviation σC; with adaptive clipping, move C."""
        used, self.clipping_norm = add_noise(
            total,
            inside,
            self._plan,
            self.randomness,
            expected_batch=self._expected_batch,
            clipping_norm=self.clipping_norm,
            perturb=self._perturb,
        )
        self.drawn.append(used)

    def _perturb(self, total: Tensor, sigma: float) -> float:
        """Add σC · N(0, 1) to every value that is trained; return the σ that was used."""
        perturb(total, sigma, self.clipping_norm, self.randomness)
        if self._frozen is not None:
            total.masked_fill_(self._frozen, 0.0)
        return sigma


def add_noise(
    total: Tensor,
    inside: float,
    plan: DpPlan,
    randomness: Randomness,
    *,
    expected_batch: float,
    clipping_norm: float,
    perturb: Callable[[Tensor, float], float],
) -> tuple[float, float]:
    """Release one step: a clipped sum (P,), in place, and with adaptive clipping the count.

    `inside` is Σ (b_i − ½) (clipping.py) and `perturb(total, σ)` adds σC · N(0, 1) and returns
    the σ that it used. Return the noise multiplier of all that was released, and the next C.
    """
    sigma = plan.noise_multiplier
    if plan.clipping != "adaptive":
        return perturb(total, sigma), clipping_norm
    count_sigma = count_noise(sigma, expected_batch)
    gradient_sigma = perturb(total, gradient_noise(sigma, count_sigma))
    noisy = inside + count_sigma * float(randomness.normal(1)[0])
    used = joint_noise(gradient_sigma, count_sigma)
    return used, next_norm(clipping_norm, plan, noisy, expected_batch)


def perturb(total: Tensor, sigma: float, clipping_norm: float, randomness: Randomness) -> None:
    """Add σC · N(0, 1) to every value of a sum (P,)."""
    noise = torch.from_numpy(randomness.normal(len(total))).to(total)
    total.add_(noise, alpha=sigma * clipping_norm)
