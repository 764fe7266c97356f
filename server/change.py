"""How far a round moved the global adapter."""

from __future__ import annotations

import math

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.part import Part
from anabranch.protocols.spec import require_same_spec
from anabranch.server.aggregation.products import difference, norm, products_of

DENSE = Part(factors="none")


def update_norm(sent: Adapter, merged: Adapter, *, regauged: bool) -> float:
    """Return ‖merged − sent‖ over all values; with `regauged`, what does not depend on the gauge.

    That is ( Σ over layers ‖B' A' − B A‖_F² + ‖change of the dense tensors‖² )^½, without the
    factor alpha / rank: a rule that writes the factors anew may leave every product as it was
    while each of their values changes. Raises IncompatibleAdapter unless the specs are equal.
    """
    if not regauged:
        return merged.minus(sent, num_examples=0).norm()
    require_same_spec(sent.spec, merged.spec)
    before, after = products_of(sent), products_of(merged)
    layers = norm({name: difference(after[name], before[name]) for name in before})
    dense = merged.minus(sent, num_examples=0, part=DENSE).norm() if DENSE.names(sent.spec) else 0.0
    return math.hypot(layers, dense)
