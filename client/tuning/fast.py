"""Per-record gradients out of the ordinary backward pass: one forward, one backward, no hooks.

Notation of one adapted layer (lora.py): x (R, T, in) inputs of R records, e (R, T, out) output
gradients, u = s · x Aᵀ (R, T, rank). The weight gradients of record r are small products,

    dB_r = e_rᵀ u_r         dA_r = (s · e_r B)ᵀ x_r         dx = e W + s · (e B) A

As one batched product over records they cost what the sum over the batch would, and rank (in +
out) values per record and layer. A layer's own `forward` gives way, for the time of the fit,
to an autograd function that computes W x + b + s B A x in place, and in its backward pass hands
these gradients over; only those of tensors that ask for one. Linear layers that are trained in
full give e_rᵀ x_r or, where that is large, a ghost (per_record.py); LayerNorms give Σ_t e_t x̂_t
and Σ_t e_t. A layer that is called several times adds up its gradients before any norm.

Everything else is for Opacus (known.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.known import known_layers, unknown_tensors
from anabranch.client.tuning.lora import LoraLinear
from anabranch.client.tuning.per_record import (
    Ghost,
    PerRecord,
    ghost_is_cheaper,
    record_losses,
    require_per_record,
)
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.tables import Engine

Names = Mapping[int, str]  # id of a trained parameter -> its name


class FastGradients:
    """Computes the per-record gradients of a batch; made by `fast_gradients`."""

    engine: Engine = "fast"

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        weights: Tensor | None,
        masked: Set[str],
    ) -> None:
        self._model = model
        self._parameters = dict(parameters)
        self._weights = weights
        self.masked = masked
        self.found = PerRecord(0)  # of the batch that is being computed
        self.calls: dict[str, int] = {}  # name -> uses in that batch
        self.refresh: Callable[[], None] = lambda: None

    def gradients(self, batch: Examples) -> PerRecord:
        """Return the gradients of every record of `batch`, one forward and one backward pass.

        Raises PrivacyError if a trained tensor has none, or not one per record.
        """
        self.found, self.calls = PerRecord(len(batch)), {}
        self.refresh()
        record_losses(self._model, batch, self._weights).sum().backward()
        self._require_complete()
        return self.found

    def _require_complete(self) -> None:
        parts = self.found.parts
        if len(parts) == len(self._parameters) and all(
            p.grad is None for p in self._parameters.values()
        ):
            return
        inside = {
            name: (self.found.records, *p.shape)
            for name, p in self._parameters.items()
            if name in parts and p.grad is None
        }
        require_per_record(self._parameters, inside, self.found.records)

    def require_batch(self, name: str, x: Tensor) -> None:
        """Raise PrivacyError unless axis 0 of the input of the layer of `name` counts records."""
        if x.dim() < 2 or x.shape[0] != self.found.records:
            p = self._parameters[name]
            found = {name: (x.shape[0] if x.dim() > 1 else 1, *p.shape)}
            require_per_record({name: p}, found, self.found.records)


class _Lora:
    """One adapted layer: what its function needs, and where its gradients go."""

    scaled_a: Tensor  # s A and s B of this batch: see _scale_together
    scaled_b: Tensor

    def __init__(self, layer: LoraLinear, names: Names, store: FastGradients) -> None:
        self.store = store
        self.weight, self.bias = layer.base.weight, layer.base.bias
        self.scaling = layer.scaling
        self.a, self.b = layer.lora_A.weight, layer.lora_B.weight
        self.name_a, self.name_b = names.get(id(self.a)), names.get(id(self.b))
        self.key = self.name_a or self.name_b or ""

    def __call__(self, x: Tensor) -> Tensor:
        self.store.require_batch(self.key, x)
        y: Tensor = _LoraFunction.apply(x, self.a, self.b, self)  # type: ignore[no-untyped-call]
        return y


class _LoraFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: _Lora) -> Tensor:
        weight = layer.weight
        rows = x.reshape(-1, x.shape[-1])
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        flat = y.view(-1, weight.shape[0])
        if layer.bias is None:
            torch.mm(rows, weight.t(), out=flat)
        else:
            torch.addmm(layer.bias, rows, weight.t(), out=flat)
        u = torch.mm(layer.scaled_a, rows.t())  # (rank, R · T)
        flat.addmm_(u.t(), b.t())
        _, needs_a, needs_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs_a else None, u if needs_b else None)
        ctx.layer, ctx.shape = layer, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        layer, (rows, u) = ctx.layer, ctx.saved_tensors
        found, (out, rank) = layer.store.found, layer.b.shape
        e = gradients[0].reshape(-1, out)
        needs_x, needs_a, needs_b, _ = ctx.needs_input_grad
        columns = (rank, found.records, -1)
        if needs_b:
            by_record = e.view(found.records, -1, out)
            found.add(layer.name_b, torch.bmm(u.view(columns).transpose(0, 1), by_record))
        dx = None
        if needs_a or needs_x:
            v = torch.mm(layer.scaled_b.t(), e.t())  # (rank, R · T)
            if needs_a:
                by_record = rows.view(found.records, -1, rows.shape[1])
                found.add(layer.name_a, torch.bmm(v.view(columns).transpose(0, 1), by_record))
            if needs_x:
                dx = torch.mm(e, layer.weight).addmm_(v.t(), layer.a).view(ctx.shape)
        return dx, None, None, None


def _scale_together(layers: Sequence[_Lora]) -> Callable[[], None]:
    """Give every layer its s A and s B; return what computes them anew, all in one product."""
    factors = [(factor.detach(), x.scaling) for x in layers for factor in (x.a, x.b)]
    if not factors:
        return lambda: None
    turned = [not f.is_contiguous() for f, _ in factors]  # flat.py turns B
    rows = [f.t() if turn else f for (f, _), turn in zip(factors, turned, strict=True)]
    sources = [row.view(-1) for row in rows]
    scale = torch.cat([torch.full_like(v, s) for v, (_, s) in zip(sources, factors, strict=True)])
    scaled = torch.empty_like(scale)
    parts = zip(scaled.split([len(v) for v in sources]), rows, turned, strict=True)
    views = [v.view(row.shape).t() if turn else v.view(row.shape) for v, row, turn in parts]
    for layer, a, b in zip(layers, views[::2], views[1::2], strict=True):
        layer.scaled_a, layer.scaled_b = a, b

    def refresh() -> None:
        torch.cat(sources, out=scaled).mul_(scale)

    return refresh


class _Linear:
    """A linear layer that is trained in full."""

    def __init__(self, layer: nn.Linear, names: Names, store: FastGradients) -> None:
        self.store, self.layer = store, layer
        self.name = names.get(id(layer.weight))
        self.name_bias = names.get(id(layer.bias))
        self.key = self.name or self.name_bias or ""

    def __call__(self, x: Tensor) -> Tensor:
        self.store.require_batch(self.key, x)
        self.store.calls[self.key] = self.store.calls.get(self.key, 0) + 1
        y: Tensor = _LinearFunction.apply(  # type: ignore[no-untyped-call]
            x, self.layer.weight, self.layer.bias, self
        )
        return y

    def add_weight(self, x: Tensor, e: Tensor) -> None:
        """Hand over the weight's gradients for x (R, T, in) and e (R, T, out)."""
        assert self.name is not None  # asked only if the weight is trained
        found = self.store.found
        alone = self.store.calls[self.key] == 1 and self.name not in self.store.masked
        if alone and ghost_is_cheaper(x.shape[1], x.shape[2], e.shape[2]):
            found.parts[self.name] = Ghost(x, e)
        else:
            found.add(self.name, torch.bmm(e.mT, x))


