"""The training step of a classifier as a flat graph of ATen operators, forward and backward.

Traced by make_fx over fake tensors whose batch and token sizes are symbols, with
torch.autograd.grad inside, so autograd itself writes the backward half. What it does not need
(gradients of frozen weights, everything below the first trained tensor) never appears.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.tables import TableClassifier
from anabranch.client.tuning.text import TextClassifier
from anabranch.client.tuning.vision import ImageClassifier
from anabranch.edge.export.decompositions import Rewritten, convolution_backward
from anabranch.edge.export.onnx import input_names
from anabranch.edge.export.per_record import PerRecord, require_per_record
from anabranch.protocols.errors import ModelError

LABELS, WEIGHTS, CLIPPING_NORM = "labels", "weights", "clipping_norm"
NO_NORM = 1e-12  # added to ‖g‖ before C / ‖g‖


@dataclass(frozen=True, eq=False)
class Step:
    """A traced step: inputs and outputs by name, in order, and the graph between them."""

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: Mapping[Any, str]  # symbol -> "batch" or "tokens"


def trace_step(classifier: Classifier, *, clipped: bool) -> Step:
    """Return the traced step. The classifier is left as it was."""
    if classifier.device.type != "cpu":
        raise ModelError(f"the classifier is on {classifier.device}: move it to the CPU to export")
    if clipped:
        require_per_record(classifier)
    names = tuple(trainable_parameters(classifier))
    model_inputs = input_names(classifier)
    examples = _examples(classifier, clipped)
    function = _clipped_step(classifier) if clipped else _plain_step(classifier)
    graph, sizes = _trace(function, examples)
    extra = (CLIPPING_NORM,) if clipped else ()
    grads = tuple(f"{name}.grad" for name in names)
    outputs = ("losses", "logits", "norms") if clipped else ("loss", "losses", "logits")
    inputs = (*model_inputs, LABELS, WEIGHTS, *extra, *names)
    return Step(graph, inputs, (*outputs, *grads), sizes)


def logits_with(
    classifier: Classifier, tensors: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Tensor:
    """Return the logits (B, labels) for model inputs, with `tensors` as the adapter."""
    own = {id(p): name for name, p in classifier.named_parameters()}
    parameters = trainable_parameters(classifier).values()
    swapped = {own[id(p)]: t for p, t in zip(parameters, tensors, strict=True)}
    logits: Tensor = functional_call(
        _Logits(classifier), {f"classifier.{n}": t for n, t in swapped.items()}, tuple(inputs)
    )
    return logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss (B,) of each record: −log softmax(logits)[label]."""
    chosen = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=labels.device)
    return -(torch.log_softmax(logits, -1) * chosen.to(logits.dtype)).sum(1)


