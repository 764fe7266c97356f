"""Layers of a cohort whose clients have unlike numbers of rows: products without padding.

Notation: rows x (R, in) stand client after client, x_k the R_k rows of client k; A_k, B_k, W_k,
b_k, w_k are its values, W and b the frozen ones.

    frozen, LoRA   y_k = x_k Wᵀ + b + s (x_k A_kᵀ) B_kᵀ     x Wᵀ + b is one product for all clients
    Linear         y_k = x_k W_kᵀ + b_k
    LayerNorm      y_k = x̂_k · w_k + b_k

The low-rank products are taken client by client: with rank ≪ width they cost little, and padding
every client to the largest would cost more. Layers with the same input (query, key, value) are
one product. Gradients go straight into the matrix of stacked.py, as in grouped.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import LoraLinear, trainable_parameters
from anabranch.simulations.cohort.grouped import Unbatchable
from anabranch.simulations.cohort.products import FLOAT32, Products

Spans = Sequence[tuple[int, int]]  # rows of every client
Values = Mapping[str, Tensor]  # name -> (K, *shape)


@dataclass(eq=False)
class _Site:
    """One tensor of the adapter: all clients' values, and where its gradients go."""

    name: str
    value: Tensor  # (K, *shape)
    gradient: Tensor | None  # None: not trained
    written: bool = False  # in this batch

    def beta(self) -> int:
        """Return what the gradient so far counts: 0 in the first backward pass of a batch."""
        before, self.written = self.written, True
        return int(before)


@dataclass(eq=False)
class _Low:
    """The LoRA of one part of a product: columns `at` of y get s (x A_kᵀ) B_kᵀ."""

    at: slice
    a: _Site
    b: _Site
    scaling: float

    @property
    def trains(self) -> bool:
        return self.a.gradient is not None or self.b.gradient is not None


@dataclass(eq=False)
class _Product:
    """Frozen layers with the same input as one matrix, and their LoRA."""

    weight: Tensor  # (out, in)
    bias: Tensor | None
    lows: list[_Low]
    products: Products
    spans: Spans = field(default=())

    @property
    def trains(self) -> bool:
        return any(low.trains for low in self.lows)


