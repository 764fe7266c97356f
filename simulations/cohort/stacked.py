"""The values of K clients as one matrix, and the optimiser's update of all at once.

    values      (K, P)       every tensor of the adapter, one after the other
    gradients   (K, n) each  one matrix per trained tensor
    moments     (K, n) each  one of SGD with momentum, two of AdamW

Row k is client k. The values of a tensor of shape s are a view (K, *s) of its columns; gradients
lie by themselves, because batched products write to dense matrices only. Updates are
those of torch.optim.SGD and torch.optim.AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) as
`client/tuning/training.py` uses them; what differs between clients (learning rates, momentum,
weight decay, clipping norms, FedProx) is a column vector, what does not is a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.client.local import Local
from anabranch.client.tuning.lora import HEAD
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.schedule import learning_rate_factor
from anabranch.protocols.spec import AdapterSpec, Shape, require_same_spec

BETA1, BETA2 = 0.9, 0.999  # of torch.optim.AdamW
EPSILON = 1e-8
CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_

Masks = Mapping[str, NDArray[np.bool_] | None]  # active.union: name -> where it is trained
Factor = float | Tensor  # one number for all clients, or (K, 1)
_CONTIGUOUS = torch.contiguous_format


class Layout:
    """Which columns each tensor of an adapter has."""

    def __init__(self, spec: AdapterSpec, trained: Set[str]) -> None:
        """`trained` names the tensors that any of the clients trains, at least one."""
        self.spec = spec
        self.shapes: dict[str, Shape] = spec.shapes
        self.trained = tuple(name for name in self.shapes if name in trained)
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        bounds = pairwise(accumulate(sizes, initial=0))
        self.bounds = dict(zip(self.shapes, bounds, strict=True))

    def columns(self, matrix: Tensor) -> list[Tensor]:
        """Return the columns (K, n) of every trained tensor: views of a matrix (K, P)."""
        return [matrix[:, slice(*self.bounds[name])] for name in self.trained]

    def flatten(self, adapter: Adapter) -> NDArray[np.float32]:
        """Return an adapter as one row (P,). Raises IncompatibleAdapter for another spec."""
        if adapter.spec is not self.spec:
            require_same_spec(self.spec, adapter.spec)
        if adapter.row is not None:
            return adapter.row
        return np.concatenate([adapter.arrays[name].reshape(-1) for name in self.bounds])


class Stacked:
    """The values and gradients of one micro-cohort, and their update."""

    def __init__(
        self, layout: Layout, locals: Sequence[Local], masks: Sequence[Masks], device: torch.device
    ) -> None:
        """`masks` say what each client trains; all Locals have the same optimiser."""
        self.layout = layout
        distinct = {id(local.start): local.start for local in locals}
        rows = torch.from_numpy(np.stack([layout.flatten(s) for s in distinct.values()])).to(device)
        at = {key: i for i, key in enumerate(distinct)}
        which = torch.tensor([at[id(local.start)] for local in locals], device=device)
        self.values = rows[which]
        self._trained = layout.columns(self.values)
        self._gradients = [torch.zeros_like(v, memory_format=_CONTIGUOUS) for v in self._trained]
        self._mu = _factor([local.proximal_mu for local in locals], device)
        self._frozen = _frozen(layout, masks, device)
        self._start: list[Tensor] = []
        if self._mu is not None or self._frozen is not None:
            self._start = layout.columns(rows[which])
        self._optimizer = _OPTIMIZERS[locals[0].training.optimizer](self._trained, locals)
        self._rates = _Rates(layout, locals, device)
        self._clip = _clip(locals, device)

    def views(self, clients: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return values and gradients of the first `clients` clients by name, (K, *shape)."""
        layout = self.layout
        values = {
            name: self.values[:clients, start:stop].unflatten(1, layout.shapes[name])
            for name, (start, stop) in layout.bounds.items()
        }
        gradients = {
            name: own[:clients].view(clients, *layout.shapes[name])
            for name, own in zip(layout.trained, self._gradients, strict=True)
        }
        return values, gradients

    def update(self, step: int, clients: int) -> None:
        """Take step `step` of the first `clients` clients, with the gradients of `views`.

        Autograd sees nothing of it: no tensor here asks for a gradient.
        """
        values = [own[:clients] for own in self._trained]
        gradients = [own[:clients] for own in self._gradients]
        start = [own[:clients] for own in self._start]
        frozen = [] if self._frozen is None else [own[:clients] for own in self._frozen]
        if self._mu is not None:
            _add(gradients, torch._foreach_sub(values, start), _of(self._mu, clients))
        for gradient, mask in zip(gradients, frozen, strict=False):
            gradient.masked_fill_(mask, 0.0)
        if self._clip is not None:
            _scale(gradients, self._clip[:clients])
        self._optimizer(step, values, gradients, self._rates.at(step, clients))
        for value, mask, before in zip(values, frozen, start, strict=False):
            torch.where(mask, before, value, out=value)