class _Logits(nn.Module):
    """A classifier called as the graph is: mask as int64. Not registered anywhere else."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.classifier.logits(x, None if mask is None else mask.bool())


def _plain_step(classifier: Classifier) -> Callable[..., tuple[Tensor, ...]]:
    count = len(input_names(classifier))

    def step(*args: Tensor) -> tuple[Tensor, ...]:
        inputs, (labels, weights), rest = args[:count], args[count : count + 2], args[count + 2 :]
        tensors = [t.detach().requires_grad_(True) for t in rest]
        with Rewritten():
            logits = logits_with(classifier, tensors, inputs)
        losses = cross_entropy(logits, labels)
        loss = (losses * weights).sum()
        grads = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
        return (loss.detach(), losses.detach(), logits.detach(), *grads)

    return step


def _clipped_step(classifier: Classifier) -> Callable[..., tuple[Tensor, ...]]:
    count = len(input_names(classifier))

    def step(*args: Tensor) -> tuple[Tensor, ...]:
        inputs, (labels, weights, bound) = args[:count], args[count : count + 3]
        rows = labels.shape[0]
        tensors = [
            t.detach().unsqueeze(0).expand(rows, *t.shape).requires_grad_(True)
            for t in args[count + 3 :]
        ]
        with Rewritten(), PerRecord():
            logits = logits_with(classifier, tensors, inputs)
        losses = cross_entropy(logits, labels)
        own = torch.autograd.grad(losses.sum(), tensors, allow_unused=True, materialize_grads=True)
        squares = [(g * g).flatten(1).sum(1) for g in own]
        norms = torch.stack(squares, 0).sum(0).sqrt()
        factors = (bound / (norms + NO_NORM)).clamp(max=1.0) * weights
        sums = [(factors @ g.flatten(1)).reshape(g.shape[1:]) for g in own]
        return (losses.detach(), logits.detach(), norms, *sums)

    return step


def _examples(classifier: Classifier, clipped: bool) -> list[tuple[Tensor, tuple[str, ...]]]:
    """Return (example, names of its free axes) for every input."""
    shapes = [tuple(p.shape) for p in (*classifier.parameters(), *classifier.buffers())]
    taken = {size for shape in shapes for size in shape}
    batch = _unused(taken, 1000)
    free: list[tuple[Tensor, tuple[str, ...]]]
    if isinstance(classifier, TextClassifier):
        tokens = _unused(taken | {batch}, classifier.max_tokens)
        ids = torch.ones(batch, tokens, dtype=torch.int64)
        free = [(ids, ("batch", "tokens")), (ids.clone(), ("batch", "tokens"))]
    else:
        free = [(torch.zeros(batch, *model_shape(classifier)), ("batch",))]
    free += [(torch.zeros(batch, dtype=torch.int64), ("batch",)), (torch.ones(batch), ("batch",))]
    fixed = [torch.tensor(1.0)] if clipped else []
    fixed += [p.detach().cpu().clone() for p in trainable_parameters(classifier).values()]
    return [*free, *((t, ()) for t in fixed)]


def model_shape(classifier: Classifier) -> tuple[int, ...]:
    """Return the shape of one image or table row."""
    if isinstance(classifier, ImageClassifier):
        return classifier.image_shape
    if isinstance(classifier, TableClassifier):
        return (classifier.num_features,)
    raise ModelError(f"{type(classifier).__name__} has no training step in ONNX")


def _unused(taken: set[int], limit: int) -> int:
    """Return a size that no tensor has, so that nothing is mistaken for a free size."""
    first = min(13, limit)
    return next((n for n in (*range(first, limit + 1), *range(first, 1, -1)) if n not in taken), 2)


def _trace(
    function: Callable[..., tuple[Tensor, ...]], examples: list[tuple[Tensor, tuple[str, ...]]]
) -> tuple[fx.GraphModule, dict[Any, str]]:
    """Return the graph over fake tensors, and the names of the symbols in it."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo.source import ConstantSource
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    fakes: list[Tensor] = []
    sizes: dict[Any, str] = {}
    for index, (example, free) in enumerate(examples):
        kinds = [
            DimDynamic.DUCK if a < len(free) else DimDynamic.STATIC for a in range(example.dim())
        ]
        context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
        fake = mode.from_tensor(
            example, symbolic_context=context, source=ConstantSource(f"input{index}")
        )
        fakes.append(fake)
        sizes |= {fake.shape[axis].node.expr: name for axis, name in enumerate(free)}  # type: ignore[attr-defined]
    with mode, enable_python_dispatcher(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = make_fx(
            function,
            tracing_mode="real",
            decomposition_table=_decompositions(),
            _allow_non_fake_inputs=True,
        )(*fakes)
    for symbol, name in sizes.items():
        if env.replace(symbol) != symbol:
            raise ModelError(
                f"the base fixes the {name} size at {env.replace(symbol)}: its step cannot be "
                f"exported for other sizes"
            )
    graph.graph.eliminate_dead_code()
    return graph, sizes


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Return what is broken down into simpler operators; the rest has a rule of its own."""
    from torch._decomp import core_aten_decompositions, get_decompositions

    aten = torch.ops.aten
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    table |= get_decompositions(
        [
            aten._log_softmax_backward_data,
            aten.threshold_backward,
            aten.tanh_backward,
            aten.sigmoid_backward,
            aten.silu_backward,
            aten.select_backward,
            aten.slice_backward,
            aten._log_softmax,
            aten._unsafe_view,
            aten.t,
            aten.transpose.int,
            aten.expand_as,
        ]
    )
    table[aten.convolution_backward.default] = convolution_backward
    whole = (
        aten.addmm,
        aten.native_layer_norm,
        aten.native_layer_norm_backward,
        aten._softmax,
        aten._softmax_backward_data,
        aten.gelu,
        aten.gelu_backward,
        aten.embedding_dense_backward,
    )
    return {op: f for op, f in table.items() if getattr(op, "overloadpacket", op) not in whole}
