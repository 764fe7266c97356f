"""Bounds of a statement as text: rounded up, never down; and what its numbers are called."""

from __future__ import annotations

from decimal import ROUND_CEILING, Context, Decimal

LEGEND = (
    "ε (epsilon): bound on the privacy loss; smaller is more private",
    "δ (delta): chance with which the bound on ε may fail",
    "σ: standard deviation of the noise, over the clipping norm C",
    "q: chance that a record is in the batch of one step",
    "steps: noisy gradient steps of this run whose result counted",
    "ε, all runs: the most that any of these records has spent over all runs, as the site's ledger "
    "says; ε, this run: computed by the coordinator from σ, q and steps",
    "engine: which code computed the gradients; ledger head: the last hash of the site's "
    "hash-chained ledger, in full in summary.json, by which the site can show that its ledger was "
    "not changed since",
)


def upper(bound: float, digits: int = 3) -> str:
    """Return an upper bound with so many digits after the point, rounded up."""
    return str(Decimal(repr(bound)).quantize(Decimal(1).scaleb(-digits), ROUND_CEILING))


def small(bound: float) -> str:
    """Return an upper bound with three digits, rounded up."""
    return f"{float(Context(prec=3, rounding=ROUND_CEILING).create_decimal(repr(bound))):.3g}"


def percent(share: float) -> str:
    """Return a share rounded up to a tenth of a percent: it is a bound."""
    tenths = -int(-1000 * share // 1)
    return f"{min(tenths, 1000) / 10:.1f} %"
