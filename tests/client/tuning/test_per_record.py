"""Norms and clipped sums of both engines against gradients taken one record at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from anabranch.client.tuning.examples import Examples, collate
from anabranch.client.tuning.fast import fast_gradients
from anabranch.client.tuning.flat import slots_of
from anabranch.client.tuning.known import unknown_tensors
from anabranch.client.tuning.lora import LoraLinear
from anabranch.client.tuning.opacus_engine import opacus_gradients
from anabranch.client.tuning.per_record import Ghost, Matrix, PerRecord, from_rows, ghost_is_cheaper
from anabranch.protocols.errors import PrivacyError

LABELS, RECORDS = 3, 6
WEIGHTS = torch.tensor([0.5, 1.0, 4.0])


class Net(nn.Module):
    """Sequences (T, width), one or two uses of a layer, a masked mean, a frozen head."""

    def __init__(self, layer: nn.Module, width: int, out: int, *, twice: bool = False) -> None:
        super().__init__()
        self.below = nn.Linear(width, width).requires_grad_(False)
        self.layer = layer
        self.head = nn.Linear(out, LABELS).requires_grad_(False)
        self.twice = twice

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        h = torch.tanh(self.below(h))
        h = torch.tanh(self.layer(h))
        if self.twice:
            h = torch.tanh(self.layer(h))
        if mask is not None:
            kept = mask.unsqueeze(-1).to(h.dtype)
            h = (h * kept).sum(1) / kept.sum(1)
        logits: Tensor = self.head(h)
        return logits


class Stack(nn.Module):
    """Several layers one above the other, so that gradients flow through each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [lora(5, 7), nn.LayerNorm(7), lora(7, 70), nn.Linear(70, 60), nn.Linear(60, 9)]
        )
        self.head = nn.Linear(9, LABELS)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        for layer in self.layers:
            h = torch.tanh(layer(h))
        kept = mask.unsqueeze(-1).to(h.dtype)
        logits: Tensor = self.head((h * kept).sum(1) / kept.sum(1))
        return logits


def lora(width: int, out: int, rank: int = 2, bias: bool = True) -> LoraLinear:
    rng = torch.Generator().manual_seed(0)
    layer = LoraLinear(nn.Linear(width, out, bias=bias).requires_grad_(False), rank, 2.0, rng)
    nn.init.normal_(layer.lora_B.weight, generator=rng)
    return layer


def sequences(width: int, longest: int = 7, records: int = RECORDS) -> Examples:
    rng = torch.Generator().manual_seed(3)
    sizes = [1 + (3 * i + longest - 1) % longest for i in range(records)]
    features = [torch.randn(size, width, generator=rng) for size in sizes]
    return Examples(features, torch.arange(records) % LABELS)


def rows(width: int) -> Examples:
    features = list(torch.randn(RECORDS, width, generator=torch.Generator().manual_seed(4)))
    return Examples(features, torch.arange(RECORDS) % LABELS)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def one_by_one(model: nn.Module, data: Examples) -> list[dict[str, Tensor]]:
    """Return the gradients of every record: a forward and a backward pass for each."""
    parameters, found = trained(model), []
    for feature, label in zip(data.features, data.labels, strict=True):
        loss = functional.cross_entropy(model(*collate([feature])), label[None])
        gradients = torch.autograd.grad(WEIGHTS[label] * loss, list(parameters.values()))
        found.append(dict(zip(parameters, gradients, strict=True)))
    return found


Engine = Callable[..., AbstractContextManager[Any]]


def require_equal(model: nn.Module, data: Examples, engine: Engine) -> PerRecord:
    parameters, expected = trained(model), one_by_one(model, data)
    slots = slots_of({name: tuple(p.shape) for name, p in parameters.items()})
    factors = torch.linspace(0.1, 2.0, len(data))
    with engine(model, parameters, WEIGHTS) as source:
        found: PerRecord = source.gradients(data)
        norms, sums = found.norms(), found.sums(slots, factors)
    for name in parameters:
        each = torch.stack([record[name] for record in expected])
        torch.testing.assert_close(norms[name], each.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-7)
        wanted = torch.einsum("r,r...->...", factors, each)
        scale = float(wanted.abs().max())
        torch.testing.assert_close(sums[name] / scale, wanted / scale, rtol=0, atol=1e-5)
    return found


