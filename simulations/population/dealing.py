"""Dealing records to clients: sizes, mixtures over groups of records, and held-out parts.

Notation: n records in G groups, N clients. counts[i, g] is how many records of group g client i
gets. A group is a label, a stretch of a feature, or all records.

Without `reuse` every record has at most one client. With it, a record may belong to many
clients, but never twice to the same one, and a record that one client holds out is trained on
by nobody: the groups are cut into a part for training and a part to hold out before anything
is dealt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from anabranch.protocols.errors import DataError
from anabranch.simulations.population.clients import Partition
from anabranch.simulations.population.data import Rows
from anabranch.simulations.population.devices import Floats, Ints


@dataclass(frozen=True)
class Dealt:
    """Rows with the client that has each of them: (rows,), (rows,)."""

    rows: Rows
    owner: Ints


def equal_sizes(total: int, clients: int, rng: Generator) -> Ints:
    """Return N sizes that add up to `total` and differ by at most one, in random order."""
    sizes = np.full(clients, total // clients, np.int64)
    sizes[rng.permutation(clients)[: total % clients]] += 1
    return sizes


def skewed_sizes(weights: Floats, total: int, least: int) -> Ints:
    """Return sizes of at least `least` that add up to `total`; the rest is shared by weight.

    Rounding is by largest remainder: each size is within one of its exact share.
    """
    exact = (total - least * len(weights)) * (weights / weights.sum())
    sizes = np.floor(exact).astype(np.int64)
    missing = total - least * len(weights) - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:missing]] += 1
    full: Ints = sizes + least
    return full


def held_sizes(sizes: Ints, holdout: float) -> Ints:
    """Return holdout · size rounded half up, at most size − 1: a client keeps one to train on."""
    held: Ints = np.floor(holdout * sizes + 0.5).astype(np.int64)
    return np.minimum(held, np.maximum(sizes - 1, 0), out=held)


def mixtures(room: Ints, sizes: Ints, alpha: float, rng: Generator, *, reuse: bool) -> Ints:
    """Return counts (N, G): client i draws `sizes[i]` records from its own mixture of groups.

    q_i ~ Dirichlet(α · p), p the groups' shares of all records (Hsu et al. 2019,
    arXiv:1909.06335): α → ∞ makes all clients alike, α → 0 gives each one group. With
    `room` (G,) the records of each group: without `reuse` clients draw in random order and a
    group that is used up leaves their mixtures; with it only what one client may hold is bounded.
    Row i adds up to sizes[i]. Raises DataError if there are not as many records.
    """
    if (sizes > room.sum()).any() or (not reuse and sizes.sum() > room.sum()):
        wanted = int(sizes.max() if reuse else sizes.sum())
        raise DataError(f"population: {wanted} records wanted of {int(room.sum())}")
    shares = rng.dirichlet(alpha * room / room.sum(), len(sizes))
    if len(room) == 1:
        return sizes[:, None].copy()
    counts = np.zeros((len(sizes), len(room)), np.int64)
    if reuse:
        counts = rng.multinomial(sizes, shares)
        for client in np.flatnonzero((counts > room).any(axis=1)):
            counts[client] = _draw(int(sizes[client]), shares[client], room, rng)
        return counts
    left = room.copy()
    for client in rng.permutation(len(sizes)):
        counts[client] = _draw(int(sizes[client]), shares[client], left, rng)
        left -= counts[client]
    return counts


def deal(
    groups: Sequence[Rows], counts: Ints, holdout: float, rng: Generator, *, reuse: bool
) -> Partition:
    """Return the partition in which client i has counts[i, g] records of groups[g].

    About holdout · size of them are held out, label by label (group by group) as far as
    rounding allows. Raises DataError if a group has not as many records.
    """
    held = _held_counts(counts, holdout)
    train_parts, held_parts = [], []
    for g, group in enumerate(groups):
        rows = rng.permutation(group)
        if reuse:
            spare = min(math.floor(holdout * len(rows) + 0.5), len(rows) - 1)
            held[:, g] = np.minimum(held[:, g], spare)
            cut = len(rows) - spare
        else:
            cut = int((counts[:, g] - held[:, g]).sum())
        train_parts.append(_deal_group(rows[:cut], counts[:, g] - held[:, g], rng, reuse))
        held_parts.append(_deal_group(rows[cut:], held[:, g], rng, reuse))
    return assemble(_joined(train_parts), _joined(held_parts), len(counts), rng)


def trainable(room: Ints, holdout: float, *, reuse: bool) -> Ints:
    """Return how many records of each group one client may have (see `deal`)."""
    if not reuse:
        return room
    spared: Ints = np.floor(holdout * room + 0.5).astype(np.int64)
    return np.subtract(room, np.minimum(spared, room - 1), out=spared)


def assemble(train: Dealt, held: Dealt, clients: int, rng: Generator) -> Partition:
    """Return the partition; a client's rows stand in random order, those held out last."""
    rows = np.concatenate([train.rows, held.rows])
    key = np.concatenate([2 * train.owner, 2 * held.owner + 1])
    mixed = rng.permutation(len(rows))
    order = mixed[np.argsort(key[mixed], kind="stable")]
    sizes = np.bincount(key // 2, minlength=clients)
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Partition(rows[order], start, np.bincount(held.owner, minlength=clients))


def _draw(size: int, share: Floats, room: Ints, rng: Generator) -> Ints:
    """Draw `size` records one after the other by `share`, (G,); a group without room is left out.

    What a multinomial draw puts into a full group is drawn again among the others: the same law
    as drawing one by one. If the shares of all that have room are 0, by how much room they have.
    """
    counts = np.zeros(len(room), np.int64)
    while size:
        open_ = room - counts
        weights = np.where(open_ > 0, share, 0.0)
        if not weights.sum() > 0:
            weights = open_.astype(np.float64)
        taken = np.minimum(rng.multinomial(size, weights / weights.sum()), open_)
        counts += taken
        size -= int(taken.sum())
    return counts


def _held_counts(counts: Ints, holdout: float) -> Ints:
    """Return how many of each group are held out, (N, G); rows add up to held_sizes."""
    sizes = counts.sum(axis=1)
    wanted = held_sizes(sizes, holdout)
    exact = counts * (wanted / np.maximum(sizes, 1))[:, None]
    held: Ints = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(held - exact, axis=1, kind="stable")
    extra = np.arange(counts.shape[1])[None, :] < (wanted - held.sum(axis=1))[:, None]
    np.put_along_axis(held, order, np.take_along_axis(held, order, axis=1) + extra, axis=1)
    return held


def _deal_group(rows: Rows, counts: Ints, rng: Generator, reuse: bool) -> Dealt:
    """Deal shuffled `rows`, counts[i] to client i; with `reuse` the deck is shuffled anew.

    A client whose part lies across two shuffles draws for itself, so that it has no row twice.
    """
    total = int(counts.sum())
    if int(counts.max(initial=0)) > len(rows) or (not reuse and total > len(rows)):
        raise DataError(f"population: {total} records wanted of a group of {len(rows)}")
    owner = np.repeat(np.arange(len(counts)), counts)
    if total <= len(rows):
        return Dealt(rows[:total], owner)
    shuffles = math.ceil(total / len(rows))
    deck = np.concatenate([rows, *(rng.permutation(rows) for _ in range(shuffles - 1))])[:total]
    start = np.cumsum(counts) - counts
    across = (counts > 0) & (start // len(rows) != (start + counts - 1) // len(rows))
    for client in np.flatnonzero(across):
        at = slice(int(start[client]), int(start[client] + counts[client]))
        deck[at] = rng.choice(rows, int(counts[client]), replace=False)
    return Dealt(deck, owner)


def _joined(parts: Sequence[Dealt]) -> Dealt:
    rows: NDArray[np.int64] = np.concatenate([part.rows for part in parts])
    return Dealt(rows, np.concatenate([part.owner for part in parts]))
