"""Per-record gradients of many clients out of one backward pass: fast.py with values per client.

Notation: R records of K clients, client after client, each of T rows; k(r) is the client of
record r, and A_k, B_k, W_k its values. One adapted layer:

    u_r = s x_r A_k(r)ᵀ            y = x Wᵀ + b                for all records at once
                                   y_r += u_r B_k(r)ᵀ
    v_r = s e_r B_k(r)             dx = e W,  dx_r += v_r A_k(r)
    dB_r = e_rᵀ u_r                dA_r = v_rᵀ x_r

The frozen product runs over the rows of all clients. What is client k's own is gathered per
record: rank · (in + out) values, as many as the gradient of that record has. Clients may have
any numbers of records, none included, and nothing is padded. Layers that are trained in full have
a matrix W_k too large to gather: their products run client by client. LayerNorms gather.

Gradients come as in fast.py: as rows, or as ghosts where those are cheaper (per_record.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.known import known_layers
from anabranch.client.tuning.lora import LoraLinear, trainable_parameters
from anabranch.client.tuning.per_record import (
    Ghost,
    PerRecord,
    ghost_is_cheaper,
    require_per_record,
)
from anabranch.protocols.errors import PrivacyError
from anabranch.simulations.cohort.private_records import Chunk, Values


class GroupedGradients:
    """Computes the per-record gradients of a chunk; made by `grouped_gradients`.

    `trained` are the values that gradients are taken of, `fixed` the other tensors of the adapter.
    """

    def __init__(
        self, classifier: Classifier, trained: Values, fixed: Values, masked: Set[str]
    ) -> None:
        self._model = classifier
        everything = trainable_parameters(classifier)
        self._parameters = {slot.name: everything[slot.name] for slot in trained.slots}
        self._groups = (trained, fixed)
        self._scaled = [torch.empty_like(group.rows) for group in self._groups]
        self._scales = [torch.ones(group.size, device=group.rows.device) for group in self._groups]
        self.values = trained.stacked(trained.rows) | fixed.stacked(fixed.rows)
        self.scaled = {
            name: part
            for group, rows in zip(self._groups, self._scaled, strict=True)
            for name, part in group.stacked(rows).items()
        }
        self.masked = masked
        self.found = PerRecord(0)  # of the chunk that is being computed
        self.calls: dict[str, int] = {}  # name -> uses in that chunk
        self.chunk: Chunk | None = None

    def set_scale(self, name: str, scale: float) -> None:
        """Scale a factor by s."""
        for group, scales in zip(self._groups, self._scales, strict=True):
            for slot in group.slots:
                if slot.name == name:
                    scales[slot.start : slot.stop] = scale

    def refresh(self) -> None:
        """Note that values have changed: once per step."""
        for group, scaled, scale in zip(self._groups, self._scaled, self._scales, strict=True):
            torch.mul(group.rows, scale, out=scaled)

    def gradients(self, chunk: Chunk) -> PerRecord:
        """Return the gradients of every record, one forward and one backward pass.

        Raises PrivacyError if a trained tensor has none, or not one per record.
        """
        self.chunk, self.found, self.calls = chunk, PerRecord(len(chunk)), {}
        for p in self._parameters.values():
            p.grad = None  # left by whoever trained with this model before
        logits = self._model(chunk.features, chunk.mask)
        losses = functional.cross_entropy(logits, chunk.labels, reduction="none")
        if not losses.requires_grad:
            raise PrivacyError(
                "no trainable tensor takes part in the model's output: nothing to train"
            )
        if chunk.weights is not None:
            losses = losses * chunk.weights
        losses.sum().backward()
        inside = {
            name: (len(chunk), *p.shape)
            for name, p in self._parameters.items()
            if name in self.found.parts and p.grad is None
        }
        require_per_record(self._parameters, inside, len(chunk))
        return self.found

    def own(self, values: Tensor) -> Tensor:
        """Return one entry of `values` (K, …) per record: that of its client."""
        assert self.chunk is not None  # a layer runs inside `gradients`
        return values.index_select(0, self.chunk.owner)

    def segments(self) -> Sequence[tuple[int, int, int]]:
        """Return which records belong to which client."""
        assert self.chunk is not None
        return self.chunk.segments

    def require_records(self, name: str, x: Tensor) -> None:
        """Raise PrivacyError unless axis 0 of the input of the layer of `name` counts records."""
        if x.dim() < 2 or x.shape[0] != self.found.records:
            raise PrivacyError(
                f"the layer of {name} was called on {tuple(x.shape)} for {self.found.records} "
                "records: the model moves the batch axis"
            )


class _Lora:
    """One adapted layer."""

    def __init__(
        self, layer: LoraLinear, names: Mapping[int, str], store: GroupedGradients
    ) -> None:
        self.store = store
        self.weight, self.bias = layer.base.weight, layer.base.bias
        self.asks_a, self.asks_b = layer.lora_A.weight, layer.lora_B.weight
        self.name_a, self.name_b = names[id(self.asks_a)], names[id(self.asks_b)]
        self.a, self.b = store.values[self.name_a], store.values[self.name_b]
        self.scaled_a, self.scaled_b = store.scaled[self.name_a], store.scaled[self.name_b]
        for name in (self.name_a, self.name_b):
            store.set_scale(name, layer.scaling)

    def __call__(self, x: Tensor) -> Tensor:
        self.store.require_records(self.name_a, x)
        y: Tensor = _LoraFunction.apply(  # type: ignore[no-untyped-call]
            x, self.asks_a, self.asks_b, self
        )
        return y


class _LoraFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: _Lora) -> Tensor:
        weight, own = layer.weight, layer.store.own
        out, width = weight.shape
        rows = x.reshape(-1, width)
        y = x.new_empty((*x.shape[:-1], out))
        flat = y.view(-1, out)
        if layer.bias is None:
            torch.mm(rows, weight.t(), out=flat)
        else:
            torch.addmm(layer.bias, rows, weight.t(), out=flat)
        by_record = rows.view(x.shape[0], -1, width)
        u = torch.bmm(by_record, own(layer.scaled_a).mT)  # (R, T, rank)
        y.view(x.shape[0], -1, out).baddbmm_(u, own(layer.b))
        _, needs_a, needs_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(by_record if needs_a else None, u if needs_b else None)
        ctx.layer, ctx.shape = layer, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        layer, (by_record, u) = ctx.layer, ctx.saved_tensors
        found, own, (out, width) = layer.store.found, layer.store.own, layer.weight.shape
        e = gradients[0].reshape(found.records, -1, out)
        needs_x, needs_a, needs_b, _ = ctx.needs_input_grad
        if needs_b:
            found.add(layer.name_b, torch.bmm(u.mT, e))
        dx = None
        if needs_a or needs_x:
            v = torch.bmm(e, own(layer.scaled_b).mT)  # (R, T, rank)
            if needs_a:
                found.add(layer.name_a, torch.bmm(v.mT, by_record))
            if needs_x:
                dx = torch.mm(e.reshape(-1, out), layer.weight)
                dx.view(found.records, -1, width).baddbmm_(v, own(layer.a))
                dx = dx.view(ctx.shape)
        return dx, None, None, None


class _Linear:
    """A linear layer that is trained in full."""

    def __init__(self, layer: nn.Linear, names: Mapping[int, str], store: GroupedGradients) -> None:
        self.store, self.layer = store, layer
        self.name, self.name_bias = names[id(layer.weight)], names.get(id(layer.bias))
        self.weights = store.values[self.name]
        self.biases = None if self.name_bias is None else store.values[self.name_bias]

    def __call__(self, x: Tensor) -> Tensor:
        self.store.require_records(self.name, x)
        self.store.calls[self.name] = self.store.calls.get(self.name, 0) + 1
        y: Tensor = _LinearFunction.apply(  # type: ignore[no-untyped-call]
            x, self.layer.weight, self.layer.bias, self
        )
        return y

    def add_weight(self, x: Tensor, e: Tensor) -> None:
        """Hand over the weight's gradients for x (R, T, in) and e (R, T, out)."""
        found = self.store.found
        alone = self.store.calls[self.name] == 1 and self.name not in self.store.masked
        if alone and ghost_is_cheaper(x.shape[1], x.shape[2], e.shape[2]):
            found.parts[self.name] = Ghost(x, e)
        else:
            found.add(self.name, torch.bmm(e.mT, x))


