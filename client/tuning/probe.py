"""What an audit sees of private training, and puts into it: see fit_private."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Probe(Protocol):
    """Canaries that train beside the records, and an observer of what is published.

    Canary i stands behind the records as record n + i: it is drawn by the same sampler, and its
    gradient passes the same clipping, sum, noise and optimiser as a record's.
    """

    count: int  # canaries that take part

    def gradients(self, drawn: Sequence[int], size: int) -> Tensor:
        """Return the gradients of the canaries drawn for a step, (len(drawn), size) float32.

        Indices are 0 … count − 1; `size` is the number of trained values, tensors in ascending
        order of names, flattened.
        """

    def observe(self, records: int, gradients: Mapping[str, Tensor]) -> None:
        """See one step: how many records (canaries included) it drew, and the noisy mean."""
