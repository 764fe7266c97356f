"""What an aggregation rule is: pure functions around a state.

One round, in the coordinator's hands:

    adapter = rule.open(state, adapter, number)      what is sent out; the same product B A
    part    = rule.part(spec, number, name, limit)   what client `name` trains and sends
    state, merged = rule.merge(state, adapter, deltas)

`merge` takes the deltas of one round as an iterable: a rule that can holds one accumulator,
so that its memory does not grow with the number of clients. Rules compose by wrapping: see
fedjax's `FederatedAlgorithm` for the idea.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from anabranch.protocols.adapter import WHOLE, Adapter, Delta
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a round's deltas came to."""

    adapter: Adapter  # the next global adapter
    num_examples: int  # Σ n_k
    clients: int
    # ‖Σ p_k B_k A_k − B A‖_F / ‖Σ p_k B_k A_k‖_F over all adapted layers, B A the merged product;
    # None where the coordinator cannot see it.
    error: float | None = None


def keep_adapter(state: object, adapter: Adapter, number: int) -> Adapter:
    """Send out the global adapter as it is."""
    return adapter


def train_all(spec: AdapterSpec, number: int, client: str, limit: int) -> Part:
    """Let every client train everything its rank allows: the first `limit` rank indices."""
    return WHOLE if limit >= spec.rank else Part(ranks=tuple(range(limit)))


@dataclass(frozen=True, kw_only=True)
class Rule(Generic[S]):
    """An aggregation rule; rounds are numbered from 1.

    init    (first adapter) -> (state, adapter as the rule wants it; same product)
    open    (state, adapter, round) -> the adapter to send out; same product
    part    (spec, round, client's name, highest rank it can train) -> what it trains and sends
    merge   (state, adapter sent out, deltas) -> (state, merged)
    """

    name: str
    init: Callable[[Adapter], tuple[S, Adapter]]
    merge: Callable[[S, Adapter, Iterable[Delta]], tuple[S, Merged]]
    open: Callable[[S, Adapter, int], Adapter] = keep_adapter
    part: Callable[[AdapterSpec, int, str, int], Part] = train_all
    # Factors of different rounds have different gauges: what was computed from earlier ones
    # (server moments, late deltas) means nothing in this one.
    regauges: bool = False
    # A client with a low rank gets the adapter cut down to its part (Adapter.only); otherwise
    # it gets all of it, and trains its part of it.
    truncates: bool = False
