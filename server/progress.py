"""A run between two rounds, or between a merge and its evaluation: enough to go on from.

A round ends in two steps, and a Progress is handed out after each:

    merge ─► Progress(evaluated=False) ─► checkpoint ─► evaluate ─► Progress(evaluated=True)

Whoever keeps the last one can start the coordinator anew: what was merged is never asked for
again, and every noisy mean of a client-private run leaves at most once, because it is kept
before anything of it is written. What was under way is not in it: a round that was not merged is
asked again from its beginning, and what its sites still say to the old questions is dropped.

Sites are asked as often as that takes. Most of what a site does depends on its records and on what
it was sent, so it answers the same. Three things go on from the first answer: the error-feedback
memory, tensors that a method keeps at the site (fedsa, a local head) with the private adapter,
and the privacy ledger, in which a round that is trained twice counts twice, so that a later one
may be refused.

An update is given to one secure sum: a Progress says so before the first site is asked for a masked
vector. Whoever goes on from one whose `masked` is above its `round` has lost that round, and begins
the next one with the adapter unchanged: another sum of the same updates would show a difference.

A Progress holds values only, no connection, file, clock or key. Once handed out it does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anabranch.protocols.adapter import Adapter
from anabranch.server.result import RoundReport, SiteRow


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a coordinator has done so far."""

    run: str  # identity of the run
    config: str  # digest of its configuration
    round: int = 0  # the last one that was merged (or lost); 0: none
    masked: int = 0  # the last one whose masked vectors were about to be asked for; 0: none
    adapter: Adapter  # after that round
    state: Any  # the rule's: server moments, residuals, noisy rounds made; a value
    history: tuple[RoundReport, ...] = ()  # one per merged round
    evaluated: bool = True  # False: the last round has no checkpoint and no evaluation yet
    num_examples: int = 0  # behind the last merge
    best: Adapter
    best_round: int = 0
    best_score: float | None = None
    sites: Mapping[str, SiteRow]
    met: frozenset[str] = frozenset()  # client-private: every client that was ever connected
    latencies: Mapping[str, tuple[int, float]] = field(default_factory=dict)  # of tiers
    seconds: float = 0.0
