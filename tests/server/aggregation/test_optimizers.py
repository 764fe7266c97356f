"""Server optimisers: the paper's equations, torch's Adam and Flower's strategies as oracles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.server.aggregation.altqr import altqr
from anabranch.server.aggregation.fedavg import fedavg
from anabranch.server.aggregation.optimizers import (
    Optimizer,
    adagrad,
    adam,
    constant,
    linear_decay,
    momentum,
    with_optimizer,
    yogi,
)
from anabranch.server.aggregation.rolora import rolora
from anabranch.server.aggregation.rule import Rule
from tests.lowrank import random_adapter, random_delta, spec_of

SPEC = spec_of(2)
ETA = constant(0.1, 0.3)
B1, B2, TAU = 0.8, 0.95, 1e-3
Values = dict[str, np.ndarray]


def deltas(seed: int, scale: float = 1.0) -> list[Delta]:
    return [random_delta(SPEC, 10 * seed + k, num_examples=k).times(scale) for k in (3, 7)]


def rate(name: str) -> float:
    return 0.3 if name.startswith("head.") else 0.1


def run(rule: Rule[Any], rounds: int, scale: float = 1.0) -> tuple[list[Values], list[Values]]:
    """Return x_t and Δ_t of every round; `rule` wraps fedavg()."""
    state, adapter = rule.init(random_adapter(SPEC, 99))
    values, gradients = [dict(adapter.arrays)], []
    for number in range(rounds):
        plain = fedavg().merge(None, adapter, deltas(number, scale))[1].adapter
        gradients.append({n: a - adapter.arrays[n].astype(float) for n, a in plain.arrays.items()})
        state, merged = rule.merge(state, adapter, deltas(number, scale))
        adapter = merged.adapter
        values.append(dict(adapter.arrays))
    return values, gradients


PAPER: list[tuple[Optimizer, Callable[[Any, Any], Any]]] = [
    (adam(ETA, beta1=B1, beta2=B2, tau=TAU), lambda v, d: B2 * v + (1 - B2) * d**2),
    (
        yogi(ETA, beta1=B1, beta2=B2, tau=TAU),
        lambda v, d: v - (1 - B2) * d**2 * np.sign(v - d**2),
    ),
    (adagrad(ETA, beta1=B1, tau=TAU), lambda v, d: v + d**2),
]


@pytest.mark.parametrize(("optimizer", "second"), PAPER, ids=["adam", "yogi", "adagrad"])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_rounds_are_algorithm_2_of_the_paper(
    optimizer: Optimizer, second: Callable[[Any, Any], Any], scale: float
) -> None:
    values, gradients = run(with_optimizer(fedavg(), optimizer), 5, scale)

    for name in SPEC.shapes:
        x = values[0][name].astype(float)
        m, v = np.zeros_like(x), np.full_like(x, TAU**2)
        for after, d in zip(values[1:], (g[name] for g in gradients), strict=True):
            m, v = B1 * m + (1 - B1) * d, second(v, d)
            x = x + rate(name) * m / (np.sqrt(v) + TAU)
            np.testing.assert_allclose(after[name], x, rtol=0, atol=2e-6)


def test_rounds_of_momentum_are_fedavgm() -> None:
    values, gradients = run(with_optimizer(fedavg(), momentum(ETA, beta=0.7)), 5)

    for name in SPEC.shapes:
        x = values[0][name].astype(float)
        velocity = np.zeros_like(x)
        for after, gradient in zip(values[1:], gradients, strict=True):
            velocity = 0.7 * velocity + gradient[name]
            x = x + rate(name) * velocity
            np.testing.assert_allclose(after[name], x, rtol=0, atol=2e-6)


def test_adam_with_bias_correction_is_torch_s_adam_on_minus_the_mean() -> None:
    optimizer = adam(ETA, beta1=B1, beta2=B2, tau=TAU, bias_correction=True)
    values, gradients = run(with_optimizer(fedavg(), optimizer), 5)
    theirs = {n: torch.from_numpy(a.astype(np.float64)) for n, a in values[0].items()}
    groups = [{"params": [p], "lr": rate(n)} for n, p in theirs.items()]
    reference = torch.optim.Adam(groups, betas=(B1, B2), eps=TAU)

    for after, gradient in zip(values[1:], gradients, strict=True):
        for name, p in theirs.items():
            p.grad = -torch.from_numpy(gradient[name])
        reference.step()
        for name, p in theirs.items():
            np.testing.assert_allclose(after[name], p.numpy(), rtol=0, atol=2e-6)


@dataclass
class Reply:
    """What Flower's aggregation reads of a Message."""

    content: RecordDict

    def has_error(self) -> bool:
        return False


