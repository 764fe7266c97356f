"""Who has which records: partitions of one labelled data set over N clients.

    iid        every client a random part
    quantity   a random part, but of very unequal sizes
    dirichlet  client i draws its labels from q_i ~ Dirichlet(α · p), p the labels' shares in the
               data, and its records within them (Hsu et al. 2019, arXiv:1909.06335). α is the
               total: with K equally frequent labels each of them has α / K, so the "Dirichlet
               0.5 per label" of other simulators is alpha = 0.5 · K here
    shards     records sorted by label are cut into equal shards; every client gets s of them
               (McMahan et al. 2017, arXiv:1602.05629, s = 2)
    feature    records are ordered by one feature and cut into equal bins; client i draws from
               its own mixture of bins, Dirichlet(α · p) as above. The feature is a column of
               numbers, else the principal direction of the inputs, for texts their length
    natural    one client per value of a column of the data file

All but `natural` and `shards` take sizes by a law: "equal", "lognormal" (log size has standard
deviation σ), "dirichlet" (shares of the whole are Dirichlet(β, …, β)).

How it is drawn is decided by the seed alone. Every function refuses a client without records.

Why not flwr-datasets (0.6.1): its `datasets` holds fsspec <= 2026.2 and huggingface_hub < 2, older
than what constraints.txt has of both, and it brings 24 packages (pandas, matplotlib, aiohttp). Its
DirichletPartitioner draws everything anew until each client has its minimum: for 10,000 clients
of 50 records on average, at least 10 each, Dirichlet 0.3, ten draws and 14.5 CPU seconds end
in an error; to read all of 10,000 partitions takes 3 to 10 s. Neither does it let clients share
records. Where it is installed the tests compare with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from anabranch.protocols.errors import ConfigError, DataError
from anabranch.simulations.population.clients import Partition
from anabranch.simulations.population.data import Rows
from anabranch.simulations.population.dealing import (
    Dealt,
    assemble,
    deal,
    equal_sizes,
    held_sizes,
    mixtures,
    skewed_sizes,
    trainable,
)
from anabranch.simulations.population.devices import Floats, Ints

SizeLaw = Literal["equal", "lognormal", "dirichlet"]


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What all partitions have in common.

    Without records_per_client all records are dealt; with it, records_per_client · clients.
    """

    clients: int
    seed: int
    records_per_client: int | None = None  # the mean
    reuse: bool = False  # a record may belong to many clients
    min_records: int = 1
    holdout: float = 0.0  # share of each client's records
    sizes: SizeLaw = "equal"
    spread: float = 1.0  # lognormal: σ; dirichlet: β

    def rng(self) -> Generator:
        """Return the generator that everything is drawn from."""
        return np.random.default_rng([self.seed, 0x9A27])


def iid(num_records: int, sharing: Sharing) -> Partition:
    """Return random parts; their sizes are by `sharing.sizes`.

    Raises DataError for too few records.
    """
    return _mixed([np.arange(num_records)], 1.0, sharing)


def by_label(labels: Ints, alpha: float, sharing: Sharing) -> Partition:
    """Return Dirichlet label skew: labels of shape (n,), concentration alpha > 0.

    Raises DataError for too few records.
    """
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return _mixed(groups, alpha, sharing)


def by_feature(values: Floats, bins: int, alpha: float, sharing: Sharing) -> Partition:
    """Return feature skew: records ordered by `values` (n,) in `bins` equal stretches.

    Raises DataError for too few records or values that are not finite.
    """
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(f"population: the feature of row {at + 1} is not a finite number")
    if not 1 <= bins <= len(values):
        raise ConfigError(f"population.bins: expected 1 to {len(values)}, got {bins}")
    return _mixed(np.array_split(np.argsort(values, kind="stable"), bins), alpha, sharing)