class _LinearFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: _Linear) -> Tensor:
        out, width = weight.shape
        by_record = x.reshape(x.shape[0], -1, width)
        y = x.new_empty((x.shape[0], by_record.shape[1], out))
        for client, start, stop in layer.store.segments():
            rows, into = by_record[start:stop].reshape(-1, width), y[start:stop].view(-1, out)
            if layer.biases is None:
                torch.mm(rows, layer.weights[client].t(), out=into)
            else:
                torch.addmm(layer.biases[client], rows, layer.weights[client].t(), out=into)
        ctx.save_for_backward(by_record if ctx.needs_input_grad[1] else None)
        ctx.layer, ctx.shape = layer, x.shape
        return y.view(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        layer, (x,) = ctx.layer, ctx.saved_tensors
        found, (out, width) = layer.store.found, layer.layer.weight.shape
        e = gradients[0].reshape(found.records, -1, out)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if needs_weight:
            layer.add_weight(x, e)
        if needs_bias:
            found.add(layer.name_bias, e.sum(1))
        dx = None
        if needs_x:
            dx = e.new_empty((found.records, e.shape[1], width))
            for client, start, stop in layer.store.segments():
                into = dx[start:stop].view(-1, width)
                torch.mm(e[start:stop].reshape(-1, out), layer.weights[client], out=into)
            dx = dx.view(ctx.shape)
        return dx, None, None, None


class _Norm:
    """A LayerNorm over the last axis that is trained in full."""

    def __init__(
        self, layer: nn.LayerNorm, names: Mapping[int, str], store: GroupedGradients
    ) -> None:
        self.store, self.layer = store, layer
        self.name, self.name_bias = names[id(layer.weight)], names.get(id(layer.bias))
        self.weights = store.values[self.name]
        self.biases = None if self.name_bias is None else store.values[self.name_bias]

    def __call__(self, x: Tensor) -> Tensor:
        self.store.require_records(self.name, x)
        y: Tensor = _NormFunction.apply(  # type: ignore[no-untyped-call]
            x, self.layer.weight, self.layer.bias, self
        )
        return y

    def by_record(self, values: Tensor, x: Tensor) -> Tensor:
        """Return values (K, d) as (R, 1, …, d), to be used with x (R, …, d)."""
        return self.store.own(values).view(x.shape[0], *(1,) * (x.dim() - 2), -1)


class _NormFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: _Norm) -> Tensor:
        width = x.shape[-1:]
        normalised, mean, rstd = torch.native_layer_norm(x, width, None, None, layer.layer.eps)
        w = layer.by_record(layer.weights, x)
        y = normalised * w
        if layer.biases is not None:
            y += layer.by_record(layer.biases, x)
        ctx.save_for_backward(x, mean, rstd, normalised if ctx.needs_input_grad[1] else None, w)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        layer, (x, mean, rstd, normalised, w) = ctx.layer, ctx.saved_tensors
        e, found = gradients[0].contiguous(), layer.store.found
        rows = (found.records, -1, x.shape[-1])
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if needs_weight:
            found.add(layer.name, (normalised * e).reshape(rows).sum(1))
        if needs_bias:
            found.add(layer.name_bias, e.reshape(rows).sum(1))
        dx = None
        if needs_x:
            dx = torch.ops.aten.native_layer_norm_backward(
                e * w, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
            )[0]
        return dx, None, None, None


