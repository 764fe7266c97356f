"""That updates are being masked is kept before anybody is asked for a masked vector."""

from __future__ import annotations

from typing import Any

from anabranch.protocols.secagg.member import Answer, Limits
from anabranch.server.progress import Progress
from tests.secure_cases import SummingToy, secured
from tests.simulations.federation import Federation
from tests.simulations.rig import SIZES, config

NONE = Limits()


def test_a_coordinator_that_dies_at_any_time_knows_which_updates_were_given_away() -> None:
    """Sites give them to no second sum: without that a run that goes on would ask in vain."""
    kept: list[Progress] = []
    known: dict[str, set[int]] = {}

    class Looks(SummingToy):
        def secure(self, assignment: Any, request: Any, limits: Limits = NONE) -> Answer:
            known.setdefault(request.stage, set()).add(kept[-1].masked if kept else 0)
            return super().secure(assignment, request, limits)

    sites = [Looks(name, size) for name, size in SIZES.items()]
    run = secured(config(rounds=1, client_evaluation=False))
    Federation(sites, run=run, progress=kept.append).run()

    assert known == {"advertise": {0}, "share": {0}, "mask": {1}, "agree": {1}, "reveal": {1}}
