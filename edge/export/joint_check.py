"""Whether a step in onnxruntime computes what torch computes: the gate before publication.

The reference is plain torch: `classifier.logits` on an adapter that is not zero, cross-entropy,
torch.autograd.grad, and for the clipped form one backward pass per record. Two batches: one
record, and five of another length with padding tokens and a row of weight 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.text import TextClassifier
from anabranch.edge.export.joint_trace import logits_with, model_shape
from anabranch.protocols.errors import ReleaseError
from anabranch.protocols.spec import LORA_A, LORA_B

TOLERANCE = 1e-4  # largest difference, relative to the largest value of the group
NOISE = 0.02  # standard deviation of what is added to the adapter, so that no gradient is zero
BOUND = 0.5  # clipping norm, times the median norm of a record's gradient
GRADIENT = ".grad"

Arrays = Mapping[str, NDArray[np.float32]]


def check_against_torch(
    step: onnx.ModelProto, classifier: Classifier, *, clipped: bool, tolerance: float = TOLERANCE
) -> float:
    """Return the largest relative difference of loss, logits, gradients and norms from torch.

    Gradients count relative to the largest of their group (all factors A, all factors B, all
    dense tensors). Raises ReleaseError naming the worst tensor above `tolerance`.
    """
    session = _session(step)
    worst = ("", 0.0)
    for rows, tokens in ((1, 16), (5, 11)):
        inputs, labels, weights = _batch(classifier, rows, tokens)
        tensors = _tensors(classifier, seed=rows)
        bound = _bound(classifier, inputs, labels, tensors) if clipped else None
        expected = reference(classifier, inputs, labels, weights, tensors, bound)
        extra = () if bound is None else (torch.tensor(bound),)
        names = [i.name for i in session.get_inputs()]
        values = (*inputs, labels, weights, *extra, *tensors)
        feeds = {n: v.numpy() for n, v in zip(names, values, strict=True)}
        outputs = [o.name for o in session.get_outputs()]
        got = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        worst = max(worst, largest_difference(expected, got), key=lambda found: found[1])
    if not worst[1] <= tolerance:
        raise ReleaseError(
            f"{worst[0]}: the training step in onnxruntime {onnxruntime.__version__} and torch "
            f"differ by {worst[1]:.2g}, at most {tolerance:g} is allowed; this base cannot be "
            f"trained on devices"
        )
    return worst[1]


def reference(
    classifier: Classifier,
    inputs: tuple[Tensor, ...],
    labels: Tensor,
    weights: Tensor,
    tensors: list[Tensor],
    bound: float | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Return what the step graph gives, by output name, computed by torch alone.

    `tensors` is the adapter in the spec's order; with `bound`, the clipped form.
    """
    names = [name for name, _ in classifier.spec.tensors]
    tensors = [t.detach().clone().requires_grad_(True) for t in tensors]
    logits = logits_with(classifier, tensors, inputs)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    found = {"losses": losses, "logits": logits}
    if bound is None:
        loss = (losses * weights).sum()
        sums = list(torch.autograd.grad(loss, tensors))
        found = {"loss": loss, **found}
    else:
        sums, norms = [torch.zeros_like(t) for t in tensors], []
        for row, weight in zip(losses, weights, strict=True):
            own = torch.autograd.grad(row, tensors, retain_graph=True)
            norms.append(torch.stack([g.square().sum() for g in own]).sum().sqrt())
            factor = weight * torch.clamp(bound / norms[-1], max=1.0)
            sums = [s + factor * g for s, g in zip(sums, own, strict=True)]
        found["norms"] = torch.stack(norms)
    found |= {f"{n}{GRADIENT}": g for n, g in zip(names, sums, strict=True)}
    return {name: value.detach().numpy() for name, value in found.items()}


def largest_difference(expected: Arrays, got: Arrays) -> tuple[str, float]:
    """Return the output that differs most, and by how much relative to its group.

    Not-a-number counts as infinitely far.
    """
    scales: dict[str, float] = {}
    for name, array in expected.items():
        group = _group(name)
        scales[group] = max(scales.get(group, 0.0), float(np.abs(array).max()))
    differences = {
        name: float(np.abs(got[name] - array).max()) / (scales[_group(name)] or 1.0)
        for name, array in expected.items()
    }
    far = {n: d if np.isfinite(d) else float("inf") for n, d in differences.items()}
    name = max(far, key=lambda n: far[n])
    return name, far[name]


def _group(name: str) -> str:
    if not name.endswith(GRADIENT):
        return name
    plain = name.removesuffix(GRADIENT)
    return next((part for part in (LORA_A, LORA_B) if plain.endswith(part)), "dense")


def _bound(
    classifier: Classifier, inputs: tuple[Tensor, ...], labels: Tensor, tensors: list[Tensor]
) -> float:
    """Return a clipping norm that clips some records and not others."""
    free = reference(classifier, inputs, labels, torch.ones(len(labels)), tensors, float("inf"))
    return float(np.float32(np.median(free["norms"]) * (BOUND if len(labels) == 1 else 1.0)))


def _tensors(classifier: Classifier, seed: int) -> list[Tensor]:
    """Return the adapter with a little noise: a new one has gradients that are zero."""
    rng = torch.Generator().manual_seed(seed)
    parameters = trainable_parameters(classifier).values()
    return [p.detach() + NOISE * torch.randn(p.shape, generator=rng) for p in parameters]


def _batch(
    classifier: Classifier, rows: int, tokens: int
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Return model inputs, labels and weights; of several rows the last one has weight 0."""
    rng = torch.Generator().manual_seed(rows)
    labels = torch.randint(classifier.num_labels, (rows,), generator=rng)
    weights = torch.rand(rows, generator=rng) + 0.1
    if rows > 1:
        weights[-1] = 0.0
    if not isinstance(classifier, TextClassifier):
        return (torch.randn(rows, *model_shape(classifier), generator=rng),), labels, weights
    length = min(tokens, classifier.max_tokens)
    ids = torch.randint(classifier.config.vocab_size, (rows, length), generator=rng)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, max(1, length - row) :] = 0
    return (ids * mask, mask), labels, weights


def _session(step: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(
        step.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
