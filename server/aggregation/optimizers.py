"""Server optimisers: the merged adapter minus the one sent out, taken as a gradient.

Notation: x_t the adapter sent out in round t, Δ_t = merged − x_t; η the server's learning rate;
β_1, β_2 in [0, 1); τ > 0; squares, roots and quotients by value.

    m_t = β_1 m_{t−1} + (1 − β_1) Δ_t                               m_{−1} = 0
    v_t = β_2 v_{t−1} + (1 − β_2) Δ_t²                              FedAdam
    v_t = v_{t−1} − (1 − β_2) Δ_t² sign(v_{t−1} − Δ_t²)             FedYogi
    v_t = v_{t−1} + Δ_t²                                            FedAdagrad
    x_{t+1} = x_t + η_t m_t / (√v_t + τ)                            v_{−1} = τ²

(Reddi et al. 2021, arXiv:2003.00295, Algorithm 2, which asks for v_{−1} >= τ².) Adam with bias
correction (Kingma and Ba 2015, arXiv:1412.6980, Algorithm 1) starts from v_{−1} = 0 and takes
m_t / (1 − β_1^t) and v_t / (1 − β_2^t): its first rounds move as far as later ones.

    v_t = β_1 v_{t−1} + Δ_t,  x_{t+1} = x_t + η_t v_t    FedAvgM (Hsu et al. 2019, arXiv:1909.06335)

A round moves the tensors that were trained in it. The moments of the others wait: in rolora, each
factor has an optimiser of its own. Under DP all of this is post-processing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.server.aggregation.rule import Merged, Rule, S

Array = NDArray[np.float64]
Rate = Callable[[str, int], float]  # (name of a tensor, round from 1) -> η_t


@dataclass(frozen=True, eq=False)
class Moments:
    """What an optimiser keeps of one tensor after `steps` rounds that trained it."""

    steps: int
    first: Array
    second: Array


@dataclass(frozen=True)
class Optimizer:
    """One step on one tensor: (Δ, moments before) -> (step / η, moments after)."""

    name: str
    rate: Rate
    step: Callable[[Array, Moments], tuple[Array, Moments]]
    start: float = 0.0  # v_{−1}


@dataclass(frozen=True, eq=False)
class OptimizerState(Generic[S]):
    """State after `rounds` rounds; the wrapped rule's own beside it."""

    inner: S
    rounds: int
    moments: Mapping[str, Moments]  # of the tensors trained so far


def momentum(rate: Rate, *, beta: float = 0.9) -> Optimizer:
    """Return FedAvgM; ValueError for a beta outside [0, 1)."""
    _require_betas(beta=beta)

    def step(delta: Array, before: Moments) -> tuple[Array, Moments]:
        velocity = beta * before.first + delta
        return velocity, Moments(before.steps + 1, velocity, before.second)

    return Optimizer("momentum", rate, step)


def adam(
    rate: Rate,
    *,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    bias_correction: bool = False,
) -> Optimizer:
    """Return FedAdam as in the paper, or with Adam's bias correction, which the paper leaves out.

    Raises ValueError for a beta outside [0, 1) or tau <= 0.
    """
    _require_betas(beta1=beta1, beta2=beta2)
    second = _average(beta2)
    if not bias_correction:
        return _adaptive("adam", rate, beta1, tau, second)

    def step(delta: Array, before: Moments) -> tuple[Array, Moments]:
        t = before.steps + 1
        after = Moments(t, _average(beta1)(before.first, delta), second(before.second, delta**2))
        m, v = after.first / (1 - beta1**t), after.second / (1 - beta2**t)
        return m / (np.sqrt(v) + tau), after

    _require_tau(tau)
    return Optimizer("adam", rate, step)


