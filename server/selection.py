"""Who is asked in a round: draws over names, and tiers of equal speed.

Notation: n connected sites, a cohort of K, m tiers, o the over-selection.

    over-selection   ceil(K (1 + o)) sites are asked, the first K deltas count (Bonawitz et al.
                     2019, arXiv:1902.01046, section 2.2). The K that are drawn without it are
                     among them: with equal answers, a round never lasts longer than without.
    tiers            sites are sorted by the time they took to answer, and cut into m tiers; in
                     every round one tier is drawn, and the cohort from it (TiFL, Chai et al. 2020,
                     arXiv:2001.09249, section 4.2, with static chances). A round then waits for
                     the slowest of a tier and not for the slowest of all.

TiFL measures everybody before the first round. Here a site is measured whenever it is asked, and
those that never were are a group beside the tiers. A group is drawn with its share of the sites,
so every site has the same chance to be asked, K / n, whatever its speed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


def asked_for(cohort: int, over_selection: float) -> int:
    """Return ceil(K (1 + o)): how many sites are asked for K deltas."""
    return math.ceil(round(cohort * (1 + over_selection), 9))  # 10 · 1.1 is not quite 11


def draw(names: Sequence[str], size: int, more: int, rng: np.random.Generator) -> list[str]:
    """Return `size` names and then `more` others, at most all, in the order of `names`.

    For one state of `rng`, who is drawn with fewer `more` is among those drawn with more.
    """
    if size + more >= len(names):
        return list(names)
    chosen = rng.choice(len(names), size=size, replace=False)
    rest = np.delete(np.arange(len(names)), chosen)
    others = rng.permutation(rest)[:more] if more else rest[:0]
    return [names[i] for i in sorted([*chosen.tolist(), *others.tolist()])]


class Latencies:
    """How long each site took to answer, in seconds, as the coordinator measured it."""

    def __init__(self) -> None:
        self.times: dict[str, tuple[int, float]] = {}  # site -> (answers, seconds in all)

    def take(self, site: str, seconds: float) -> None:
        """Add one measurement; of a site that was not waited for, how long it was."""
        count, total = self.times.get(site, (0, 0.0))
        self.times[site] = count + 1, total + seconds

    def means(self, names: Sequence[str]) -> dict[str, float]:
        """Return the mean seconds of those of `names` that were measured."""
        found = {name: self.times[name] for name in names if name in self.times}
        return {name: total / count for name, (count, total) in found.items()}


def tiers(seconds: Mapping[str, float], count: int, least: int) -> list[list[str]]:
    """Return at most `count` tiers of `least` names or more, fastest first; equal sizes to one.

    Fewer than `least` names are one tier; without any there is none.
    """
    if not seconds:
        return []
    order = sorted(seconds, key=lambda name: (seconds[name], name))
    number = max(1, min(count, len(order) // least))
    return [[order[i] for i in part] for part in np.array_split(np.arange(len(order)), number)]


def draw_tier(
    names: Sequence[str], groups: Sequence[Sequence[str]], size: int, rng: np.random.Generator
) -> list[str]:
    """Return `size` of `names` from one of the groups, in the order of `names`.

    `groups` cut `names` into disjoint parts. Each is drawn with its share of the names; one that
    is smaller than `size` is filled up from the others.
    """
    if size >= len(names):
        return list(names)
    shares = np.array([len(group) for group in groups]) / len(names)
    group = set(groups[int(rng.choice(len(groups), p=shares))])
    inside = [name for name in names if name in group]
    outside = [name for name in names if name not in group]
    chosen = set(draw(inside, min(size, len(inside)), 0, rng))
    chosen |= set(draw(outside, size - len(chosen), 0, rng))
    return [name for name in names if name in chosen]
