"""Weights per record: equal copies compute what one weight does, and gradients come apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from anabranch.client.tuning.classifier import Classifier
from anabranch.edge.export.per_record import PerRecord, require_per_record
from anabranch.protocols.errors import ModelError

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear of rows": (lambda: nn.Linear(4, 3), lambda b: torch.randn(b, 4)),
    "linear of tokens": (lambda: nn.Linear(4, 3), lambda b: torch.randn(b, 5, 4)),
    "linear of heads": (lambda: nn.Linear(4, 3), lambda b: torch.randn(b, 2, 5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), lambda b: torch.randn(b, 5, 4)),
    "layer norm": (lambda: nn.LayerNorm(4), lambda b: torch.randn(b, 5, 4)),
    "layer norm of rows": (lambda: nn.LayerNorm(4), lambda b: torch.randn(b, 4)),
    "layer norm without bias": (
        lambda: nn.LayerNorm(4, bias=False),
        lambda b: torch.randn(b, 5, 4),
    ),
    "embedding": (lambda: nn.Embedding(7, 4), lambda b: torch.randint(7, (b, 5))),
    "embedding with padding": (
        lambda: nn.Embedding(7, 4, padding_idx=2),
        lambda b: torch.randint(1, 4, (b, 5)),
    ),
    "patches": (lambda: nn.Conv2d(2, 3, 2, stride=2), lambda b: torch.randn(b, 2, 4, 6)),
}


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 5), seed=st.integers(0, 999))
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_copies_are_those_of_single_records(kind: str, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    make, draw = LAYERS[kind]
    layer, x = make(), draw(rows)
    copies = {
        n: p.detach().expand(rows, *p.shape).clone().requires_grad_()
        for n, p in layer.named_parameters()
    }
    with PerRecord():
        y = functional_call(layer, copies, (x,))
    assert torch.allclose(y, layer(x), atol=1e-6)
    factors = torch.randn_like(y)
    own = torch.autograd.grad((y * factors).sum(), list(copies.values()))
    for row in range(rows):
        loss = (layer(x[row : row + 1]) * factors[row]).sum()
        expected = torch.autograd.grad(loss, list(layer.parameters()))
        for got, wanted in zip(own, expected, strict=True):
            assert torch.allclose(got[row], wanted, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_without_copies_are_untouched(kind: str) -> None:
    torch.manual_seed(0)
    make, draw = LAYERS[kind]
    layer, x = make(), draw(3)
    with PerRecord():
        assert torch.equal(layer(x), layer(x))
        inside = layer(x)
    assert torch.equal(inside, layer(x))


@pytest.mark.parametrize("change", [{"stride": (1, 1)}, {"padding": (1, 1)}, {"groups": 3}])
def test_convolution_that_overlaps_is_refused(
    change: dict[str, Any], make_config: Callable[..., Any]
) -> None:
    from anabranch.client.tuning.bases import load_classifier
    from anabranch.protocols.tables import Lora

    lora = Lora(rank=3, modules_to_save=("patch",))
    classifier = load_classifier(make_config("image", lora=lora))
    require_per_record(classifier)
    for name, value in change.items():
        setattr(classifier.base.patch, name, value)
    with pytest.raises(ModelError, match=r"patch: gradients per record are not known for Conv2d"):
        require_per_record(classifier)


def test_unknown_layer_is_refused_by_name(make_classifier: Callable[..., Classifier]) -> None:
    classifier = make_classifier("tabular")

    class Own(nn.Linear):
        pass

    require_per_record(classifier)
    own = nn.Module()
    for name, parameter in classifier.head.named_parameters():
        own.register_parameter(name, parameter)
    classifier.head = own  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"^head: gradients per record are not known for Module"):
        require_per_record(classifier)
