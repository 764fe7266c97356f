"""The optimiser of DP-SGD: clip, add up, noise once, step. Formulas: private.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from anabranch.client.privacy import DpPlan
from anabranch.client.tuning.active import Active
from anabranch.client.tuning.randomness import Randomness
from anabranch.client.tuning.training import make_optimizer
from anabranch.protocols.tables import Training

AUTOMATIC_STABILITY = 0.01  # gamma of AUTO-S, the value of the paper


class NoisyOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """Opacus' DPOptimizer with AUTO-S clipping beside its own, and noise from a ChaCha20 stream.

    `step` clips and adds up `grad_sample` of a physical batch; unless `signal_skip_step` said
    that the logical batch goes on, it then adds noise once, divides by the expected batch size,
    calls the accountant's hook and moves the parameters.
    """

    def __init__(
        self,
        active: Active,
        config: Training,
        plan: DpPlan,
        num_examples: int,
        randomness: Randomness,
        proximal_mu: float = 0.0,
    ) -> None:
        super().__init__(
            make_optimizer(active.parameters, config),
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.clipping_norm,
            expected_batch_size=plan.sample_rate * num_examples,
            loss_reduction="mean",
        )
        self._active = active
        self._masks = {id(active.parameters[name]): mask for name, mask in active.masks.items()}
        self._clipping = plan.clipping
        self._proximal_mu = proximal_mu
        self.randomness = randomness
        self.found = False  # whether some record had a gradient that was not 0

    def clip_and_accumulate(self) -> None:
        """Add the sum of the clipped gradients to `summed_grad` of every parameter."""
        for p in self.params:
            self._freeze(p, p.grad_sample)
            self.found = self.found or bool(p.grad_sample.any())
        if self._clipping == "flat":
            super().clip_and_accumulate()
            return
        samples = list(zip(self.params, self.grad_samples, strict=True))
        norms = torch.stack([g.reshape(len(g), p.numel()).norm(dim=1) for p, g in samples])
        factors = self.max_grad_norm / (norms.norm(dim=0) + AUTOMATIC_STABILITY)
        for p, g in samples:
            summed = torch.einsum("i,i...->...", factors, g)
            p.summed_grad = summed if p.summed_grad is None else p.summed_grad + summed

    def add_noise(self) -> None:
        """Set `grad` to the clipped sum plus Gaussian noise of standard deviation σC."""
        std = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            noise = torch.from_numpy(std * self.randomness.normal(p.numel()))
            p.grad = p.summed_grad + noise.to(p.device, p.dtype).view_as(p)
            self._freeze(p, p.grad)

    def scale_grad(self) -> None:
        """Divide by the expected batch, then add FedProx's pull: no record is in it."""
        super().scale_grad()
        self._active.pull(self._proximal_mu)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do what Opacus does, and put back what weight decay did to frozen ranks."""
        result: float | None = super().step(closure)
        self._active.hold()
        return result

    def _freeze(self, p: Tensor, gradient: Tensor) -> None:
        """Set the gradient (…, *p.shape) of ranks that are not trained to zero."""
        mask = self._masks.get(id(p))
        if mask is not None:
            gradient.masked_fill_(~mask, 0.0)
