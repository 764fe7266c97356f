"""A perceptron of many clients, forward and backward by hand.

    h_0 = x    z_l = h_l W_lᵀ + b_l    h_l+1 = relu(z_l)    logits = z of the head
    dW_l = e_lᵀ h_l    db_l = Σ e_l    e_l-1 = (e_l W_l) · [h_l > 0]

What grouped.py computes, without the cost of autograd, which is most of a step where layers are
as small as these: no tensor here asks for a gradient. For perceptrons whose layers above the cut
are trained in full, or frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.known import known_layers
from anabranch.client.tuning.lora import HEAD
from anabranch.client.tuning.tables import Perceptron, TableClassifier
from anabranch.simulations.cohort.batches import Batch, gather


def is_plain(classifier: Classifier) -> bool:
    """Return whether a classifier is a perceptron of plain linear layers, trained or frozen."""
    if type(classifier) is not TableClassifier:
        return False
    known = {module for module, _ in known_layers(classifier)}
    return all(type(layer) is nn.Linear and layer in known for layer in _layers(classifier))


class _Layer:
    """One linear layer of all clients."""

    def __init__(
        self,
        name: str,
        layer: nn.Linear,
        values: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
    ) -> None:
        clients = len(values[f"{HEAD}.weight"])
        weight, bias = f"{name}.weight", f"{name}.bias"
        self.weight = values[weight] if weight in values else _same(layer.weight, clients)
        self.bias = (values[bias] if bias in values else _same(layer.bias, clients)).unsqueeze(1)
        self.d_weight, self.d_bias = gradients.get(weight), gradients.get(bias)
        self.trains = self.d_weight is not None or self.d_bias is not None


class PerceptronKernel:
    """Runs batches of clients of one perceptron; see kernels.py."""

    filled = True

    def __init__(self, classifier: Classifier) -> None:
        """`classifier` is one that `is_plain`."""
        self._modules = _layers(classifier)
        hidden = range(classifier.cut, classifier.num_blocks)
        self._names = [*(f"hidden.{i}" for i in hidden), HEAD]
        self._layers: list[_Layer] = []
        self._inputs: list[Tensor] = []

    def bind(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Use these values, and write gradients there: name -> (K, *shape)."""
        named = zip(self._names, self._modules, strict=True)
        self._layers = [_Layer(name, layer, values, gradients) for name, layer in named]
        trained = [i for i, layer in enumerate(self._layers) if layer.trains]
        self._lowest = min(trained)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits (K · B, labels) of a batch."""
        x, _ = gather(batch.records.features, batch.ids)
        device = self._layers[0].weight.device
        h = x.to(device).view(batch.clients, -1, x.shape[1])
        self._inputs = []
        for layer in self._layers:
            self._inputs.append(h if not self._inputs else h.relu_())
            h = torch.baddbmm(layer.bias, h, layer.weight.mT)
        return h.view(len(x), -1)

    def backward(self, error: Tensor) -> None:
        """Write the gradients, given that of the logits."""
        e = error.contiguous().view(len(self._inputs[0]), -1, error.shape[1])
        for i in range(len(self._layers) - 1, self._lowest - 1, -1):
            layer, h = self._layers[i], self._inputs[i]
            if layer.d_weight is not None:
                torch.bmm(e.mT, h, out=layer.d_weight)
            if layer.d_bias is not None:
                torch.sum(e, 1, out=layer.d_bias)
            if i > self._lowest:
                e = torch.ops.aten.threshold_backward(torch.bmm(e, layer.weight), h, 0.0)

    def require_complete(self) -> None:
        """Every trained layer takes part in the loss."""


def _layers(classifier: Classifier) -> list[nn.Linear]:
    """Return the layers above the cut, and the head."""
    hidden = cast(Perceptron, classifier.base).hidden[classifier.cut :]
    return [cast(nn.Linear, layer) for layer in (*hidden, classifier.head)]


def _same(frozen: Tensor, clients: int) -> Tensor:
    return frozen.detach().expand(clients, *frozen.shape)