KINDS: dict[str, Callable[[], tuple[nn.Module, Examples]]] = {
    "lora": lambda: (Net(lora(5, 7), 5, 7), sequences(5)),
    "lora without bias": lambda: (Net(lora(5, 7, bias=False), 5, 7), sequences(5)),
    "lora of rank out": lambda: (Net(lora(5, 4, rank=4), 5, 4), sequences(5)),
    "lora on vectors": lambda: (Net(lora(5, 7), 5, 7), rows(5)),
    "lora called twice": lambda: (Net(lora(5, 5), 5, 5, twice=True), sequences(5)),
    "linear": lambda: (Net(nn.Linear(5, 7), 5, 7), sequences(5)),
    "linear without bias": lambda: (Net(nn.Linear(5, 7, bias=False), 5, 7), sequences(5)),
    "linear on vectors": lambda: (Net(nn.Linear(5, 7), 5, 7), rows(5)),
    "linear called twice": lambda: (Net(nn.Linear(70, 70), 70, 70, twice=True), sequences(70)),
    "ghost": lambda: (Net(nn.Linear(80, 60), 80, 60), sequences(80)),
    "ghost on vectors": lambda: (Net(nn.Linear(80, 60), 80, 60), rows(80)),
    "layer norm": lambda: (Net(nn.LayerNorm(5), 5, 5), sequences(5)),
    "layer norm without bias": lambda: (Net(nn.LayerNorm(5, bias=False), 5, 5), sequences(5)),
    "layer norm on vectors": lambda: (Net(nn.LayerNorm(5), 5, 5), rows(5)),
    "norm called twice": lambda: (Net(nn.LayerNorm(5), 5, 5, twice=True), sequences(5)),
    "stack": lambda: (Stack(), sequences(5)),
}


# Laws


