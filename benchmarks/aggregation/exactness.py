"""How far merged products are from the mean of the clients' products, judged in out × in matrices.

Notation: p_k are the rule's weights; client k has B_k A_k after training; B A is merged.

    error = ‖Σ p_k B_k A_k − B A‖_F / ‖Σ p_k B_k A_k‖_F     over all layers together, float64

Rules that claim exactness are played over several rounds of random training, from B = 0, on
layers that are not square, with several numbers of clients; where a rule takes mixed ranks, also
with those. Rules on one factor average rank by rank over the clients that trained it; there

    Σ p_k B_k A_k = Σ_j Σ_{k: j in I_k} w_k b_kj a_kj / Σ_{k: j in I_k} w_k

fedavg, hetlora and flexlora (cut to the rank) are played on the same seeds for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.spec import LORA_A, LORA_B, AdapterSpec, Shape
from anabranch.server.aggregation.altqr import altqr
from anabranch.server.aggregation.fedavg import fedavg
from anabranch.server.aggregation.fedex import fedex
from anabranch.server.aggregation.ffa import ffa
from anabranch.server.aggregation.flexlora import flexlora
from anabranch.server.aggregation.flora import flora
from anabranch.server.aggregation.hetlora import hetlora
from anabranch.server.aggregation.rolora import rolora
from anabranch.server.aggregation.rule import Rule
from benchmarks.harness import Figure

LAYERS: Mapping[str, tuple[int, int]] = {"k": (48, 20), "o": (17, 33), "q": (24, 64)}
EXTRA = 24  # the largest min(out, in): any residual fits
TARGET = 1e-6
SEED = 0

Dense = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: a rule, and the ranks its clients train."""

    method: str
    rank: int
    limits: tuple[int, ...]  # one per client
    seed: int


def figures(quick: bool) -> list[Figure]:
    """Return exactness.max_error; the note has the largest error of every rule."""
    clients, ranks, seeds = ((3,), (2, 4), 1) if quick else ((2, 5, 12), (1, 4, 8), 3)
    rounds = 4 if quick else 10
    worst: dict[str, float] = {}
    for case in cases(clients, ranks, seeds):
        error = max(errors(case, rounds))
        worst[case.method] = max(worst.get(case.method, 0.0), error)
    exact = {name: worst[name] for name in EXACT}
    shown = ", ".join(f"{name} {error:.1e}" for name, error in exact.items())
    others = ", ".join(f"{name} {worst[name]:.2g}" for name in INEXACT)
    note = f"largest per rule: {shown}; for comparison {others}; {rounds} rounds, clients {clients}"
    return [
        Figure(
            figure="exactness.max_error",
            value=max(exact.values()),
            unit="ratio",
            target=f"<= {TARGET:g}",
            spread=(min(exact.values()), max(exact.values())),
            peer="out × in products in float64",
            note=note,
        )
    ]


def cases(clients: Sequence[int], ranks: Sequence[int], seeds: int) -> Iterator[Case]:
    """Yield every rule with equal ranks, and those that take them with mixed ranks."""
    for seed in range(SEED, SEED + seeds):
        for count in clients:
            for rank in ranks:
                for method in (*EXACT, *INEXACT):
                    yield Case(method=method, rank=rank, limits=(rank,) * count, seed=seed)
                    if method != "fedex" and rank > 1:
                        mixed = tuple(1 + (3 * k) % rank for k in range(count))
                        yield Case(method=method, rank=rank, limits=mixed, seed=seed)


def errors(case: Case, rounds: int) -> list[float]:
    """Return the error of every round, each on top of the one before."""
    make, extra, wanted = {**EXACT, **INEXACT}[case.method]
    rule, rng = make(case.rank), np.random.default_rng([case.seed, case.rank, len(case.limits)])
    state, adapter = rule.init(_start(_spec(case.rank + extra), rng))
    found = []
    for number in range(1, rounds + 1):
        sent = rule.open(state, adapter, number)
        deltas = [
            _trained(rule, sent, number, f"client-{k}", limit, rng)
            for k, limit in enumerate(case.limits)
        ]
        goal = wanted(sent, deltas)
        state, merged = rule.merge(state, sent, deltas)
        adapter = merged.adapter
        found.append(_distance(goal, _products(adapter.spec, adapter.arrays)))
    return found


def _spec(rank: int) -> AdapterSpec:
    tensors: dict[str, Shape] = {"head.weight": (3, 4)}
    for name, (out, size) in LAYERS.items():
        tensors |= {name + LORA_A: (rank, size), name + LORA_B: (out, rank)}
    return AdapterSpec(
        base="0" * 64,
        tokenizer="",
        rank=rank,
        alpha=2.0 * rank,
        targets=tuple(sorted(LAYERS)),
        tensors=tuple(sorted(tensors.items())),
    )


