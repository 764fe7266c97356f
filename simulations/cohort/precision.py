"""bfloat16 for the frozen part: off by default, and what it gains and costs on this machine.

With base_dtype = "bf16" products with frozen weights are computed in bfloat16 (products.py).
Adapters, their gradients, optimiser states, LayerNorms, softmax and the head stay in float32. It
is no longer the arithmetic of a client alone: `measure` says how much faster the products are
here and how far a step's gradient is off, for a report to show. Only packed texts have it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.protocols.errors import ConfigError
from anabranch.simulations.cohort import packed
from anabranch.simulations.cohort.products import FLOAT32, Bfloat16, Products
from anabranch.simulations.cohort.ragged import RaggedLayers

log = logging.getLogger(__name__)

BaseDtype = Literal["fp32", "bf16"]
ROWS = 512  # of the products that are timed: those of a small micro-cohort
REPEATS = 9
RECORDS, TOKENS = 16, 12  # of the made-up batch whose gradient is compared


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What bfloat16 gains and costs here, for one classifier."""

    speedup: float  # seconds in float32 / seconds in bfloat16, one product and its backward
    cosine: float  # of the gradients of all trained values in one step; 1: the same direction
    error: float  # ‖g_bf16 − g_fp32‖ / ‖g_fp32‖ of those gradients


def products_for(base_dtype: BaseDtype, classifier: Classifier) -> Products:
    """Return how frozen weights are multiplied; for "bf16", say what `measure` found.

    Raises ConfigError where there are no such products: nothing falls back to float32.
    """
    if base_dtype == "fp32":
        return FLOAT32
    if base_dtype != "bf16":
        raise ConfigError(f'base_dtype = "{base_dtype}": expected "fp32" or "bf16"')
    found = measure(classifier)
    log.warning(
        "frozen products in bfloat16: %.2f times as fast as float32 here%s, the gradient of a step "
        "has cosine %.6f and relative error %.1e to that of float32; results differ from those of "
        "a client alone",
        found.speedup,
        ", which is slower" if found.speedup < 1 else "",
        found.cosine,
        found.error,
    )
    return Bfloat16()


def measure(classifier: Classifier) -> Precision:
    """Return what bfloat16 gains and costs for the layers above the cut, on this machine.

    The gradient is that of a made-up batch: hidden states drawn from a fixed seed, the adapter's
    present values with LoRA's B filled with noise (at zero, most gradients would be zero).
    Raises ConfigError for a classifier whose batches are not packed.
    """
    reason = packed.why_not(classifier)
    if reason is not None:
        raise ConfigError(
            f'base_dtype = "bf16" is for texts that are packed, and these are not: {reason}. Set '
            'base_dtype = "fp32"'
        )
    exact, rounded = (_gradient(classifier, p) for p in (FLOAT32, Bfloat16()))
    return Precision(
        speedup=_seconds(classifier, FLOAT32) / _seconds(classifier, Bfloat16()),
        cosine=float(torch.nn.functional.cosine_similarity(exact, rounded, dim=0)),
        error=float((exact - rounded).norm() / exact.norm()),
    )


def _gradient(classifier: Classifier, products: Products) -> Tensor:
    """Return the gradient of one step on a made-up batch, all trained values in a row."""
    rng = torch.Generator().manual_seed(0)
    width, device = classifier.head.in_features, classifier.device
    lengths = torch.randint(1, TOKENS + 1, (RECORDS,), generator=rng)
    rows = torch.randn((int(lengths.sum()), width), generator=rng)
    labels = torch.randint(classifier.num_labels, (RECORDS,), generator=rng).to(device)
    values = {}
    for name, parameter in trainable_parameters(classifier).items():
        noise = torch.randn(parameter.shape, generator=rng) * width**-0.5
        values[name] = (parameter.detach() + noise.to(device))[None]
    gradients = {name: torch.zeros_like(value) for name, value in values.items()}
    layers = RaggedLayers(classifier, products)
    layers.bind(values, gradients)
    batch = packed.PackedBatch(rows.to(device), lengths, (RECORDS,))
    with torch.enable_grad():
        logits = packed.forward(classifier, batch, layers)
        torch.nn.functional.cross_entropy(logits, labels).backward()
    return torch.cat([gradient.reshape(-1) for gradient in gradients.values()])


def _seconds(classifier: Classifier, products: Products) -> float:
    """Return the least CPU seconds of a product (R, d) x (d, 4 d) and its backward product."""
    rng = torch.Generator().manual_seed(0)
    width, device = classifier.head.in_features, classifier.device
    shapes = ((ROWS, width), (4 * width, width), (ROWS, 4 * width))
    x, weight, e = (torch.randn(shape, generator=rng).to(device) for shape in shapes)

    def once() -> None:
        products.forward(x, weight, None)
        products.backward(e, weight)

    return min(_timed(once, device) for _ in range(REPEATS))


def _timed(work: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started
