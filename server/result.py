"""What is known about a run and its rounds afterwards: plain values, no behaviour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.messages import Evaluated, Trained
from anabranch.server.flower import Failure


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One round that reached its quorum."""

    round: int
    asked: tuple[str, ...]  # sites, ascending
    trained: Mapping[str, Trained]
    failed: Mapping[str, Failure]
    method: str  # the aggregation rule's name
    update_norm: float  # of what the round changed; see server/change.py
    aggregation_error: float | None  # server/aggregation/rule.py; None: not visible
    delta_norms: Mapping[str, float]  # site -> ‖its delta‖
    ages: Mapping[str, int]  # site -> rounds its delta was late; only what is not 0
    evaluated: Mapping[str, Evaluated]  # on the sites' held-out records
    client: Mapping[str, float]  # their mean, weighted by records; {} if nobody evaluated
    coordinator: Mapping[str, float]  # on the coordinator's own records; {} if it has none
    bytes_up: int
    bytes_down: int
    seconds: float

    @property
    def score(self) -> float | None:
        """Return the accuracy by which rounds are compared, the coordinator's if there is one."""
        return self.coordinator.get("accuracy", self.client.get("accuracy"))


class SiteRow(msgspec.Struct, frozen=True, kw_only=True):
    """One site over the whole run."""

    rounds: int = 0  # deltas that counted
    failures: int = 0  # refused, rejected, failed, or silent until the deadline
    late: int = 0  # answers that came after their deadline; dropped
    stale: int = 0  # deltas that counted in a later round than they were asked for
    max_rank: int | None = None  # highest LoRA rank it trains; None: no limit
    num_examples: int | None = 0  # None: not said, its updates went into secure sums
    bytes_up: int = 0  # frames and messages, without Flower's own overhead
    bytes_down: int = 0
    seconds: float = 0.0  # of local training
    epsilon: float | None = None  # (ε, δ) spent on its records, as it says
    delta: float | None = None
    noise_multiplier: float | None = None  # σ, q and steps of its last delta that counted
    sample_rate: float | None = None
    steps: int = 0
    engine: str | None = None  # that clipped the gradients of a private run
    ledger: str | None = None  # head of its hash-chained ledger after that delta, hex

    def plus(self, **counts: float) -> SiteRow:
        """Return this row with `counts` added."""
        changed = {name: getattr(self, name) + value for name, value in counts.items()}
        return msgspec.structs.replace(self, **changed)

    def after(self, trained: Trained) -> SiteRow:
        """Return this row after one more delta that counted."""
        return msgspec.structs.replace(
            self,
            rounds=self.rounds + 1,
            seconds=self.seconds + trained.seconds,
            num_examples=trained.num_examples or None,  # 0 is no number of records
            epsilon=trained.epsilon,
            delta=trained.delta,
            noise_multiplier=trained.noise_multiplier,
            sample_rate=trained.sample_rate,
            steps=trained.steps,
            engine=trained.engine,
            ledger=trained.ledger,
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run."""

    adapter: Adapter  # after the last round
    best_adapter: Adapter
    best_round: int
    history: tuple[RoundReport, ...]
    sites: Mapping[str, SiteRow]
    bytes_up: int
    bytes_down: int
    seconds: float


def mean_metrics(evaluated: Iterable[Evaluated]) -> dict[str, float]:
    """Return Σ n_k m_k / Σ n_k for every metric, over the sites that report it."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for one in evaluated:
        for name, value in one.metrics.items():
            sums[name] = sums.get(name, 0.0) + one.num_examples * value
            counts[name] = counts.get(name, 0) + one.num_examples
    return {name: sums[name] / counts[name] for name in sorted(sums)}
