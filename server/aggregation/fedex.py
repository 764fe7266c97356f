"""FedEx-LoRA: averaged factors, and what averaging misses in an extra frozen adapter.

Notation: p_k = w_k / Σ w; the adapter's rank indices 0 … r−1 are trained (factors B, A), r … R−1
are the extra adapter (factors E, F), which every client has and none trains; C is carried by the
server alone.

    B <- Σ p_k B_k        A <- Σ p_k A_k
    X = E F + C + Σ p_k B_k A_k − B A        E F <- the best rank-(R − r) part of X, C <- the rest

(Singhal et al., ACL 2025, arXiv:2410.09432: there the residual is added to the frozen base
weights. Here the base is never written, so the adapter stays what is released.) The residual
is taken against B and A as they are in float32, so that their rounding is in it. Exact while
X fits in R − r ranks; what does not fit is offered again in the next round (error feedback).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import ConfigError, IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.aggregation.mean import Sum
from anabranch.server.aggregation.products import (
    Product,
    Products,
    ProductSum,
    Weighting,
    difference,
    products_of,
    relative_error,
    stacked,
    trained_products,
    weight_of,
    with_products,
)
from anabranch.server.aggregation.rule import Merged, Rule


@dataclass(frozen=True, eq=False)
class Carried:
    """What did not fit the extra adapter so far, by layer; at most min(out, in) columns."""

    products: Products = field(default_factory=dict)


def fedex(rank: int, weighting: Weighting = "examples") -> Rule[Carried]:
    """Return FedEx-LoRA for adapters of which the first `rank` rank indices are trained.

    Guarantees: Merged.error, measured against Σ p_k B_k A_k with everything the clients had, is
    float32 rounding (below 1e-6) while the extra ranks suffice and nothing is carried; memory
    does not grow with the number of clients. FedEx-LoRA is for equal ranks: `part` raises
    ConfigError for a client that cannot train `rank`; `init` raises ValueError for an adapter
    without extra ranks; `merge` raises IncompatibleAdapter for a delta of another part.
    """
    require_positive(rank)

    def init(adapter: Adapter) -> tuple[Carried, Adapter]:
        require_extra(adapter.spec, rank)
        return Carried(), adapter

    def part(spec: AdapterSpec, number: int, client: str, limit: int) -> Part:
        if limit < rank:
            raise ConfigError(
                f"{client}: trains ranks up to {limit}, fedex averages clients of equal rank, here "
                f"{rank}: lower lora.rank to {limit}, set federation.mixed_ranks = true, or take "
                'federation.method = "altqr", "flexlora", "hetlora" or "flora"'
            )
        return Part(ranks=tuple(range(rank)))

    def merge(carried: Carried, sent: Adapter, deltas: Iterable[Delta]) -> tuple[Carried, Merged]:
        mean, total, trained = Sum(), ProductSum(), slice(rank)
        for delta in deltas:
            _require_trained(delta, rank)
            weight = weight_of(delta, weighting)
            mean.add(delta, weight)
            total.add(weight, trained_products(sent, delta, trained))
        averaged = sent.plus(mean.delta())
        wanted, got = total.mean(), products_of(averaged, trained)
        residual = {module: difference(wanted[module], got[module]) for module in wanted}
        return with_extra(sent, averaged, rank, residual, wanted, carried, mean)

    return Rule(name="fedex", init=init, part=part, merge=merge, regauges=True)


def with_extra(
    sent: Adapter,
    adapter: Adapter,
    rank: int,
    more: Mapping[str, Product],
    wanted: Mapping[str, Product],
    carried: Carried,
    mean: Sum,
) -> tuple[Carried, Merged]:
    """Add `more` and what is carried to the adapter's extra ranks; carry on what does not fit.

    The error is against the extra ranks that were sent out plus `wanted` = Σ p_k B_k A_k.
    """
    extra, rest, every = {}, {}, {}
    for module, before in products_of(sent, slice(rank, None)).items():
        terms = [before, more[module]]
        if module in carried.products:
            terms.append(carried.products[module])
        extra[module], rest[module] = stacked(terms).split(adapter.spec.rank - rank)
        every[module] = stacked([wanted[module], before])
    merged = with_products(adapter, extra, slice(rank, None))
    return Carried(rest), Merged(
        adapter=merged,
        num_examples=mean.num_examples,
        clients=mean.clients,
        error=relative_error(every, products_of(merged)),
    )


def require_positive(rank: int) -> None:
    """Raise ValueError unless rank >= 1."""
    if rank < 1:
        raise ValueError(f"expected rank >= 1, got {rank}")


def require_extra(spec: AdapterSpec, rank: int) -> None:
    """Raise ValueError unless the adapter has ranks beyond those that are trained."""
    if spec.rank <= rank:
        raise ValueError(
            f"expected an adapter of more than the {rank} ranks that are trained, got rank "
            f"{spec.rank}: make it of RunConfig.adapter, not of RunConfig.lora"
        )


def _require_trained(delta: Delta, rank: int) -> None:
    if delta.part.factors != "both" or delta.part.ranks != tuple(range(rank)):
        raise IncompatibleAdapter(
            f"delta is of {delta.part}, expected both factors of ranks 0 to {rank - 1}"
        )