def yogi(rate: Rate, *, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Optimizer:
    """Return FedYogi; raises as adam does."""
    _require_betas(beta1=beta1, beta2=beta2)

    def second(before: Array, squared: Array) -> Array:
        return before - (1 - beta2) * squared * np.sign(before - squared)

    return _adaptive("yogi", rate, beta1, tau, second)


def adagrad(rate: Rate, *, beta1: float = 0.0, tau: float = 1e-3) -> Optimizer:
    """Return FedAdagrad (the paper's experiments: beta1 = 0); raises as adam does."""
    _require_betas(beta1=beta1)
    return _adaptive("adagrad", rate, beta1, tau, lambda before, squared: before + squared)


def with_optimizer(rule: Rule[S], optimizer: Optimizer) -> Rule[OptimizerState[S]]:
    """Wrap `rule`: what it would move the adapter by is the gradient of `optimizer`.

    Merged.error stays that of the wrapped rule: how well it merged, before the step.

    Raises ValueError for a rule that re-gauges. In a round, raises what `rule` does, and
    IncompatibleAdapter for values that float32 cannot hold.
    """
    if rule.regauges:
        raise ValueError(
            f"a server optimiser does not fit {rule.name}: it writes the factors anew every "
            "round, so moments of earlier rounds belong to other coordinates. Use no optimiser, "
            "or fedavg, ffa or rolora"
        )

    def init(adapter: Adapter) -> tuple[OptimizerState[S], Adapter]:
        inner, first = rule.init(adapter)
        return OptimizerState(inner, 0, {}), first

    def merge(
        state: OptimizerState[S], adapter: Adapter, deltas: Iterable[Delta]
    ) -> tuple[OptimizerState[S], Merged]:
        trained: set[str] = set()

        def noted() -> Iterator[Delta]:
            for delta in deltas:
                trained.update(delta.arrays)
                yield delta

        inner, merged = rule.merge(state.inner, adapter, noted())
        rounds, moments, arrays = state.rounds + 1, dict(state.moments), dict(adapter.arrays)
        for name in sorted(trained):
            before = adapter.arrays[name].astype(np.float64)
            last = moments.get(name) or _fresh(before, optimizer.start)
            step, moments[name] = optimizer.step(merged.adapter.arrays[name] - before, last)
            with np.errstate(over="ignore"):  # Adapter refuses what became infinite
                arrays[name] = (before + optimizer.rate(name, rounds) * step).astype(np.float32)
        after = OptimizerState(inner, rounds, moments)
        return after, replace(merged, adapter=Adapter(adapter.spec, arrays))

    def open_round(state: OptimizerState[S], adapter: Adapter, number: int) -> Adapter:
        return rule.open(state.inner, adapter, number)

    return Rule(
        name=f"{rule.name}+{optimizer.name}",
        init=init,
        merge=merge,
        open=open_round,
        part=rule.part,
        truncates=rule.truncates,
    )


def linear_decay(rate: float, head_rate: float, rounds: int) -> Rate:
    """Return η_t = η · (1 − (t − 1) / rounds), with another η for the head."""

    def at(name: str, t: int) -> float:
        base = head_rate if name.startswith("head.") else rate
        return base * max(0.0, 1 - (t - 1) / rounds)

    return at


def constant(rate: float, head_rate: float) -> Rate:
    """Return η_t = η, with another η for the head."""
    return lambda name, t: head_rate if name.startswith("head.") else rate


def _adaptive(
    name: str, rate: Rate, beta1: float, tau: float, second: Callable[[Array, Array], Array]
) -> Optimizer:
    """Return Algorithm 2 of Reddi et al. with (v_{t−1}, Δ_t²) -> v_t as `second`."""
    _require_tau(tau)
    first = _average(beta1)

    def step(delta: Array, before: Moments) -> tuple[Array, Moments]:
        after = Moments(
            before.steps + 1, first(before.first, delta), second(before.second, delta**2)
        )
        return after.first / (np.sqrt(after.second) + tau), after

    return Optimizer(name, rate, step, start=tau**2)


def _average(beta: float) -> Callable[[Array, Array], Array]:
    return lambda before, now: beta * before + (1 - beta) * now


def _fresh(like: Array, start: float) -> Moments:
    return Moments(0, np.zeros_like(like), np.full_like(like, start))


def _require_betas(**betas: float) -> None:
    for name, value in betas.items():
        if not 0 <= value < 1:
            raise ValueError(f"expected {name} in [0, 1), got {value}")


def _require_tau(tau: float) -> None:
    if not tau > 0:
        raise ValueError(f"expected tau > 0, got {tau}")
