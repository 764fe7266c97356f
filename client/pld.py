"""ε a second time, by another method and another library: the ledger's cross-check.

dp-accounting (Google) composes privacy loss distributions, discretised by connect-the-dots
(Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022, arXiv:2207.04380). Rounding losses up gives a
bound from above, rounding them down one from below. Opacus composes privacy loss random variables
(privacy.py) and has an interval of its own. The truth lies in both intervals, so they must
overlap: if not, one of the two accountants is wrong about these events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from anabranch.client.privacy import Spend, epsilon_bounds, merged

INTERVAL = 1e-4  # width of a cell of privacy loss: dp-accounting's default


@dataclass(frozen=True, kw_only=True)
class Compared:
    """(low, high) of ε by both accountants at one δ."""

    delta: float
    prv: tuple[float, float]
    pld: tuple[float, float]

    @property
    def agree(self) -> bool:
        """Return whether one ε can be the truth for both."""
        return self.prv[0] <= self.pld[1] and self.pld[0] <= self.prv[1]


def compare(spends: Iterable[Spend], delta: float) -> Compared:
    """Return ε of all `spends` together by both accountants."""
    history = list(spends)
    return Compared(delta=delta, prv=epsilon_bounds(history, delta), pld=pld_bounds(history, delta))


def pld_bounds(spends: Iterable[Spend], delta: float) -> tuple[float, float]:
    """Return (low, high) between which dp-accounting guarantees the true ε to lie."""
    history = list(spends)
    if not history:
        return 0.0, 0.0
    low, high = (
        float(_composed(history, pessimistic).get_epsilon_for_delta(delta))
        for pessimistic in (False, True)
    )
    return low, high


def _composed(spends: Iterable[Spend], pessimistic: bool) -> Any:
    """Return the privacy loss distribution of all spends, add or remove one record."""
    from dp_accounting import NeighboringRelation  # here and not above: half a second
    from dp_accounting.pld import privacy_loss_distribution as pld

    composed: Any = None
    for sigma, rate, steps in merged(spends):
        one = pld.from_gaussian_mechanism(
            sigma,
            pessimistic_estimate=pessimistic,
            value_discretization_interval=INTERVAL,
            use_connect_dots=pessimistic,  # it has no bound from below
            sampling_prob=rate,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        ).self_compose(steps)
        composed = one if composed is None else composed.compose(one)
    return composed