class _LinearFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: _Linear) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        ctx.layer, ctx.shape = layer, x.shape
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        layer, weight, (x,) = ctx.layer, ctx.layer.layer.weight, ctx.saved_tensors
        found, (out, width) = layer.store.found, weight.shape
        e = gradients[0].reshape(found.records, -1, out)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if needs_weight:
            layer.add_weight(x.reshape(found.records, -1, width), e)
        if needs_bias:
            found.add(layer.name_bias, e.sum(1))
        dx = torch.mm(e.view(-1, out), weight).view(ctx.shape) if needs_x else None
        return dx, None, None, None


class _Norm:
    """A LayerNorm over the last axis that is trained in full."""

    def __init__(self, layer: nn.LayerNorm, names: Names, store: FastGradients) -> None:
        self.store, self.layer = store, layer
        self.name, self.name_bias = names.get(id(layer.weight)), names.get(id(layer.bias))

    def __call__(self, x: Tensor) -> Tensor:
        self.store.require_batch(self.name or self.name_bias or "", x)
        y: Tensor = _NormFunction.apply(  # type: ignore[no-untyped-call]
            x, self.layer.weight, self.layer.bias, self
        )
        return y


class _NormFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: _Norm) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, layer.layer.eps)
        ctx.save_for_backward(x, mean, rstd)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        layer, (x, mean, rstd), e = ctx.layer, ctx.saved_tensors, gradients[0].contiguous()
        found, weight, bias = layer.store.found, layer.layer.weight, layer.layer.bias
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if needs_weight:
            normalised = (x - mean).mul_(rstd)
            found.add(layer.name, (normalised.mul_(e)).reshape(_rows(x, found)).sum(1))
        if needs_bias:
            found.add(layer.name_bias, e.reshape(_rows(x, found)).sum(1))
        dx = None
        if needs_x:
            dx = torch.ops.aten.native_layer_norm_backward(
                e, x, x.shape[-1:], mean, rstd, weight, bias, [True, False, False]
            )[0]
        return dx, None, None, None


def _rows(x: Tensor, found: PerRecord) -> tuple[int, int, int]:
    return found.records, -1, x.shape[-1]


@contextmanager
def fast_gradients(
    classifier: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    weights: Tensor | None,
    masked: Set[str] = frozenset(),
) -> Iterator[FastGradients]:
    """Yield what computes per-record gradients of `parameters`; afterwards all is as before.

    `weights` are one factor per label; tensors in `masked` never become ghosts, their
    gradients are changed before the norm. Raises PrivacyError if `unknown_tensors` names any.
    """
    unknown = unknown_tensors(classifier, parameters)
    if unknown:
        raise PrivacyError(f"no fast per-record gradients for {', '.join(unknown)}: use Opacus")
    store = FastGradients(classifier, parameters, weights, masked)
    names = {id(p): name for name, p in parameters.items()}
    replaced: dict[nn.Module, _Forward] = {}
    try:
        for module, parts in known_layers(classifier):
            if any(id(p) in names for p in parts):
                replaced[module] = module.forward = _forward(module, names, store)
        store.refresh = _scale_together([f for f in replaced.values() if isinstance(f, _Lora)])
        yield store
    finally:
        for module in replaced:
            del module.forward
        store.found = PerRecord(0)


_Forward = _Lora | _Linear | _Norm


def _forward(module: nn.Module, names: Names, store: FastGradients) -> _Forward:
    """Return what stands in for the forward of a known layer."""
    if isinstance(module, LoraLinear):
        return _Lora(module, names, store)
    if isinstance(module, nn.Linear):
        return _Linear(module, names, store)
    assert isinstance(module, nn.LayerNorm)  # known_layers lists no other
    return _Norm(module, names, store)