class RaggedLayers:
    """Calls the layers of one classifier with the values of K clients."""

    def __init__(self, classifier: Classifier, products: Products = FLOAT32) -> None:
        self._names = {id(p): name for name, p in trainable_parameters(classifier).items()}
        self._products = products
        self._sites: dict[str, _Site] = {}
        self._made: dict[tuple[int, ...], _Product] = {}
        self._merged: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
        self._token = torch.zeros((), requires_grad=True, device=classifier.device)

    def bind(self, values: Values, gradients: Values) -> None:
        """Use these values, and write gradients there: name -> (K, *shape)."""
        self._sites = {
            name: _Site(name, value, gradients.get(name)) for name, value in values.items()
        }
        self._made.clear()

    def begin(self) -> None:
        """Forget the gradients of the last batch: the next backward pass overwrites them."""
        for site in self._sites.values():
            site.written = False

    def require_complete(self) -> None:
        """Raise Unbatchable unless the backward pass gave every trained tensor a gradient."""
        for site in self._sites.values():
            if site.gradient is not None and not site.written:
                raise Unbatchable(f"{site.name} took no part in the loss")

    def linear(self, x: Tensor, spans: Spans, *modules: nn.Module) -> Tensor:
        """Return what linear layers say of the same rows (R, in), side by side: (R, Σ out)."""
        own = [m for m in modules if isinstance(m, nn.Linear) and self._site(m.weight, m.bias)]
        if own and len(modules) > 1:
            return torch.cat([self.linear(x, spans, module) for module in modules], 1)
        if own:
            weight, bias = self._pair(own[0], spans)
            y: Tensor = _OwnLinear.apply(x, self._ask(weight, bias), weight, bias, spans)  # type: ignore[no-untyped-call]
            return y
        product = self._product(modules)
        product.spans = spans
        token = self._token if product.trains else None
        z: Tensor = _ProductFunction.apply(x, token, product)  # type: ignore[no-untyped-call]
        return z

    def norm(self, x: Tensor, spans: Spans, layer: nn.LayerNorm) -> Tensor:
        """Return a LayerNorm of rows (R, d)."""
        if not self._site(layer.weight, layer.bias):
            shape = tuple(layer.normalized_shape)
            return functional.layer_norm(x, shape, layer.weight, layer.bias, layer.eps)
        weight, bias = self._pair(layer, spans)
        normal = functional.layer_norm(x, tuple(layer.normalized_shape), eps=layer.eps)
        y: Tensor = _OwnScale.apply(normal, self._ask(weight, bias), weight, bias, spans)  # type: ignore[no-untyped-call]
        return y

    def _site(self, *parameters: Tensor | None) -> bool:
        names = (self._names.get(id(p)) for p in parameters)
        return any(name in self._sites for name in names)

    def _pair(self, layer: nn.Module, spans: Spans) -> tuple[_Site, _Site | None]:
        """Return the weight and bias of a layer that is trained in full or in part."""
        found: list[_Site | None] = []
        for parameter in (layer.weight, layer.bias):
            name = self._names.get(id(parameter), "")
            if parameter is None or name in self._sites:
                found.append(self._sites.get(name))
            else:
                assert isinstance(parameter, Tensor)
                value = parameter.detach().expand(len(spans), *parameter.shape)
                found.append(_Site(name, value, None))
        weight, bias = found
        assert weight is not None  # both kinds of layer have one
        return weight, bias

    def _ask(self, *sites: _Site | None) -> Tensor | None:
        """Return the token that makes autograd call a trained layer."""
        return self._token if any(s and s.gradient is not None for s in sites) else None

    def _product(self, modules: Sequence[nn.Module]) -> _Product:
        key = tuple(id(module) for module in modules)
        product = self._made.get(key)
        if product is None:
            product = self._made[key] = self._make(key, modules)
        return product

    def _make(self, key: tuple[int, ...], modules: Sequence[nn.Module]) -> _Product:
        lows, first = [], 0
        frozen = [m.base if isinstance(m, LoraLinear) else m for m in modules]
        if key not in self._merged:
            self._merged[key] = _merge(frozen)
        for module in modules:
            width = _linear(module.base if isinstance(module, LoraLinear) else module).out_features
            if isinstance(module, LoraLinear):
                a, b = (
                    self._sites[self._names[id(factor.weight)]]
                    for factor in (module.lora_A, module.lora_B)
                )
                lows.append(_Low(slice(first, first + width), a, b, module.scaling))
            first += width
        weight, bias = self._merged[key]
        return _Product(weight, bias, lows, self._products)


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise Unbatchable(f"expected a linear layer, found a {type(module).__name__}")
    return module