def flower_rounds(strategy: Any, values: list[Values]) -> list[Values]:
    """Return what `strategy` makes of the same clients, each round from our own x_t."""
    results = []
    for number, before in enumerate(values[:-1]):
        record = ArrayRecord({n: Array(a) for n, a in before.items()})
        numpy_like = {n: a.astype(np.float64) for n, a in before.items()}
        strategy.current_arrays = record if isinstance(strategy, FedAvgM) else numpy_like
        replies = []
        for delta in deltas(number):
            after = {n: Array(numpy_like[n] + d) for n, d in delta.arrays.items()}
            metrics = MetricRecord({"num-examples": delta.num_examples})
            replies.append(Reply(RecordDict({"arrays": ArrayRecord(after), "metrics": metrics})))
        merged, _ = strategy.aggregate_train(number + 1, replies)
        results.append({n: a.numpy() for n, a in merged.items()})
    return results


def steps(values: list[Values], results: list[Values], name: str) -> list[tuple[Any, Any]]:
    """Return (our step, Flower's step) of every round, both from our x_t."""
    return [
        (ours[name] - before[name].astype(float), theirs[name] - before[name].astype(float))
        for before, ours, theirs in zip(values, values[1:], results, strict=False)
    ]


ONE = constant(0.1, 0.1)


def test_fedavg_is_flower_s() -> None:
    values, _ = run(fedavg(), 3)
    results = flower_rounds(FedAvg(), values)

    for name in SPEC.shapes:
        for ours, theirs in steps(values, results, name):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


def test_fedavgm_is_flower_s() -> None:
    values, _ = run(with_optimizer(fedavg(), momentum(ONE, beta=0.7)), 4)
    strategy = FedAvgM(server_learning_rate=0.1, server_momentum=0.7)
    results = flower_rounds(strategy, values)

    for name in SPEC.shapes:
        for ours, theirs in steps(values, results, name):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


def test_fedadagrad_is_flower_s_but_for_tau_squared() -> None:
    """Flower starts from v_{-1} = 0; with our own moments of the paper, v is larger by τ²."""
    values, gradients = run(with_optimizer(fedavg(), adagrad(ONE, tau=TAU)), 4)
    results = flower_rounds(FedAdagrad(eta=0.1, tau=TAU), values)

    for name in SPEC.shapes:
        v = np.zeros(SPEC.shapes[name])
        for (ours, theirs), gradient in zip(steps(values, results, name), gradients, strict=True):
            v = v + gradient[name] ** 2
            factor = (np.sqrt(v) + TAU) / (np.sqrt(v + TAU**2) + TAU)
            np.testing.assert_allclose(ours, theirs * factor, rtol=1e-4, atol=2e-6)


def test_fedyogi_is_flower_s_once_both_start_from_the_same_v() -> None:
    values, _ = run(with_optimizer(fedavg(), yogi(ONE, beta1=B1, beta2=B2, tau=TAU)), 4)
    strategy = FedYogi(eta=0.1, beta_1=B1, beta_2=B2, tau=TAU)
    strategy.v_t = {n: np.full(s, TAU**2) for n, s in SPEC.tensors}
    results = flower_rounds(strategy, values)

    for name in SPEC.shapes:
        for ours, theirs in steps(values, results, name):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


def test_fedadam_is_flower_s_but_for_its_learning_rate_and_its_first_v() -> None:
    """Flower: η_t = η √(1 − β_2^(t+1)) / (1 − β_1^(t+1)) with t from 1, and v_{-1} = 0."""
    values, _ = run(with_optimizer(fedavg(), adam(ONE, beta1=B1, beta2=B2, tau=TAU)), 4)
    strategy = FedAdam(eta=0.1, beta_1=B1, beta_2=B2, tau=TAU)
    strategy.v_t = {n: np.full(s, TAU**2) for n, s in SPEC.tensors}
    results = flower_rounds(strategy, values)

    for name in SPEC.shapes:
        for number, (ours, theirs) in enumerate(steps(values, results, name), start=1):
            factor = np.sqrt(1 - B2 ** (number + 1)) / (1 - B1 ** (number + 1))
            np.testing.assert_allclose(ours * factor, theirs, rtol=0, atol=5e-6)


