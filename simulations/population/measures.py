"""What a population is like, in numbers: labels per client, histograms, who is online when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from anabranch.simulations.population.devices import Flags, Floats, Ints
from anabranch.simulations.population.table import Built

WEEK_HOURS: Final = 168


@dataclass(frozen=True)
class Histogram:
    """Counts per bin and class, and the names of both; edges (bins + 1,)."""

    edges: tuple[float, ...]
    names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]  # class by class


def label_counts(built: Built, num_labels: int) -> Ints:
    """Return how many records of each label each client has, (clients, labels)."""
    partition = built.partition
    owner = np.repeat(np.arange(len(partition)), np.diff(partition.start))
    key = owner * num_labels + built.records.labels[partition.rows]
    counts: Ints = np.bincount(key, minlength=len(partition) * num_labels).astype(np.int64)
    return counts.reshape(len(partition), num_labels)


def online_hours(built: Built) -> Flags:
    """Return who is online at half past each hour of the first week, (168, clients)."""
    everyone = np.arange(len(built.partition))
    if built.availability is None:
        return np.ones((WEEK_HOURS, len(everyone)), np.bool_)
    online = built.availability.online
    return np.stack([online(everyone, (hour + 0.5) * 3600.0) for hour in range(WEEK_HOURS)])


def shares_of(online: Flags, group: NDArray[np.integer], num_groups: int) -> Floats:
    """Return the share of each group that is online, hour by hour, (groups, hours).

    `group` (clients,) is each client's; a group without clients has 0.
    """
    sizes = np.maximum(np.bincount(group, minlength=num_groups), 1)
    counts = np.stack([np.bincount(group, hour, num_groups) for hour in online], axis=1)
    shares: Floats = counts / sizes[:, None]
    return shares


def histogram(
    values: Floats, kind: NDArray[np.integer], names: Sequence[str], *, bins: int = 16
) -> Histogram:
    """Return how many values of each class lie in bins that are equal on a log scale.

    Edges are 1, 1.5, 2, 3, 5, 7 · 10^k, thinned until there are at most `bins`. Needs values > 0.
    """
    low, high = float(values.min()), float(values.max())
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        edges = [s * 10.0**k for k in range(first, last + 1) for s in steps]
        begin = max(i for i, edge in enumerate(edges) if edge <= low * (1 + 1e-9))
        end = min((i for i, edge in enumerate(edges) if edge > high), default=len(edges))
        if end - begin <= bins:
            break
    edges = [*edges[begin:end], edges[end] if end < len(edges) else 10.0 ** (last + 1)]
    place = np.clip(np.searchsorted(edges, values * (1 + 1e-9), side="right") - 1, 0, None)
    counts = np.zeros((len(names), len(edges) - 1), np.int64)
    np.add.at(counts, (kind, np.minimum(place, len(edges) - 2)), 1)
    return Histogram(tuple(edges), tuple(names), tuple(tuple(row.tolist()) for row in counts))