def _scale(gradients: list[Tensor], limits: Tensor) -> None:
    """Scale every client's gradient to at most its limit (K, 1), as clip_grad_norm_ does."""
    norms = [torch.linalg.vector_norm(own, dim=1, keepdim=True) for own in gradients]
    norm = torch.linalg.vector_norm(torch.cat(norms, 1), dim=1, keepdim=True)
    factor = (limits / (norm + CLIP_EPSILON)).clamp_(max=1.0)
    if bool((factor == 1.0).all()):
        return
    for gradient in gradients:
        gradient.mul_(factor)


Rates = tuple[Factor, Factor]  # of the head, and of the rest


class _Rates:
    """Learning rates of every step."""

    def __init__(self, layout: Layout, locals: Sequence[Local], device: torch.device) -> None:
        trainings = [local.training for local in locals]
        self._locals, self._device = locals, device
        self._rest = np.array([t.learning_rate for t in trainings])
        self._head = np.array([t.head_learning_rate or t.learning_rate for t in trainings])
        self._constant: Rates | None = None
        if all(t.schedule == "constant" and t.warmup == 0 for t in trainings):
            self._constant = _number(self._head, device), _number(self._rest, device)
        self._in_head = [_in_head(name) for name in layout.trained]

    def at(self, step: int, clients: int) -> list[Factor]:
        """Return the learning rate of every trained tensor in a step."""
        if self._constant is not None:
            head, rest = (_of(rate, clients) for rate in self._constant)
        else:
            factors = np.array([_schedule(local, step) for local in self._locals[:clients]])
            head = _number(self._head[:clients] * factors, self._device)
            rest = _number(self._rest[:clients] * factors, self._device)
        return [head if inside else rest for inside in self._in_head]


def _schedule(local: Local, step: int) -> float:
    schedule, training = local.schedule, local.training
    return learning_rate_factor(
        schedule.first_step + step, schedule.total_steps, training.warmup, training.schedule
    )


class _Optimizer(Protocol):
    def __call__(
        self, step: int, values: list[Tensor], gradients: list[Tensor], rates: list[Factor]
    ) -> None:
        """Take a step; all are of the first clients, (K, n) or (K, 1). Gradients may change."""


class _Sgd:
    """torch.optim.SGD: g ← g + λ w;  m ← β m + g;  w ← w − η m."""

    def __init__(self, values: Sequence[Tensor], locals: Sequence[Local]) -> None:
        device = values[0].device
        self._decay = _factor([local.training.weight_decay for local in locals], device)
        self._momentum = _factor([local.training.momentum for local in locals], device)
        self._buffers = [] if self._momentum is None else [_like(value) for value in values]

    def __call__(
        self, step: int, values: list[Tensor], gradients: list[Tensor], rates: list[Factor]
    ) -> None:
        clients = len(values[0])
        if self._decay is not None:
            _add(gradients, values, _of(self._decay, clients))
        if self._momentum is not None:
            buffers = [own[:clients] for own in self._buffers]
            momentum = _of(self._momentum, clients)
            for buffer, gradient in zip(buffers, gradients, strict=True):
                if step:
                    buffer.mul_(momentum).add_(gradient)
                else:
                    buffer.copy_(gradient)
            gradients = buffers
        for value, gradient, rate in zip(values, gradients, rates, strict=True):
            if isinstance(rate, float):
                value.add_(gradient, alpha=-rate)
            else:
                value.addcmul_(gradient, rate, value=-1.0)


