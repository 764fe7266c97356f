"""What a run in virtual time came to: time to accuracy, waste, bytes, energy, CO₂, fairness.

A device's seconds are those of its download, training and upload, whether or not they led to
anything. Wasted are the seconds of requests to train whose delta was not merged, by what became
of it (log.py). Evaluations cost, too, and are listed apart: they are no waste.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.simulations.clock.fairness import participation
from anabranch.simulations.clock.journeys import DeviceJourneys
from anabranch.simulations.clock.log import KINDS, OUTCOMES, Log, RoundTimes
from anabranch.simulations.population.devices import Devices


@dataclass(frozen=True, kw_only=True, eq=False)
class VirtualOutcome:
    """A run in virtual time; all seconds are virtual."""

    seconds: float  # until the end of the last round
    rounds: tuple[RoundTimes, ...]
    log: Log  # every message, one row each
    merged: NDArray[np.int64]  # (clients,) merged deltas of each client
    metric: str  # that `time_to` is of
    time_to: dict[float, float | None]  # target -> seconds; None: never reached
    answers: dict[str, int]  # outcome of a request to train -> how many
    device_seconds: float  # of all requests to train
    wasted: dict[str, float]  # outcome -> its share of device_seconds; all but "merged"
    bytes_down: int  # of all messages
    bytes_up: int
    bytes_wasted: int  # of requests to train that were not merged, both directions
    joules: float  # of all messages
    joules_wasted: float
    grams: dict[str, float]  # region -> grams of CO₂-equivalents; only where there are devices
    evaluation: dict[str, float]  # "seconds" and "joules" of all evaluations
    participation: dict[str, Any]  # fairness.py
    trained: int  # requests that the simulator trained
    trained_in_vain: int  # of those, not merged

    @property
    def wasted_share(self) -> float:
        """Return the share of device seconds that was not merged."""
        return sum(self.wasted.values())

    def summary(self) -> dict[str, Any]:
        """Return everything but the arrays, as summary.json takes it."""
        return {
            "virtual_seconds": self.seconds,
            "rounds": len(self.rounds),
            "metric": self.metric,
            "time_to": {f"{target:g}": at for target, at in self.time_to.items()},
            "answers": self.answers,
            "device_seconds": self.device_seconds,
            "wasted_share": self.wasted_share,
            "wasted": self.wasted,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "bytes_wasted": self.bytes_wasted,
            "joules": self.joules,
            "joules_wasted": self.joules_wasted,
            "co2_grams": sum(self.grams.values()),
            "co2_grams_by_region": self.grams,
            "evaluation": self.evaluation,
            "participation": self.participation,
            "trained": self.trained,
            "trained_in_vain": self.trained_in_vain,
        }

    def round_table(self) -> dict[str, list[Any]]:
        """Return one row per round, by column: times, and the metric if there is one."""
        merged_in, train = self.log["merged_in"], self.log.where(kind="train")
        sent = self.log["round"]
        return {
            "round": [one.round for one in self.rounds],
            "started_at": [one.started_at for one in self.rounds],
            "merged_at": [one.merged_at for one in self.rounds],
            "ended_at": [one.ended_at for one in self.rounds],
            "asked": [int((train & (sent == one.round)).sum()) for one in self.rounds],
            "merged": [int((merged_in == one.round).sum()) for one in self.rounds],
            self.metric: [_reached(one, self.metric)[0] for one in self.rounds],
        }

    def message_table(self) -> dict[str, NDArray[Any]]:
        """Return one row per message, by column (log.py)."""
        return self.log.table()


def outcome_of(
    journeys: DeviceJourneys, targets: Sequence[float] = (), metric: str = "accuracy"
) -> VirtualOutcome:
    """Return what a finished run came to."""
    return outcome(journeys.log(), journeys.rounds(), journeys.devices, targets, metric)


def outcome(
    log: Log,
    rounds: Sequence[RoundTimes],
    devices: Devices,
    targets: Sequence[float] = (),
    metric: str = "accuracy",
) -> VirtualOutcome:
    """Return the same from its parts."""
    train, done = log.where(kind="train"), log["merged_in"] > 0
    lost, seconds, size = train & ~done, log.seconds, log["bytes_down"] + log["bytes_up"]
    total = float(seconds[train].sum())
    answers = {name: int((train & log.where(outcome=name)).sum()) for name in OUTCOMES}
    spent = {
        name: float(seconds[train & log.where(outcome=name)].sum())
        for name in answers
        if name != "merged"
    }
    evaluated = log["kind"] == KINDS.index("evaluate")
    merged = np.bincount(log["client"][done], minlength=len(devices)).astype(np.int64)
    return VirtualOutcome(
        seconds=max((one.ended_at for one in rounds), default=0.0),
        rounds=tuple(rounds),
        log=log,
        merged=merged,
        metric=metric,
        time_to={target: time_to(rounds, metric, target) for target in targets},
        answers={name: count for name, count in answers.items() if count},
        device_seconds=total,
        wasted={name: value / total for name, value in spent.items() if value},
        bytes_down=int(log["bytes_down"].sum()),
        bytes_up=int(log["bytes_up"].sum()),
        bytes_wasted=int(size[lost].sum()),
        joules=float(log["joules"].sum()),
        joules_wasted=float(log["joules"][lost].sum()),
        grams=_by_region(log, devices),
        evaluation={
            "seconds": float(seconds[evaluated].sum()),
            "joules": float(log["joules"][evaluated].sum()),
        },
        participation=participation(merged, devices.kind, devices.kinds),
        trained=int((train & log["computed"]).sum()),
        trained_in_vain=int((lost & log["computed"]).sum()),
    )


def time_to(rounds: Sequence[RoundTimes], metric: str, target: float) -> float | None:
    """Return the first virtual time at which the metric is `target` or better; None: never.

    The coordinator's metric is there when a round is merged, the clients' when it has ended.
    """
    for one in rounds:
        value, at = _reached(one, metric)
        if value is not None and value >= target:
            return at
    return None


def _reached(one: RoundTimes, metric: str) -> tuple[float | None, float]:
    if metric in one.coordinator:
        return one.coordinator[metric], one.merged_at
    return one.client.get(metric), one.ended_at


def _by_region(log: Log, devices: Devices) -> dict[str, float]:
    """Return region -> grams of CO₂-equivalents, of regions that devices are in."""
    region = devices.region[log["client"]] if len(log) else np.zeros(0, np.int16)
    sums = np.bincount(region, weights=log["grams"], minlength=len(devices.regions))
    there = set(devices.region.tolist())
    return {name: float(sums[i]) for i, name in enumerate(devices.regions) if i in there}