@settings(max_examples=20)
@given(scale=st.floats(1e-2, 1e2))
def test_the_first_corrected_step_does_not_depend_on_the_size_of_the_deltas(scale: float) -> None:
    rule = with_optimizer(fedavg(), adam(ONE, tau=1e-12, bias_correction=True))

    values, _ = run(rule, 1, scale)

    for name, before in values[0].items():
        np.testing.assert_allclose(np.abs(values[1][name] - before), 0.1, rtol=1e-4)


@pytest.mark.parametrize("optimizer", [o for o, _ in PAPER] + [momentum(ETA)])
def test_a_value_that_nobody_changed_stays(optimizer: Optimizer) -> None:
    rule = with_optimizer(fedavg(), optimizer)
    state, adapter = rule.init(random_adapter(SPEC, 0))
    still = Delta(SPEC, {n: np.zeros(s, np.float32) for n, s in SPEC.tensors}, 1)

    merged = rule.merge(state, adapter, [still])[1]

    for name, array in adapter.arrays.items():
        np.testing.assert_array_equal(merged.adapter.arrays[name], array)


def test_the_moments_of_a_factor_wait_while_the_other_one_is_trained() -> None:
    rule = with_optimizer(rolora(), adam(ONE, bias_correction=True))
    state, adapter = rule.init(random_adapter(SPEC, 0))
    for number in (1, 2, 3):
        sent = rule.open(state, adapter, number)
        part = rule.part(SPEC, number, "site", 2)
        state, merged = rule.merge(state, sent, [random_delta(SPEC, number, part)])
        idle = "k.lora_A.weight" if number % 2 else "k.lora_B.weight"
        np.testing.assert_array_equal(merged.adapter.arrays[idle], adapter.arrays[idle])
        adapter = merged.adapter

    assert {name: one.steps for name, one in state.moments.items()} == {
        "head.bias": 3,
        "head.weight": 3,
        "k.lora_A.weight": 1,
        "k.lora_B.weight": 2,
        "q.lora_A.weight": 1,
        "q.lora_B.weight": 2,
    }


def test_the_error_and_the_counts_are_those_of_the_wrapped_rule() -> None:
    sent = random_adapter(SPEC, 0)
    rule = with_optimizer(fedavg(), adam(ONE))

    merged = rule.merge(rule.init(sent)[0], sent, deltas(0))[1]

    plain = fedavg().merge(None, sent, deltas(0))[1]
    assert (merged.error, merged.clients, merged.num_examples) == (plain.error, 2, 10)
    assert rule.name == "fedavg+adam"
    assert rule.truncates


def test_linear_decay_ends_one_step_above_zero() -> None:
    decay = linear_decay(0.4, 0.8, 4)

    assert [decay("l.lora_A.weight", t) for t in (1, 2, 3, 4)] == pytest.approx(
        [0.4, 0.3, 0.2, 0.1]
    )
    assert decay("head.bias", 1) == 0.8


def test_a_rule_that_re_gauges_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not fit altqr.*other coordinates"):
        with_optimizer(altqr(), adam(ONE))


@pytest.mark.parametrize("make", [adam, yogi, adagrad])
def test_constants_out_of_range_are_refused(make: Callable[..., Optimizer]) -> None:
    with pytest.raises(ValueError, match=r"expected beta1 in \[0, 1\), got 1\.0"):
        make(ONE, beta1=1.0)
    with pytest.raises(ValueError, match=r"expected tau > 0, got 0\.0"):
        make(ONE, tau=0.0)


@pytest.mark.parametrize("make", [adam, yogi])
def test_a_second_beta_out_of_range_is_refused(make: Callable[..., Optimizer]) -> None:
    with pytest.raises(ValueError, match=r"expected beta2 in \[0, 1\), got -0\.1"):
        make(ONE, beta2=-0.1)


def test_a_step_that_float32_cannot_hold_is_refused() -> None:
    rule = with_optimizer(fedavg(), momentum(constant(1e39, 1e39)))
    sent = random_adapter(SPEC, 0)

    with pytest.raises(IncompatibleAdapter, match="values are NaN or infinite"):
        rule.merge(rule.init(sent)[0], sent, deltas(0))