def by_shards(labels: Ints, shards: int, sharing: Sharing) -> Partition:
    """Return pathological label skew: `shards` shards of label-sorted records per client.

    Without records_per_client there are clients · shards shards, equal but for one record. Of
    every shard the same part is held out, whoever has it. Raises DataError for too few records.
    """
    if sharing.sizes != "equal":
        raise ConfigError("population.sizes: shards are of equal size, got another law")
    rng, n, wanted = sharing.rng(), len(labels), sharing.clients * shards
    order = np.lexsort((rng.random(n), labels))  # by label, at random within
    if sharing.records_per_client is None:
        size, num_shards = n // wanted, wanted
    else:
        size = sharing.records_per_client // shards
        num_shards = max(n // max(size, 1), 1)
    if size < 1 or size * shards < sharing.min_records or shards > num_shards:
        raise DataError(
            f"population: {n} records make no {wanted} shards of at least "
            f"{max(-(-sharing.min_records // shards), 1)}: take fewer clients or shards"
        )
    if num_shards < wanted and not sharing.reuse:
        raise DataError(
            f"population: {wanted} shards of {size} wanted, {n} records make {num_shards}: take "
            "fewer clients or fewer records_per_client, or set reuse = true"
        )
    bounds = np.arange(num_shards + 1) * n // num_shards
    if sharing.records_per_client is not None:
        bounds = np.stack([bounds[:-1], bounds[:-1] + size])
    else:
        bounds = np.stack([bounds[:-1], bounds[1:]])
    counts = np.full((sharing.clients, 1), shards, np.int64)
    owners = deal([np.arange(num_shards)], counts, 0.0, rng, reuse=sharing.reuse)
    return _of_shards(order, bounds, owners.rows, shards, sharing, rng)


def by_value(
    values: Sequence[object], sharing: Sharing, *, small: Literal["refuse", "drop"] = "refuse"
) -> tuple[Partition, tuple[str, ...]]:
    """Return one client per value of a column, and the values in the order of the clients.

    sharing.clients = 0 means all of them, otherwise so many are drawn. A value with fewer
    than min_records records is refused or dropped. Raises DataError for an empty cell, too
    few values or records, ConfigError for options that a natural partition does not have.
    """
    if sharing.reuse or sharing.records_per_client is not None or sharing.sizes != "equal":
        raise ConfigError(
            'population: partition = "natural" takes the records as they are: remove reuse, '
            "records_per_client and sizes"
        )
    empty = next((i for i, value in enumerate(values) if value is None), None)
    if empty is not None:
        raise DataError(f"population.column: the cell of row {empty + 1} is empty")
    names, owner = np.unique([str(value) for value in values], return_inverse=True)
    sizes = np.bincount(owner, minlength=len(names))
    few = np.flatnonzero(sizes < sharing.min_records)
    if len(few) and small == "refuse":
        raise DataError(
            f"population: {len(few)} of {len(names)} clients have fewer than min_records = "
            f'{sharing.min_records} records: lower it or set small = "drop"'
        )
    rng = sharing.rng()
    kept = np.flatnonzero(sizes >= sharing.min_records)
    if sharing.clients:
        if sharing.clients > len(kept):
            raise DataError(
                f"population.clients: {sharing.clients} wanted, the column makes {len(kept)}"
            )
        kept = np.sort(rng.permutation(kept)[: sharing.clients])
    if not len(kept):
        raise DataError("population: no value of the column has as many as min_records records")
    new = np.full(len(names), -1, np.int64)
    new[kept] = np.arange(len(kept))
    mine = np.flatnonzero(new[owner] >= 0)
    partition = _cut(mine, new[owner[mine]], len(kept), sharing.holdout, rng)
    return partition, tuple(str(name) for name in names[kept])


def principal_scores(inputs: NDArray[np.float32]) -> Floats:
    """Return each record's place along the direction in which the inputs vary most, (n,).

    By 50 power iterations on at most 4,096 records; the sign makes the direction's largest
    component positive. Inputs of any shape (n, …) are flattened.
    """
    flat = inputs.reshape(len(inputs), -1).astype(np.float64)
    flat -= flat.mean(axis=0)
    sample = flat[np.linspace(0, len(flat) - 1, min(len(flat), 4096)).astype(int)]
    direction = np.random.default_rng(0).standard_normal(flat.shape[1])
    for _ in range(50):
        moved = sample.T @ (sample @ direction)
        norm = float(np.linalg.norm(moved))
        if norm == 0.0:
            break  # all inputs are alike
        direction = moved / norm
    scores: Floats = flat @ (direction * np.sign(direction[np.argmax(np.abs(direction))] or 1.0))
    return scores


def _mixed(groups: Sequence[Rows], alpha: float, sharing: Sharing) -> Partition:
    """Return the partition in which each client draws from its own mixture of groups."""
    rng = sharing.rng()
    reuse = sharing.reuse
    room = trainable(np.array([len(group) for group in groups]), sharing.holdout, reuse=reuse)
    sizes = _sizes(int(sum(map(len, groups))), int(room.sum()), sharing, rng)
    counts = mixtures(room, sizes, alpha, rng, reuse=reuse)
    return deal(groups, counts, sharing.holdout, rng, reuse=reuse)


def _sizes(num_records: int, most: int, sharing: Sharing, rng: Generator) -> Ints:
    """Return the sizes of all clients, (N,); `most` is what one of them may have."""
    clients, least = sharing.clients, sharing.min_records
    if sharing.reuse and sharing.records_per_client is None:
        raise ConfigError("population: reuse = true needs records_per_client")
    mean = sharing.records_per_client
    total = num_records if mean is None else mean * clients
    if total > num_records and not sharing.reuse:
        raise DataError(
            f"population: {clients} clients of {mean} records want {total}, there are "
            f"{num_records}: take fewer, or set reuse = true to give a record to many clients"
        )
    if total < clients * least:
        raise DataError(
            f"population: {total} records for {clients} clients make less than min_records = "
            f"{least} each: take fewer clients, or set records_per_client and reuse = true"
        )
    if sharing.sizes == "equal":
        sizes = equal_sizes(total, clients, rng)
    else:
        weights = (
            np.exp(sharing.spread * rng.standard_normal(clients))
            if sharing.sizes == "lognormal"
            else rng.dirichlet(np.full(clients, sharing.spread))
        )
        sizes = skewed_sizes(weights, total, least)
    if sizes.max() > most:
        raise DataError(
            f"population: the largest client would have {int(sizes.max())} of {most} records: "
            "take a smaller spread or fewer records_per_client"
        )
    return sizes


def _of_shards(
    order: Rows, bounds: Ints, dealt: Rows, shards: int, sharing: Sharing, rng: Generator
) -> Partition:
    """Return the partition of clients that have `shards` shards each, in `dealt`, (N · shards,)."""
    begin, end = bounds[0][dealt], bounds[1][dealt]
    cut = end - held_sizes(end - begin, sharing.holdout)
    client = np.repeat(np.arange(sharing.clients), shards)
    train = Dealt(order[_ranges(begin, cut)], np.repeat(client, cut - begin))
    held = Dealt(order[_ranges(cut, end)], np.repeat(client, end - cut))
    return assemble(train, held, sharing.clients, rng)


def _cut(rows: Rows, owner: Ints, clients: int, holdout: float, rng: Generator) -> Partition:
    """Return the partition of rows with their owners; a random part of each is held out."""
    whole = assemble(Dealt(rows, owner), Dealt(rows[:0], owner[:0]), clients, rng)
    return Partition(whole.rows, whole.start, held_sizes(np.diff(whole.start), holdout))


def _ranges(begin: Ints, end: Ints) -> Ints:
    """Return the integers of all [begin, end), one range after the other."""
    sizes = end - begin
    offset = np.repeat(np.cumsum(sizes) - sizes, sizes)
    places: Ints = np.repeat(begin, sizes) + np.arange(int(sizes.sum())) - offset
    return places