def _merge(modules: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Return the weights of layers one below the other, and their biases."""
    layers = [_linear(module) for module in modules]
    if len(layers) == 1:
        bias = layers[0].bias
        return layers[0].weight.detach(), None if bias is None else bias.detach()
    weight = torch.cat([layer.weight.detach() for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weight, None
    biases = [
        weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        for layer in layers
    ]
    return weight, torch.cat(biases)


class _ProductFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor | None, product: _Product) -> Tensor:
        y = product.products.forward(x, product.weight, product.bias)
        sizes = [stop - start for start, stop in product.spans]
        us: list[Tensor] = []
        for low in product.lows:
            u = x.new_empty((low.a.value.shape[1], len(x)))  # (rank, R)
            parts = (u.split(sizes, 1), y[:, low.at].split(sizes), x.t().split(sizes, 1))
            values = low.a.value.unbind(), low.b.value.mT.unbind()
            for uk, yk, xk, a, b in zip(*parts, *values, strict=True):
                torch.mm(a, xk, out=uk)
                yk.addmm_(uk.t(), b, alpha=low.scaling)
            us.append(u)
        ctx.save_for_backward(x if product.trains else None, *us)
        ctx.product, ctx.spans = product, product.spans
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        product, (x, *us), e = ctx.product, ctx.saved_tensors, gradients[0]
        needs_x = ctx.needs_input_grad[0]
        dx = product.products.backward(e, product.weight) if needs_x else None
        for low, u in zip(product.lows, us, strict=True):
            if low.trains or needs_x:
                _low_backward(low, u, x, e[:, low.at], dx, ctx.spans)
        return dx, None, None


def _low_backward(
    low: _Low, u: Tensor, x: Tensor | None, e: Tensor, dx: Tensor | None, spans: Spans
) -> None:
    """Write dA_k = s (e_k B_k)ᵀ x_k and dB_k = s e_kᵀ u_k; add s (e_k B_k) A_k to dx_k."""
    da, db, s = low.a.gradient, low.b.gradient, low.scaling
    beta_a, beta_b = low.a.beta(), low.b.beta()
    sizes = [stop - start for start, stop in spans]
    turned = e.t().split(sizes, 1)
    if db is not None:
        for gradient, ek, uk in zip(db.unbind(), turned, u.t().split(sizes), strict=True):
            gradient.addmm_(ek, uk, beta=beta_b, alpha=s)
    if da is None and dx is None:
        return
    vs = [torch.mm(b, ek) for b, ek in zip(low.b.value.mT.unbind(), turned, strict=True)]
    if da is not None and x is not None:
        for gradient, v, xk in zip(da.unbind(), vs, x.split(sizes), strict=True):
            gradient.addmm_(v, xk, beta=beta_a, alpha=s)
    if dx is not None:
        for dxk, v, a in zip(dx.split(sizes), vs, low.a.value.unbind(), strict=True):
            dxk.addmm_(v.t(), a, alpha=s)


class _OwnLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token: Tensor | None, weight: _Site, bias: _Site | None, spans: Spans
    ) -> Tensor:
        y = x.new_empty((len(x), weight.value.shape[1]))
        for k, (start, stop) in enumerate(spans):
            torch.mm(x[start:stop], weight.value[k].t(), out=y[start:stop])
            if bias is not None:
                y[start:stop] += bias.value[k]
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.spans = weight, bias, spans
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (x,), e, weight, bias = ctx.saved_tensors, gradients[0], ctx.weight, ctx.bias
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        beta = weight.beta()
        for k, (start, stop) in enumerate(ctx.spans):
            ek = e[start:stop]
            if weight.gradient is not None:
                weight.gradient[k].addmm_(ek.t(), x[start:stop], beta=beta)
            if dx is not None:
                torch.mm(ek, weight.value[k], out=dx[start:stop])
        _add_sums(bias, e, ctx.spans)
        return dx, None, None, None, None


class _OwnScale(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token: Tensor | None, weight: _Site, bias: _Site | None, spans: Spans
    ) -> Tensor:
        y = torch.empty_like(x)
        for k, (start, stop) in enumerate(spans):
            torch.mul(x[start:stop], weight.value[k], out=y[start:stop])
            if bias is not None:
                y[start:stop] += bias.value[k]
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.spans = weight, bias, spans
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (x,), e, weight, bias = ctx.saved_tensors, gradients[0], ctx.weight, ctx.bias
        _add_sums(weight, e * x, ctx.spans)
        _add_sums(bias, e, ctx.spans)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            for k, (start, stop) in enumerate(ctx.spans):
                torch.mul(e[start:stop], weight.value[k], out=dx[start:stop])
        return dx, None, None, None, None


def _add_sums(site: _Site | None, e: Tensor, spans: Spans) -> None:
    """Add the sum of every client's rows to a gradient (K, width)."""
    if site is None or site.gradient is None:
        return
    beta = site.beta()
    for k, (start, stop) in enumerate(spans):
        total = e[start:stop].sum(0)
        if beta:
            site.gradient[k].add_(total)
        else:
            site.gradient[k].copy_(total)
