"""How a cohort is cut into micro-cohorts.

Batching clients saves the cost of many small operations. It pays until the rows of a micro-cohort
(clients × records of a batch × tokens of a record) fill the matrix kernels, and costs time
when its activations, or the clients' own values, no longer fit the processor's caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROWS = 2048  # of a micro-cohort, for narrow models
ROWS_WIDE = 1024  # from width WIDE on: fewer rows fill the kernels
WIDE = 128
VALUES = 1 << 20  # trained values of a micro-cohort: 4 MiB each for values, gradient and moments


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one client asks of a round."""

    steps: int
    rows: int  # per step: records of a batch × tokens of a record


def micro_cohorts(work: Sequence[Work], *, width: int, values: int) -> list[list[int]]:
    """Return the clients of every micro-cohort, by index: most steps first in each.

    `width` is the model's, `values` how many values each client trains. Clients of like work
    stand together, so that few rows are padding and few leave before the others.
    """
    limit = ROWS_WIDE if width >= WIDE else ROWS
    most = max(1, VALUES // max(values, 1))
    cohorts: list[list[int]] = []
    rows = 0  # of the widest client in the last cohort
    for i in sorted(range(len(work)), key=lambda i: (-work[i].steps, -work[i].rows, i)):
        rows = max(rows, work[i].rows)
        last = cohorts[-1] if cohorts else []
        if not last or len(last) >= most or (len(last) + 1) * rows > limit:
            cohorts.append([i])
            rows = work[i].rows
        else:
            last.append(i)
    return cohorts