ENGINES: dict[str, Engine] = {"fast": fast_gradients, "opacus": opacus_gradients}
CASES = [(kind, name) for kind in KINDS for name in ENGINES]
CASES.remove(("layer norm without bias", "opacus"))  # Opacus expects a bias


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_norms_and_clipped_sums_are_those_of_records_taken_one_at_a_time(
    kind: str, name: str
) -> None:
    engine = ENGINES[name]
    torch.manual_seed(1)
    model, data = KINDS[kind]()

    found = require_equal(model, data, engine)

    ghosts = [name for name, part in found.parts.items() if isinstance(part, Ghost)]
    expected = kind.startswith("ghost") or kind == "stack"
    assert bool(ghosts) is (expected and engine is fast_gradients)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 9),
    out=st.integers(1, 9),
    rank=st.integers(1, 5),
    longest=st.integers(1, 6),
    records=st.integers(1, 5),
    factors=st.sampled_from(["A", "B", "AB"]),
)
def test_any_shape_and_either_factor_alone(
    width: int, out: int, rank: int, longest: int, records: int, factors: str
) -> None:
    torch.manual_seed(2)
    model = Net(lora(width, out, rank), width, out)
    model.layer.lora_A.requires_grad_("A" in factors)
    model.layer.lora_B.requires_grad_("B" in factors)

    found = require_equal(model, sequences(width, longest, records), fast_gradients)

    assert set(found.parts) == {f"layer.lora_{factor}.weight" for factor in factors}


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 6), seed=st.integers(0, 1000))
def test_a_ghost_is_the_matrix_it_stands_for(tokens: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x, e = (torch.randn(4, tokens, width, generator=rng) for width in (5, 3))
    factors, ghost = torch.rand(4, generator=rng), Ghost(x, e)
    matrix = Matrix(torch.bmm(e.mT, x).flatten(1))
    one, other = torch.zeros(15), torch.zeros(15)

    ghost.add(one, factors)
    matrix.add(other, factors)

    torch.testing.assert_close(ghost.norms(), matrix.norms(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values", [7, 70_000])
def test_a_sum_in_float64_is_taken_in_float64(values: int) -> None:
    """A small gradient beside a large one is not rounded away."""
    torch.manual_seed(0)
    big, factors = 2.0**24, torch.ones(2)
    rows = torch.stack([torch.full((values,), big), torch.rand(values)])
    inputs = torch.stack([torch.full((1, values), big), rows[1:]])
    for block in (Matrix(rows), Ghost(inputs, torch.ones(2, 1, 1))):
        total = torch.zeros(values, dtype=torch.float64)
        block.add(total, factors)
        assert torch.equal(total - big, rows[1].double())


def test_a_ghost_of_tokens_that_cancel_does_not_report_too_small_a_norm() -> None:
    # e x^T of token 2 undoes that of token 1 but for one part in 10^5: float32 would lose it.
    x = torch.full((1, 2, 50), 100.0)
    e = torch.cat([torch.full((1, 1, 40), 100.0), torch.full((1, 1, 40), -100.001)], dim=1)
    exact = torch.bmm(e.double().mT, x.double()).norm()

    assert float(Ghost(x, e).norms()) == pytest.approx(float(exact), rel=1e-4)


def test_small_gradients_are_one_block_and_large_ones_are_not() -> None:
    slots = slots_of({"a.lora_B.weight": (4, 2), "head.bias": (3,), "z": (5,)})
    small = from_rows(torch.randn(6, 16), slots)
    factors, total = torch.rand(6), torch.zeros(16)

    (at, block), *others = small.blocks(slots, packed=True)
    block.add(total, factors)
    apart = small.sums(slots, factors)

    assert (at, others) == (slice(0, 16), [])
    for slot in slots:
        torch.testing.assert_close(slot.shaped(total[slot.start : slot.stop]), apart[slot.name])
    assert len(PerRecord(1 << 19, small.parts).blocks(slots, packed=True)) == 3


def test_ghosts_are_for_short_sequences_and_large_weights() -> None:
    assert ghost_is_cheaper(1, 384, 384)
    assert not ghost_is_cheaper(1, 64, 3)
    assert not ghost_is_cheaper(512, 384, 384)


# Layers that change what they are given, and what stays behind


class Inplace(Net):
    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        logits: Tensor = self.head(functional.relu_(self.layer(h)))
        return logits


@pytest.mark.parametrize("layer", [lora(5, 7), nn.Linear(5, 7), nn.LayerNorm(5)])
def test_what_follows_a_layer_may_change_its_output_in_place(layer: nn.Module) -> None:
    torch.manual_seed(1)
    model = Inplace(layer, 5, 5 if isinstance(layer, nn.LayerNorm) else 7)

    require_equal(model, rows(5), fast_gradients)


@pytest.mark.parametrize("fails", [False, True])
def test_layers_get_their_own_forward_back(fails: bool) -> None:
    model, data = Stack(), sequences(5)
    before = {name: sorted(vars(m)) for name, m in model.named_modules()}
    expected = model(*collate(data.features))
    with fast_gradients(model, trained(model), None) as source:
        source.gradients(data)
        if fails:
            model.zero_grad()
            with pytest.raises(PrivacyError, match="the model moves the batch axis"):
                model(*collate(data.take([0, 1]).features))

    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == before
    torch.testing.assert_close(model(*collate(data.features)), expected, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


# What the fast path does not know


class Tied(nn.Module):
    """Two linear layers with one weight, and a scale that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(5))
        self.filters = nn.Conv1d(5, 5, 1)
        self.words = nn.Embedding(4, 5)
        self.square = nn.LayerNorm((2, 5))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Linear:
    layer = nn.Linear(5, 7)
    layer.register_forward_hook(lambda module, inputs, y: 2 * y)
    return layer


def test_tensors_of_other_layers_are_unknown() -> None:
    model = Tied()

    assert unknown_tensors(model, trained(model)) == [
        "filters.bias",
        "filters.weight",
        "first.weight",
        "scale",
        "square.bias",
        "square.weight",
        "words.weight",
    ]


@pytest.mark.parametrize("layer", [Doubled(5, 7), hooked()], ids=["subclass", "hook"])
def test_layers_that_compute_something_else_are_unknown(layer: nn.Linear) -> None:
    model = Net(layer, 5, 7)
    assert unknown_tensors(model, trained(model)) == ["layer.bias", "layer.weight"]

    frozen = layer.requires_grad_(False)
    adapted = Net(LoraLinear(frozen, 2, 2.0, torch.Generator()), 5, 7)
    assert unknown_tensors(adapted, trained(adapted)) == [
        "layer.lora_A.weight",
        "layer.lora_B.weight",
    ]


def test_unknown_layers_are_refused_by_name() -> None:
    model = Tied()

    with (
        pytest.raises(PrivacyError, match=r"no fast per-record gradients for filters\.bias"),
        fast_gradients(model, trained(model), None),
    ):
        pass


class Beside(Net):
    """The layer's weight is used once more, outside the layer."""

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        weight: Any = self.layer.weight
        logits: Tensor = super().forward(h, mask) + weight.sum()
        return logits


def test_a_tensor_used_outside_its_layer_is_refused() -> None:
    model = Beside(nn.Linear(5, 7), 5, 7)

    with (
        fast_gradients(model, trained(model), None) as source,
        pytest.raises(PrivacyError, match="is used outside its module"),
    ):
        source.gradients(sequences(5))


def test_canary_gradients_of_another_size_are_refused() -> None:
    with pytest.raises(PrivacyError, match=r"shape \(canaries, 6\), got \(2, 5\)"):
        from_rows(torch.zeros(2, 5), slots_of({"a": (2, 3)}))