@contextmanager
def grouped_gradients(
    classifier: Classifier, trained: Values, fixed: Values, masked: Set[str]
) -> Iterator[GroupedGradients]:
    """Yield what computes per-record gradients; afterwards the classifier is as before.

    `trained` and `fixed` are all tensors of the adapter together; those that `trained` names ask
    for gradients (active.only). Tensors in `masked` never become ghosts. Every layer that holds
    one must be known (known.py): the caller checks.
    """
    store = GroupedGradients(classifier, trained, fixed, masked)
    names = {id(p): name for name, p in trainable_parameters(classifier).items()}
    replaced: list[nn.Module] = []
    try:
        for module, parts in known_layers(classifier):
            if any(id(p) in names for p in parts):
                replaced.append(module)
                module.forward = _forward(module, names, store)
        yield store
    finally:
        for module in replaced:
            vars(module).pop("forward", None)
        store.found, store.chunk = PerRecord(0), None


def _forward(
    module: nn.Module, names: Mapping[int, str], store: GroupedGradients
) -> _Lora | _Linear | _Norm:
    """Return what stands in for the forward of a known layer."""
    if isinstance(module, LoraLinear):
        return _Lora(module, names, store)
    if isinstance(module, nn.Linear):
        return _Linear(module, names, store)
    assert isinstance(module, nn.LayerNorm)  # known_layers lists no other
    return _Norm(module, names, store)
