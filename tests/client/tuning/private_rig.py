"""A small private-training rig: two adapted layers over sequences, and slow references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from anabranch.client.privacy import DpPlan, Spend
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples, collate
from anabranch.client.tuning.lora import adapt, trainable_parameters
from anabranch.client.tuning.private import PrivateFit, fit_private
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.tables import Clipping, Engine, Lora, Training

WIDTH, INNER, LABELS = 5, 7, 3
SILENT = 1e-30  # a noise multiplier that adds nothing a float32 can hold
SGD = Training(optimizer="sgd", momentum=0.0, learning_rate=1.0, batch_size=1000, local_steps=1)
CLIPPINGS: list[Clipping] = ["flat", "automatic", "per-layer", "adaptive"]
ENGINES: list[Engine] = ["fast", "opacus"]


class Sequences(Classifier):
    """Two linear layers over tokens, then a masked mean: sequences (T, 5) of any length."""

    blocks = "layers"

    def __init__(self, norm: nn.Module | None = None) -> None:
        base = nn.Module()
        base.layers = nn.ModuleList([nn.Linear(WIDTH, INNER), nn.Linear(INNER, INNER + 1)])
        base.norm = norm or nn.LayerNorm(INNER + 1)
        super().__init__(base, width=INNER + 1, num_labels=LABELS, base_digest="b" * 64)

    @property
    def num_stages(self) -> int:
        return 3

    def stage_of(self, name: str) -> int:
        return int(name.split(".")[1]) if name.startswith("layers") else 2

    def encode(self, inputs: Sequence[str] | NDArray[np.float32]) -> list[Tensor]:
        raise NotImplementedError

    def run(self, h: Tensor, mask: Tensor | None, start: int, stop: int) -> Tensor:
        base: Any = self.base
        for stage in range(start, stop):
            if stage < 2:
                h = torch.tanh(base.layers[stage](h))
            else:
                assert mask is not None
                kept = mask.unsqueeze(-1).to(h.dtype)
                h = base.norm((h * kept).sum(1) / kept.sum(1))
        return h


def make(kind: type[Sequences] = Sequences, **options: Any) -> Sequences:
    torch.manual_seed(0)
    classifier = kind(**options)
    adapt(classifier, Lora(rank=2, alpha=4, targets=("layers.*",)), seed=1)
    with torch.no_grad():  # away from zero, so that every factor has a gradient
        for parameter in trainable_parameters(classifier).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return classifier


def examples(count: int = 11, seed: int = 2, scale: float = 1.0) -> Examples:
    torch.manual_seed(seed)
    lengths = [1 + (3 * i) % 7 for i in range(count)]
    features = [scale * torch.randn(length, WIDTH) for length in lengths]
    return Examples(features, torch.arange(count) % LABELS)


def plan(**changes: Any) -> DpPlan:
    values: dict[str, Any] = {
        "noise_multiplier": SILENT,
        "clipping": "flat",
        "clipping_norm": 0.5,
        "sample_rate": 1.0,
        "steps": 1,
        "delta": 1e-5,
        "epsilon": 1.0,
    }
    return DpPlan(**values | changes)


def values(classifier: Classifier) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainable_parameters(classifier).items()}


def moved(classifier: Classifier, before: dict[str, Tensor]) -> Tensor:
    return torch.cat([(p - before[n]).flatten() for n, p in values(classifier).items()])


def clipped_sum(
    classifier: Classifier,
    data: Examples,
    clipping: Clipping,
    norm: float,
    weights: Sequence[float] = (1.0,) * LABELS,
) -> Tensor:
    """Return Σ ḡ_i over all trainable values in the order of names: one record at a time."""
    parameters = list(trainable_parameters(classifier).values())
    total = torch.zeros(sum(p.numel() for p in parameters))
    for feature, label in zip(data.features, data.labels, strict=True):
        batch, mask = collate([feature])
        loss = functional.cross_entropy(classifier(batch, mask), label[None])
        gradients = torch.autograd.grad(weights[int(label)] * loss, parameters)
        total += bounded(gradients, clipping, norm)
    return total


def bounded(gradients: Sequence[Tensor], clipping: Clipping, norm: float) -> Tensor:
    """Return one record's clipped gradient, flat. With per-layer, each tensor is one layer."""
    if clipping == "per-layer":
        bound = norm / len(gradients) ** 0.5
        return torch.cat([g.flatten() * min(1.0, bound / float(g.norm())) for g in gradients])
    g = torch.cat([gradient.flatten() for gradient in gradients])
    size = float(g.norm())
    return g * (norm / (size + 0.01) if clipping == "automatic" else min(1.0, norm / size))


def gradient_sigma(of: DpPlan, num_examples: int) -> float:
    """Return the noise multiplier of the gradients' sum; with adaptive, the count's is taken."""
    if of.clipping != "adaptive":
        return of.noise_multiplier
    count = max(of.sample_rate * num_examples / 20, of.noise_multiplier)
    return float((of.noise_multiplier**-2 - (2 * count) ** -2) ** -0.5)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(classifier: Classifier, data: Examples, of: DpPlan, config: Training, **more: Any) -> Spend:
    return fit(classifier, data, of, config, **more).spend


def fit(
    classifier: Classifier, data: Examples, of: DpPlan, config: Training, **more: Any
) -> PrivateFit:
    options: dict[str, Any] = {"steps": 1, "step_offset": 0, "generator": seeded()} | more
    return fit_private(classifier, data, of, config, **options)


def lora_of(base: str) -> Lora:
    targets = {"mlp": ("hidden.*",), "bert": ("query", "value"), "distilbert": ("q_lin", "lin1")}
    return Lora(rank=2, alpha=4, targets=targets.get(base, ("*",)))


def encoded(classifier: Classifier, kind: str, texts: list[str]) -> Examples:
    rng = np.random.default_rng(0)
    if kind == "text-classification":
        inputs = classifier.encode(texts)
    elif kind == "image-classification":
        inputs = classifier.encode(rng.random((9, 1, 8, 8), dtype=np.float32))
    else:
        inputs = classifier.encode(rng.random((9, 5), dtype=np.float32))
    features = [classifier.prefix(*collate([x]))[0] for x in inputs]
    return Examples(features, torch.arange(9) % LABELS)


def refuse(*_: object) -> None:
    raise PrivacyError("refused by the test")


def traces(classifier: nn.Module) -> dict[str, Any]:
    """Return everything that hooks could leave on modules and parameters."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = {
        name: (module.training, sorted(vars(module)), *(len(getattr(module, h)) for h in hooks))
        for name, module in classifier.named_modules()
    }
    parameters = {
        name: (sorted(vars(p)), p.grad is None, p.requires_grad)
        for name, p in classifier.named_parameters()
    }
    return modules | parameters
