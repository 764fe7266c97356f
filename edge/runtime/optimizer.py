"""What a gradient does to the adapter: the optimisers of [training] in numpy, as in torch.

Notation: w a tensor of the adapter, w_t its value before the training, g its gradient, η its
learning rate (the head has its own), λ weight_decay, μ the FedProx weight, t = 1, 2, … the step.
In this order:

    proximal   g ← g + μ (w − w_t)                                   Li et al. 2020,
                                                                     arXiv:1812.06127, eq. 2
    part       g ← 0 where the part of this training has no value
    clipping   g ← g · min(1, max_grad_norm / (‖g‖₂ + 1e-6))         over all tensors together
    sgd        g ← g + λ w;  b ← momentum · b + g;  w ← w − η b
    adamw      w ← (1 − η λ) w;  m ← 0.9 m + 0.1 g;  v ← 0.999 v + 0.001 g²
               w ← w − η / (1 − 0.9ᵗ) · m / (√v / √(1 − 0.999ᵗ) + 1e-8)
                                                                     Loshchilov and Hutter 2019,
                                                                     arXiv:1711.05101, alg. 2
    hold       w ← w_t where the part has no value: decay and momentum move it too

State is a set of named arrays, "momentum/<name>" or "m/<name>" and "v/<name>", so that it can
be saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from anabranch.edge.runtime.engine import Floats
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec, Arrays
from anabranch.protocols.tables import Training

HEAD = "head."  # tensors that head_learning_rate is for
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch.optim.AdamW's defaults
CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s
Masks = Mapping[str, NDArray[np.bool_] | None]  # trained tensors; None: trained as a whole


def masks_of(spec: AdapterSpec, part: Part) -> dict[str, NDArray[np.bool_] | None]:
    """Return name -> where the tensor is trained, None for all of it, for what is in `part`.

    Raises IncompatibleAdapter if the part is empty or names ranks that are not there.
    """
    part.shapes(spec)
    partial = part.mask(spec)
    return {name: partial.get(name) for name in part.names(spec)}


def fresh(training: Training, names: Iterable[str], like: Arrays) -> dict[str, Floats]:
    """Return the optimiser's state before the first step."""
    kinds = ("momentum",) if training.optimizer == "sgd" else ("m", "v")
    return {f"{kind}/{name}": np.zeros_like(like[name]) for name in names for kind in kinds}


def update(
    training: Training, params: Arrays, gradients: Arrays, state: Arrays, *, step: int, rate: float
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Return (adapter, state) after one step; what is given stays as it is.

    `step` counts from 0; `rate` is the factor of the schedule on every learning rate. Only
    tensors that have a gradient change.
    """
    one = _sgd if training.optimizer == "sgd" else _adamw
    new, kept = dict(params), dict(state)
    for name, gradient in gradients.items():
        own = training.head_learning_rate if name.startswith(HEAD) else None
        speed = rate * (own or training.learning_rate)
        new[name] = one(training, name, params[name], gradient, kept, step + 1, speed)
    return new, kept


def clip(gradients: Arrays, max_norm: float) -> dict[str, Floats]:
    """Return gradients scaled so that their norm over all tensors is at most `max_norm`."""
    squares = sum(float(np.sum(np.square(g, dtype=np.float64))) for g in gradients.values())
    factor = np.float32(min(1.0, max_norm / (math.sqrt(squares) + CLIP_EPSILON)))
    return {name: g * factor for name, g in gradients.items()}


def pull(gradients: Arrays, params: Arrays, start: Arrays, mu: float) -> dict[str, Floats]:
    """Return g + μ (w − w_t), the gradient with FedProx's term."""
    if not mu:
        return dict(gradients)
    weight = np.float32(mu)
    return {name: g + weight * (params[name] - start[name]) for name, g in gradients.items()}


def masked(gradients: Arrays, masks: Masks) -> dict[str, Floats]:
    """Return the gradients of what is trained, zero outside the masks."""
    chosen = {}
    for name, mask in masks.items():
        gradient = gradients[name]
        chosen[name] = gradient if mask is None else np.where(mask, gradient, np.float32(0))
    return chosen


def hold(params: Arrays, start: Arrays, masks: Masks) -> dict[str, Floats]:
    """Return params with the values outside the masks as they were, bit for bit."""
    held = dict(params)
    for name, mask in masks.items():
        if mask is not None:
            held[name] = np.where(mask, params[name], start[name])
    return held


def _sgd(
    training: Training,
    name: str,
    w: Floats,
    g: Floats,
    state: dict[str, Floats],
    step: int,
    rate: float,
) -> Floats:
    if training.weight_decay:
        g = g + np.float32(training.weight_decay) * w
    buffer = np.float32(training.momentum) * state[f"momentum/{name}"] + g
    state[f"momentum/{name}"] = buffer
    return w - np.float32(rate) * buffer


def _adamw(
    training: Training,
    name: str,
    w: Floats,
    g: Floats,
    state: dict[str, Floats],
    step: int,
    rate: float,
) -> Floats:
    m = np.float32(BETA1) * state[f"m/{name}"] + np.float32(1 - BETA1) * g
    v = np.float32(BETA2) * state[f"v/{name}"] + np.float32(1 - BETA2) * g * g
    state[f"m/{name}"], state[f"v/{name}"] = m, v
    w = w * np.float32(1 - rate * training.weight_decay)
    root = np.divide(np.sqrt(v), np.float32(math.sqrt(1 - BETA2**step)), dtype=np.float32)
    change = np.float32(rate / (1 - BETA1**step)) * m / (root + np.float32(EPSILON))
    return np.subtract(w, change, dtype=np.float32)
