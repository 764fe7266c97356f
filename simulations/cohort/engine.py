"""Trains many clients together over one frozen base; the numbers are those of one at a time.

    Locals ─► groups that can be batched ─► micro-cohorts (planner.py) ─► steps ─► Learned
        └──── what cannot be batched, with the reason ─► client/local.train_alone

A micro-cohort runs every step once for all its clients: frozen matrices multiply the rows of all
of them, what is trained is stacked along a first axis. Results equal those of `train_alone` to
rounding, client by client, whatever the cohort is.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from anabranch.client.local import Learned, Local, train_alone
from anabranch.protocols.errors import AnabranchError

log = logging.getLogger(__name__)


class CohortEngine:
    """Trains cohorts. `reasons` counts the clients that were trained alone, by reason."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()

    def train(self, locals: Sequence[Local]) -> list[Learned | AnabranchError]:
        """Return what came of every Local, in order; an error is that client's alone."""
        return [self._alone(local, "cohort training is not built yet") for local in locals]

    def _alone(self, local: Local, reason: str) -> Learned | AnabranchError:
        """Train one client by itself; say why, once per reason."""
        if not self.reasons[reason]:
            log.warning("%s: trained one client at a time: %s", local.name, reason)
        self.reasons[reason] += 1
        try:
            return train_alone(local)
        except AnabranchError as error:
            return error