def _start(spec: AdapterSpec, rng: np.random.Generator) -> Adapter:
    """Return an adapter as PEFT begins: A uniform in ±1/√in, B = 0."""
    arrays = {name: np.zeros(shape, np.float32) for name, shape in spec.tensors}
    for _, a, _ in spec.factors():
        bound = arrays[a].shape[1] ** -0.5
        arrays[a] = rng.uniform(-bound, bound, arrays[a].shape).astype(np.float32)
    return Adapter(spec, arrays)


def _trained(
    rule: Rule[Any], sent: Adapter, number: int, name: str, limit: int, rng: np.random.Generator
) -> Delta:
    """Return what a client of this rank sends: random steps of the size of a round's training."""
    full = limit == sent.spec.rank
    part = rule.part(sent.spec, number, name, sent.spec.rank if full else limit)
    arrays = {
        tensor: (0.1 * rng.standard_normal(shape)).astype(np.float32)
        for tensor, shape in part.shapes(sent.spec).items()
    }
    return Delta(sent.spec, arrays, int(rng.integers(10, 1000)), part=part)


def _products(
    spec: AdapterSpec, arrays: Mapping[str, NDArray[Any]], ranks: Sequence[int] | None = None
) -> Dense:
    at = slice(None) if ranks is None else list(ranks)
    return {
        module: arrays[b].astype(np.float64)[:, at] @ arrays[a].astype(np.float64)[at]
        for module, a, b in spec.factors()
    }


def _after(sent: Adapter, delta: Delta) -> dict[str, NDArray[np.float64]]:
    """Return the client's tensors after training, in float64."""
    change = delta.full()
    return {name: array.astype(np.float64) + change[name] for name, array in sent.arrays.items()}


def _mean(parts: Sequence[Dense], weights: Sequence[float]) -> Dense:
    total = sum(weights)
    return {
        name: sum(
            (w / total * part[name] for part, w in zip(parts, weights, strict=True)),
            start=np.zeros_like(parts[0][name]),
        )
        for name in parts[0]
    }


def of_whole(sent: Adapter, deltas: Sequence[Delta]) -> Dense:
    """Return Σ p_k B_k A_k where every client has the whole adapter."""
    products = [_products(sent.spec, _after(sent, delta)) for delta in deltas]
    return _mean(products, [delta.num_examples for delta in deltas])


def of_held(sent: Adapter, deltas: Sequence[Delta]) -> Dense:
    """Return Σ p_k B_k A_k where a client has the ranks that it trained and no others."""
    products = [_products(sent.spec, _after(sent, d), d.part.ranks) for d in deltas]
    return _mean(products, [delta.num_examples for delta in deltas])


def by_norm(sent: Adapter, deltas: Sequence[Delta]) -> Dense:
    """Return Σ p_k B_k A_k with p_k by the norm of the product."""
    products = [_products(sent.spec, _after(sent, d), d.part.ranks) for d in deltas]
    norms = [float(np.sqrt(sum(np.sum(a**2) for a in one.values()))) for one in products]
    return _mean(products, norms)


def by_rank(sent: Adapter, deltas: Sequence[Delta]) -> Dense:
    """Return the sum over ranks of the mean product of those that trained that rank.

    A client counts by its records, and the more the rarer it trains a rank.
    """
    total = {name: np.zeros((out, size)) for name, (out, size) in LAYERS.items()}
    for rank in range(sent.spec.rank):
        those = [d for d in deltas if d.part.ranks is None or rank in d.part.ranks]
        products = [_products(sent.spec, _after(sent, d), [rank]) for d in those]
        size = sent.spec.rank
        weights = [d.num_examples * size / len(d.part.ranks or range(size)) for d in those]
        if not those:  # nobody trained it: it stays
            products, weights = [_products(sent.spec, sent.arrays, [rank])], [1.0]
        for name, product in _mean(products, weights).items():
            total[name] += product
    return total


def _distance(wanted: Dense, got: Dense) -> float:
    missed = sum(float(np.sum((wanted[name] - got[name]) ** 2)) for name in wanted)
    return float(np.sqrt(missed / sum(float(np.sum(a**2)) for a in wanted.values())))


Wanted = Callable[[Adapter, Sequence[Delta]], Dense]
Play = tuple[Callable[[int], Rule[Any]], int, Wanted]  # trained rank -> rule; extra ranks; goal

EXACT: Mapping[str, Play] = {
    "ffa": (lambda rank: ffa(seed=SEED), 0, by_rank),
    "rolora": (lambda rank: rolora(seed=SEED), 0, by_rank),
    "altqr": (lambda rank: altqr(seed=SEED), 0, by_rank),
    "fedex": (fedex, EXTRA, of_whole),
    "flora": (lambda rank: flora(rank, SEED), EXTRA, of_whole),
}
INEXACT: Mapping[str, Play] = {
    "fedavg": (lambda rank: fedavg(), 0, of_held),
    "hetlora": (lambda rank: hetlora(), 0, by_norm),
    "flexlora": (lambda rank: flexlora(), 0, of_held),
}
