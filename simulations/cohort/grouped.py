"""Layers whose trained values differ between the clients of a batch.

Notation: K clients, each with N rows of a batch (records, or tokens of records), client after
client: x (K · N, in), x_k its rows of client k. A_k, B_k, W_k, b_k are client k's values, W and
b the frozen ones.

    LoraLinear   y_k = x_k Wᵀ + b + s (x_k A_kᵀ) B_kᵀ     x Wᵀ + b is one product for all clients
    Linear       y_k = x_k W_kᵀ + b_k
    LayerNorm    y_k = x̂_k · w_k + b_k

For the time of a fit a layer's own `forward` gives way to one of these (as in
client/tuning/fast.py). Their backward pass adds up gradients per client, straight into the
matrix of stacked.py, computes none for frozen values, and the gradient of x only where a
trained layer lies below. Everything between them is the classifier's own code: it sees a batch of
more records.

Raises Unbatchable where a layer turns out to be used in a way that is not known here: then
clients are trained one at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.known import known_layers, unknown_tensors
from anabranch.client.tuning.lora import LoraLinear, trainable_parameters

CONVOLUTIONS = "convolutions are never batched across clients on a CPU: slower"


class Unbatchable(Exception):
    """These clients cannot be trained together. The message says why."""


def why_not(classifier: Classifier) -> str | None:
    """Return why clients of this classifier cannot be trained together, or None if they can."""
    if classifier.merged:
        return "the adapter is merged into the base"
    for name, module in classifier.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            return f"{name} is a {type(module).__name__}: it mixes the records of a batch"
    parameters = trainable_parameters(classifier)
    unknown = unknown_tensors(classifier, parameters)
    if not unknown:
        return None
    owners = {id(p): m for m in classifier.modules() for p in m.parameters(recurse=False)}
    if any(isinstance(owners[id(parameters[n])], nn.modules.conv._ConvNd) for n in unknown):
        return CONVOLUTIONS
    return f"cohorts do not know the layers of {', '.join(unknown)}"


class Grouped:
    """The replaced layers of one classifier; made by `grouped`."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self.layers = layers
        self.clients = 0  # K
        self.rows = 0  # of axis 0 of every layer's input: records of the batch
        self.token = torch.zeros((), requires_grad=True)  # makes autograd call trained layers

    def bind(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Use these values and gradients, name -> (K, *shape)."""
        self.clients = len(next(iter(values.values())))
        for layer in self.layers:
            layer.bind(values, gradients)

    def begin(self, rows: int) -> None:
        """Forget the gradients of the last batch; the next has `rows` rows, client by client."""
        self.rows = rows
        for layer in self.layers:
            layer.called = 0

    def require_complete(self) -> None:
        """Raise Unbatchable unless the backward pass went through every trained layer."""
        for layer in self.layers:
            if layer.trains and not layer.called:
                raise Unbatchable(f"{layer.name} took no part in the loss")


class _Layer(ABC):
    """What all replaced layers share."""

    name = ""
    trains = False  # anything
    called = 0  # backward passes of this batch

    def __init__(self, group: Grouped) -> None:
        self.group = group

    @abstractmethod
    def bind(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Use these values, and write gradients there."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return what the layer says of x (rows, …, in)."""

    def enter(self, x: Tensor) -> Tensor | None:
        """Return the token for autograd, if the layer is trained; refuse other rows."""
        if x.shape[0] != self.group.rows or x.dim() < 2:
            raise Unbatchable(
                f"{self.name} was called on {tuple(x.shape)}, expected {self.group.rows} rows"
            )
        return self.group.token if self.trains else None

    def beta(self) -> int:
        """Return what the gradient so far counts: 0 in the first backward pass of a batch."""
        self.called += 1
        return int(self.called > 1)


class _Lora(_Layer):
    def __init__(self, layer: LoraLinear, names: Mapping[int, str], group: Grouped) -> None:
        super().__init__(group)
        self.weight, self.bias, self.scaling = layer.base.weight, layer.base.bias, layer.scaling
        self.name_a, self.name_b = names[id(layer.lora_A.weight)], names[id(layer.lora_B.weight)]
        self.name = self.name_a

    def bind(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        self.a, self.b = values[self.name_a], values[self.name_b]
        self.da, self.db = gradients.get(self.name_a), gradients.get(self.name_b)
        self.trains = self.da is not None or self.db is not None

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = _LoraFunction.apply(x, self.enter(x), self)  # type: ignore[no-untyped-call]
        return y


class _LoraFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor | None, layer: _Lora) -> Tensor:
        weight, k = layer.weight, layer.group.clients
        rows = x.reshape(-1, x.shape[-1])
        if layer.bias is None:
            y = torch.mm(rows, weight.t())
        else:
            y = torch.addmm(layer.bias, rows, weight.t())
        by_client = rows.view(k, -1, rows.shape[1])
        u = torch.bmm(by_client, layer.a.mT)  # (K, N, rank)
        y.view(k, -1, y.shape[1]).baddbmm_(u, layer.b.mT, alpha=layer.scaling)
        ctx.save_for_backward(
            None if layer.da is None else by_client, None if layer.db is None else u
        )
        ctx.layer, ctx.shape = layer, x.shape
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        layer, (x, u) = ctx.layer, ctx.saved_tensors
        k, s = layer.group.clients, layer.scaling
        e = gradients[0].reshape(-1, gradients[0].shape[-1])
        by_client, beta = e.view(k, -1, e.shape[1]), layer.beta()
        if layer.db is not None:
            layer.db.baddbmm_(by_client.mT, u, beta=beta, alpha=s)
        dx = None
        if layer.da is not None or ctx.needs_input_grad[0]:
            v = torch.bmm(by_client, layer.b)  # (K, N, rank)
            if layer.da is not None:
                layer.da.baddbmm_(v.mT, x, beta=beta, alpha=s)
            if ctx.needs_input_grad[0]:
                dx = torch.mm(e, layer.weight)
                dx.view(k, -1, dx.shape[1]).baddbmm_(v, layer.a, alpha=s)
                dx = dx.view(ctx.shape)
        return dx, None, None


class _Linear(_Layer):
    def __init__(self, layer: nn.Linear, names: Mapping[int, str], group: Grouped) -> None:
        super().__init__(group)
        self.frozen = layer
        self.name_weight, self.name_bias = names.get(id(layer.weight)), names.get(id(layer.bias))
        self.name = self.name_weight or self.name_bias or ""

    def bind(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        self.weight = _value(self.name_weight, self.frozen.weight, values)
        bias = self.frozen.bias
        self.bias = None if bias is None else _value(self.name_bias, bias, values)[:, None]
        self.dw = gradients.get(self.name_weight or "")
        self.db = gradients.get(self.name_bias or "")
        self.trains = self.dw is not None or self.db is not None

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = _LinearFunction.apply(x, self.enter(x), self)  # type: ignore[no-untyped-call]
        return y


class _LinearFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor | None, layer: _Linear) -> Tensor:
        by_client = x.reshape(layer.group.clients, -1, x.shape[-1])
        if layer.bias is None:
            y = torch.bmm(by_client, layer.weight.mT)
        else:
            y = torch.baddbmm(layer.bias, by_client, layer.weight.mT)
        ctx.save_for_backward(None if layer.dw is None else by_client)
        ctx.layer, ctx.shape = layer, x.shape
        return y.view(*x.shape[:-1], y.shape[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        layer, (x,) = ctx.layer, ctx.saved_tensors
        e = gradients[0].reshape(layer.group.clients, -1, gradients[0].shape[-1])
        beta = layer.beta()
        if layer.dw is not None:
            layer.dw.baddbmm_(e.mT, x, beta=beta)
        if layer.db is not None:
            _accumulate(layer.db, e.sum(1), beta)
        dx = torch.bmm(e, layer.weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None


class _Norm(_Layer):
    def __init__(self, layer: nn.LayerNorm, names: Mapping[int, str], group: Grouped) -> None:
        super().__init__(group)
        self.frozen, self.eps = layer, layer.eps
        self.name_weight, self.name_bias = names.get(id(layer.weight)), names.get(id(layer.bias))
        self.name = self.name_weight or self.name_bias or ""

    def bind(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        self.weight = _value(self.name_weight, self.frozen.weight, values)[:, None]
        bias = self.frozen.bias
        self.bias = None if bias is None else _value(self.name_bias, bias, values)[:, None]
        self.dw = gradients.get(self.name_weight or "")
        self.db = gradients.get(self.name_bias or "")
        self.trains = self.dw is not None or self.db is not None

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = _NormFunction.apply(x, self.enter(x), self)  # type: ignore[no-untyped-call]
        return y


class _NormFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor | None, layer: _Norm) -> Tensor:
        width = x.shape[-1:]
        normal, mean, rstd = torch.native_layer_norm(x, width, None, None, layer.eps)
        by_client = normal.view(layer.group.clients, -1, x.shape[-1])
        y = by_client * layer.weight
        if layer.bias is not None:
            y += layer.bias
        ctx.save_for_backward(x, mean, rstd, None if layer.dw is None else by_client)
        ctx.layer = layer
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        layer, (x, mean, rstd, normal) = ctx.layer, ctx.saved_tensors
        e = gradients[0].reshape(layer.group.clients, -1, x.shape[-1])
        beta = layer.beta()
        if layer.dw is not None:
            _accumulate(layer.dw, (normal * e).sum(1), beta)
        if layer.db is not None:
            _accumulate(layer.db, e.sum(1), beta)
        dx = None
        if ctx.needs_input_grad[0]:
            scaled = (e * layer.weight).view(x.shape)
            dx = torch.ops.aten.native_layer_norm_backward(
                scaled, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
            )[0]
        return dx, None, None


def _value(name: str | None, frozen: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Return a tensor of all clients (K, *shape): their own values, or the frozen one."""
    clients = len(next(iter(values.values())))
    return values[name] if name else frozen.detach().expand(clients, *frozen.shape)


def _accumulate(into: Tensor, gradient: Tensor, beta: int) -> None:
    if beta:
        into.add_(gradient)
    else:
        into.copy_(gradient)


@contextmanager
def grouped(classifier: Classifier) -> Iterator[Grouped]:
    """Let the layers that hold the adapter take their values from `Grouped.bind`.

    Afterwards every layer is as it was, whatever happens. Only for classifiers that `why_not`
    has nothing against.
    """
    names = {id(p): name for name, p in trainable_parameters(classifier).items()}
    group = Grouped([])
    replaced: dict[nn.Module, _Layer] = {}
    try:
        for module, parts in known_layers(classifier):
            if any(id(p) in names for p in parts):
                replaced[module] = module.forward = _replacement(module, names, group)
        group.layers = list(replaced.values())
        group.token = torch.zeros((), requires_grad=True, device=classifier.device)
        yield group
    finally:
        for module in replaced:
            del module.forward


def _replacement(module: nn.Module, names: Mapping[int, str], group: Grouped) -> _Layer:
    """Return what stands in for the forward of a known layer."""
    if isinstance(module, LoraLinear):
        return _Lora(module, names, group)
    if isinstance(module, nn.Linear):
        return _Linear(module, names, group)
    assert isinstance(module, nn.LayerNorm)  # known_layers lists no other
    return _Norm(module, names, group)
