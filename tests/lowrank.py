"""Random adapters of layers that are not square, and explicit out × in products to judge by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import WHOLE, Adapter, Delta
from anabranch.protocols.part import Part
from anabranch.protocols.spec import LORA_A, LORA_B, AdapterSpec

LAYERS = {"k": (7, 5), "q": (4, 9)}  # name -> (out, in)
Dense = dict[str, NDArray[np.float64]]


def spec_of(rank: int, layers: Mapping[str, tuple[int, int]] = LAYERS) -> AdapterSpec:
    tensors: dict[str, tuple[int, ...]] = {"head.bias": (3,), "head.weight": (3, 4)}
    for name, (out, inside) in layers.items():
        tensors |= {name + LORA_A: (rank, inside), name + LORA_B: (out, rank)}
    return AdapterSpec(
        base="0" * 64,
        tokenizer="",
        rank=rank,
        alpha=2.0 * rank,
        targets=tuple(sorted(layers)),
        tensors=tuple(sorted(tensors.items())),
    )


def random_adapter(spec: AdapterSpec, seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    return Adapter(spec, {n: rng.standard_normal(s).astype(np.float32) for n, s in spec.tensors})


def random_delta(spec: AdapterSpec, seed: int, part: Part = WHOLE, num_examples: int = 1) -> Delta:
    rng = np.random.default_rng([seed, 1])
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in part.shapes(spec).items()}
    return Delta(spec, arrays, num_examples, part=part)


def dense_products(adapter: Adapter, ranks: slice | Sequence[int] = slice(None)) -> Dense:
    """Return name -> B A of an adapter, as out × in matrices."""
    at = ranks if isinstance(ranks, slice) else list(ranks)
    return {
        module: adapter.arrays[b].astype(np.float64)[:, at]
        @ adapter.arrays[a].astype(np.float64)[at]
        for module, a, b in adapter.spec.factors()
    }


def client_products(sent: Adapter, delta: Delta, *, cut: bool) -> Dense:
    """Return (B + ΔB)(A + ΔA); with `cut`, of the ranks in the delta's part alone."""
    ranks = delta.part.ranks if cut else None
    at = slice(None) if ranks is None else list(ranks)
    change, result = delta.full(), {}
    for module, a, b in sent.spec.factors():
        left = sent.arrays[b].astype(np.float64) + change[b]
        right = sent.arrays[a].astype(np.float64) + change[a]
        result[module] = left[:, at] @ right[at]
    return result


def mean_products(
    sent: Adapter, deltas: Sequence[Delta], weights: Sequence[float], *, cut: bool
) -> Dense:
    """Return Σ p_k B_k A_k."""
    total = {module: np.zeros(0) for module in sent.spec.targets}
    for delta, weight in zip(deltas, weights, strict=True):
        for module, product in client_products(sent, delta, cut=cut).items():
            total[module] = (
                total[module] + weight * product if total[module].size else (weight * product)
            )
    return {module: product / sum(weights) for module, product in total.items()}


def distance(one: Dense, other: Dense) -> float:
    """Return ‖one − other‖_F / ‖one‖_F over all layers together."""
    missed = sum(float(np.sum((one[name] - other[name]) ** 2)) for name in one)
    return float(np.sqrt(missed / sum(float(np.sum(a**2)) for a in one.values())))