class _AdamW:
    """torch.optim.AdamW: w ← (1 − η λ) w − η m̂ / (√v̂ + ε)."""

    def __init__(self, values: Sequence[Tensor], locals: Sequence[Local]) -> None:
        self._decay = _factor([local.training.weight_decay for local in locals], values[0].device)
        self._m = [_like(value).zero_() for value in values]
        self._v = [_like(value).zero_() for value in values]

    def __call__(
        self, step: int, values: list[Tensor], gradients: list[Tensor], rates: list[Factor]
    ) -> None:
        clients = len(values[0])
        first, second = 1 - BETA1 ** (step + 1), (1 - BETA2 ** (step + 1)) ** 0.5
        decay = None if self._decay is None else _of(self._decay, clients)
        parts = zip(values, gradients, self._m, self._v, rates, strict=True)
        for value, g, mean, square, rate in parts:
            m = mean[:clients].lerp_(g, 1 - BETA1)
            v = square[:clients].mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            root = torch.sqrt(v, out=g).div_(second).add_(EPSILON)
            if decay is not None:
                value.mul_(1 - rate * decay)
            if isinstance(rate, float):
                value.addcdiv_(m, root, value=-rate / first)
            else:
                value.addcmul_(torch.div(m, root, out=root), rate, value=-1.0 / first)


_OPTIMIZERS: dict[str, Callable[[Sequence[Tensor], Sequence[Local]], _Optimizer]] = {
    "sgd": _Sgd,
    "adamw": _AdamW,
}


def _frozen(layout: Layout, masks: Sequence[Masks], device: torch.device) -> list[Tensor] | None:
    """Return where a client does not train a trained tensor, (K, n) each; None if nowhere."""
    if all(_is_all(one, layout.trained) for one in _distinct(masks)):
        return None
    found = []
    for name in layout.trained:
        rows = {id(one): _untrained(one, name, layout.shapes[name]) for one in _distinct(masks)}
        found.append(torch.from_numpy(np.stack([rows[id(one)] for one in masks])).to(device))
    return found


def _is_all(masks: Masks, names: Sequence[str]) -> bool:
    """Return whether all of the tensors `names` are trained in full."""
    return len(masks) == len(names) and all(mask is None for mask in masks.values())


def _distinct(masks: Sequence[Masks]) -> list[Masks]:
    return list({id(one): one for one in masks}.values())


def _untrained(masks: Masks, name: str, shape: Shape) -> NDArray[np.bool_]:
    if name not in masks:
        return np.ones(math.prod(shape), np.bool_)
    mask = masks[name]
    return np.zeros(math.prod(shape), np.bool_) if mask is None else ~mask.reshape(-1)


def _clip(locals: Sequence[Local], device: torch.device) -> Tensor | None:
    """Return the clipping norm of every client (K, 1), infinite for none; None if all have none."""
    norms = [local.training.max_grad_norm for local in locals]
    if all(norm is None for norm in norms):
        return None
    return torch.tensor(
        [torch.inf if norm is None else norm for norm in norms], device=device
    ).unsqueeze(1)


def _factor(values: Sequence[float], device: torch.device) -> Factor | None:
    """Return a setting of the clients; None if it is 0 for all of them."""
    return _number(np.array(values), device) if any(values) else None


def _number(values: NDArray[np.float64], device: torch.device) -> Factor:
    if (values == values[0]).all():
        return float(values[0])
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)


def _of(factor: Factor, clients: int) -> Factor:
    return factor if isinstance(factor, float) else factor[:clients]


def _add(targets: Sequence[Tensor], xs: Sequence[Tensor], factor: Factor) -> None:
    """Add factor · x to every target, in place."""
    for target, x in zip(targets, xs, strict=True):
        if isinstance(factor, float):
            target.add_(x, alpha=factor)
        else:
            target.addcmul_(x, factor)


def _like(values: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=_CONTIGUOUS)


def _in_head(name: str) -> bool:
    return name.startswith(f"{HEAD}.")
