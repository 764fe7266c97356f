"""What an aggregation rule is: two pure functions around a state.

A rule takes the deltas of one round as an iterable and holds one accumulator, so its memory
does not grow with the number of clients. Rules compose by wrapping: see fedjax's
`FederatedAlgorithm` for the idea.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from anabranch.protocols.adapter import Delta

S = TypeVar("S")


@dataclass(frozen=True)
class Aggregator(Generic[S]):
    """`init()` makes the state; `apply(state, deltas)` returns the next state and the update.

    The update is added to the global adapter as it is.
    """

    init: Callable[[], S]
    apply: Callable[[S, Iterable[Delta]], tuple[S, Delta]]
