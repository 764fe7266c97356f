from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from anabranch.client.local import Local
from anabranch.client.tuning.active import Active, union
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.training import make_optimizer
from anabranch.protocols.adapter import WHOLE, Adapter
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.protocols.schedule import learning_rate_factor
from anabranch.protocols.tables import Training
from anabranch.simulations.cohort.stacked import Layout, Stacked
from tests.client.tuning.conftest import make_config  # noqa: F401 - a fixture
from tests.simulations.cohort.cohort_rig import TABLES, TOTAL_STEPS, Client, cohort

CPU = torch.device("cpu")
RATES = st.sampled_from([1e-3, 0.01, 0.2])
SETTINGS = st.builds(
    Training,
    optimizer=st.just("sgd"),
    learning_rate=RATES,
    head_learning_rate=st.none() | RATES,
    weight_decay=st.sampled_from([0.0, 0.3]),
    momentum=st.sampled_from([0.0, 0.9]),
    schedule=st.sampled_from(["constant", "cosine"]),
    warmup=st.sampled_from([0.0, 0.2]),
    max_grad_norm=st.sampled_from([None, 0.5]),
)
CLIENTS = st.lists(
    st.builds(
        Client,
        seed=st.integers(0, 3),
        training=SETTINGS,
        mu=st.sampled_from([0.0, 0.2]),
        part=st.sampled_from([WHOLE, Part(factors="B"), Part(ranks=(0, 2)), Part(dense=False)]),
        first_step=st.integers(0, 9),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def classifier(make_config: Any) -> Classifier:  # noqa: F811
    base, model, lora = TABLES["mlp-lora"]
    return load_classifier(make_config(base, "tabular-classification", lora=lora, **model))


def stacked_of(locals: list[Local]) -> Stacked:
    masks = [union(local.classifier.spec, local.part, local.kept) for local in locals]
    layout = Layout(locals[0].classifier.spec, set().union(*masks))
    return Stacked(layout, locals, masks, CPU)


def of_torch(local: Local, gradients: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the values after steps with these gradients, as client/tuning/training.py does it."""
    masks = union(local.classifier.spec, local.part, local.kept)
    values = {n: torch.tensor(local.start.arrays[n]) for n in local.start.arrays}
    chosen = {n: nn.Parameter(values[n].clone()) for n in masks}
    active = Active(
        parameters=chosen,
        start={n: values[n] for n in chosen},
        masks={n: torch.from_numpy(m) for n, m in masks.items() if m is not None},
    )
    optimizer, training = make_optimizer(chosen, local.training), local.training
    for step, gradient in enumerate(gradients):
        for name, parameter in chosen.items():
            parameter.grad = gradient[name].clone()
        active.pull(local.proximal_mu)
        active.mask_gradients()
        if training.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(chosen.values(), training.max_grad_norm)
        factor = learning_rate_factor(
            local.schedule.first_step + step, TOTAL_STEPS, training.warmup, training.schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.step()
        active.hold()
    return values | {n: p.detach() for n, p in chosen.items()}


@settings(max_examples=40)
@given(CLIENTS, st.sampled_from(["sgd", "adamw"]))
def test_updates_are_those_of_torch(
    classifier: Classifier, clients: list[Client], optimizer: str
) -> None:
    locals = [
        local_of(classifier, client, optimizer)
        for client in sorted(clients, key=lambda client: -client.seed)
    ]
    steps = [client.seed + 1 for client in sorted(clients, key=lambda client: -client.seed)]
    stacked = stacked_of(locals)
    given: list[list[Mapping[str, Tensor]]] = [[] for _ in locals]
    rng = torch.Generator().manual_seed(0)
    for step in range(steps[0]):
        active = sum(n > step for n in steps)
        _, gradients = stacked.views(active)
        for gradient in gradients.values():
            gradient.copy_(torch.randn(gradient.shape, generator=rng))
        for k in range(active):
            given[k].append({name: g[k].clone() for name, g in gradients.items()})
        stacked.update(step, active)
    values, _ = stacked.views(len(locals))
    for k, local in enumerate(locals):
        for name, expected in of_torch(local, given[k]).items():
            torch.testing.assert_close(values[name][k], expected, rtol=1e-5, atol=1e-6)


def local_of(classifier: Classifier, client: Client, optimizer: Any) -> Local:
    (local,) = cohort(classifier, [client])
    training = msgspec.structs.replace(local.training, optimizer=optimizer)
    return Local(**{**vars(local), "training": training})


def test_a_row_is_the_adapter_it_was_made_of(classifier: Classifier) -> None:
    locals = cohort(classifier, [Client(seed=0), Client(seed=1)])
    layout = Layout(classifier.spec, {"head.bias"})
    for local in locals:
        (again,) = Adapter.of_rows(layout.spec, layout.flatten(local.start)[None])
        assert isinstance(again, Adapter)
        for name, array in local.start.arrays.items():
            np.testing.assert_array_equal(again.arrays[name], array)


def test_values_do_not_alias_what_training_began_from(classifier: Classifier) -> None:
    (local,) = cohort(classifier, [Client(seed=0)])
    before = {name: array.copy() for name, array in local.start.arrays.items()}
    stacked = stacked_of([local])
    stacked.values.add_(1.0)
    for name, array in local.start.arrays.items():
        np.testing.assert_array_equal(array, before[name])


def test_another_spec_is_refused(classifier: Classifier) -> None:
    (local,) = cohort(classifier, [Client(seed=0)])
    other = msgspec.structs.replace(classifier.spec, alpha=1.0)
    layout = Layout(classifier.spec, {"head.bias"})
    with pytest.raises(IncompatibleAdapter, match=r"alpha 1\.0, expected 6\.0"):
        layout.flatten(Adapter(other, local.start.arrays))


def test_one_step_of_momentum_and_decay_by_hand(classifier: Classifier) -> None:
    # w = 2, g = 3, λ = 0.5, β = 0.5, η = 0.1:  m1 = 3 + 0.5 · 2 = 4, w1 = 2 - 0.4 = 1.6;
    # m2 = 0.5 · 4 + 3 + 0.5 · 1.6 = 5.8, w2 = 1.6 - 0.58 = 1.02.
    training = Training(
        optimizer="sgd", learning_rate=0.1, momentum=0.5, weight_decay=0.5, max_grad_norm=None
    )
    (local,) = cohort(classifier, [Client(seed=0, training=training)])
    stacked = stacked_of([local])
    stacked.values.fill_(2.0)
    _, gradients = stacked.views(1)
    for expected in (1.6, 1.02):
        step = 0 if expected == 1.6 else 1
        for gradient in gradients.values():
            gradient.fill_(3.0)
        stacked.update(step, 1)
        torch.testing.assert_close(stacked.values, torch.full_like(stacked.values, expected))
