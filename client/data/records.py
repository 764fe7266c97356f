"""Records as the model takes them, their identity, and the held-out part.

    task      inputs                                        from
    text      list of n str                                 the column of type text
    image     float32 (n, channels, size, size) in [0, 1]   the column of type image
    tabular   float32 (n, features)                         numbers and categories

Features of a table stand in the order of the contract's columns:

    number      (x − mean) / std, mean and std from the contract; empty: 0, which is `mean`
    category    one-hot, in the order of `values`; empty: all zero
    optional    one more feature after either: 1 if the cell was empty, else 0

A label is its index in task.labels. Columns that the task does not use (a text in a tabular
task, say) are checked and then dropped.

A record's hash is the SHA-256 of its canonical bytes (kind, shape, little-endian values,
label): what the model sees. The fingerprint is made of hashes, and the split is drawn by them,
so that neither depends on the order of a file. Whose privacy was spent is another question:
`rows` holds the hash of the whole row in the site's file (rows.py), which no contract changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.client.data.contract import accept
from anabranch.client.data.read import Never, Table, read_table
from anabranch.client.data.rows import row_hashes
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Column


@dataclass(frozen=True, eq=False)
class Records:
    """n inputs with their labels. Not to be printed: this is what must not leave."""

    inputs: list[str] | NDArray[np.float32]
    labels: NDArray[np.int64]
    rows: tuple[bytes, ...] | None = None  # hashes of the rows; None: not read from a file

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise ValueError(f"{len(self.inputs)} inputs, but {len(self.labels)} labels")
        if self.rows is not None and len(self.rows) != len(self.labels):
            raise ValueError(f"{len(self.rows)} row hashes, but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Records(n={len(self)})"

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Records:
        """Return the records at `indices`, in that order."""
        at = np.asarray(indices, np.int64)
        rows = None if self.rows is None else tuple(self.rows[i] for i in at)
        if isinstance(self.inputs, list):
            return Records([self.inputs[i] for i in at], self.labels[at], rows)
        return Records(self.inputs[at], self.labels[at], rows)

    def identities(self) -> tuple[bytes, ...]:
        """Return 32 bytes per record: the hash of its row.

        Records that were made in memory have no rows; what the model sees stands in for them.
        """
        return tuple(record_hashes(self)) if self.rows is None else self.rows

    def label_counts(self, num_labels: int) -> NDArray[np.int64]:
        """Return how many records each label has, shape (num_labels,)."""
        return np.bincount(self.labels, minlength=num_labels).astype(np.int64)


def load_records(path: Path, config: RunConfig, never: Never = frozenset()) -> Records:
    """Read a file or a folder of images, check the contract, and return its records.

    It is as if the columns in `never` were not in the file.

    Raises DataError if the file cannot be read or breaks the contract.
    """
    return to_records(read_table(path, never), config)


def to_records(table: Table, config: RunConfig) -> Records:
    """Check the contract and return the table's records, in its order.

    Raises DataError listing every violation, as `contract.require` does.
    """
    columns = accept(table, config)
    rows = row_hashes(table)
    data = config.data
    labels = np.array(columns[data.column("label")], np.int64)
    match config.task.kind:
        case "text-classification":
            return Records(columns[data.column("text")], labels, rows)
        case "image-classification":
            shape = (config.model.channels, config.model.image_size, config.model.image_size)
            images = np.array(columns[data.column("image")], np.float32)
            return Records(images.reshape(len(labels), *shape), labels, rows)
        case "tabular-classification":
            blocks = [_features(c, columns[name]) for name, c in _feature_columns(config)]
            return Records(np.concatenate(blocks, axis=1, dtype=np.float32), labels, rows)


def num_features(config: RunConfig) -> int:
    """Return the width of a table's inputs, which the contract alone decides."""
    widths = (
        (1 if column.type == "number" else len(column.values)) + column.optional
        for _, column in _feature_columns(config)
    )
    return sum(widths)


def fingerprint(records: Records) -> str:
    """Return the SHA-256 (hex) over the sorted record hashes: what a model can learn from.

    The order of records does not matter; how often a record occurs does.
    """
    hashes = sorted(record_hashes(records))
    return hashlib.sha256(b"anabranch records 1\n" + b"".join(hashes)).hexdigest()


def record_hashes(records: Records) -> list[bytes]:
    """Return the SHA-256 of each record's canonical bytes."""
    labels = records.labels.astype("<i8")
    if isinstance(records.inputs, list):
        inputs = (b"text\n" + text.encode() for text in records.inputs)
    else:
        values = records.inputs.astype("<f4") + np.float32(0)  # −0.0 becomes 0.0: they are equal
        head = f"array {values.shape[1:]}\n".encode()
        inputs = (head + row.tobytes() for row in values)
    return [
        hashlib.sha256(label.tobytes() + data).digest()
        for label, data in zip(labels, inputs, strict=True)
    ]


def split(records: Records, holdout: float, seed: int) -> tuple[Records, Records]:
    """Return (train, held): about holdout · n records are held out, label by label.

    Guarantees, for any order of the same records: the same two sets; copies of one record lie
    on one side; every label that has a record has one in train. The share of each label is
    holdout · n_label rounded by largest remainder, less what copies take back.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"expected holdout in [0, 1), got {holdout}")
    keys = [hashlib.sha256(b"%d " % seed + digest).digest() for digest in record_hashes(records)]
    held = np.zeros(len(records), bool)
    present, counts = np.unique(records.labels, return_counts=True)
    for label, quota in zip(present, _quotas(counts, holdout), strict=True):
        members = sorted(np.flatnonzero(records.labels == label), key=lambda i: keys[i])
        while quota > 0 and keys[members[quota - 1]] == keys[members[quota]]:
            quota -= 1  # copies of one record straddle the cut: all of them stay in train
        held[members[:quota]] = True
    return records.take(np.flatnonzero(~held)), records.take(np.flatnonzero(held))


def _quotas(counts: NDArray[np.int64], holdout: float) -> list[int]:
    """Round holdout · counts to integers that add up, by largest remainder; at most count − 1."""
    exact = holdout * counts
    quotas = np.floor(exact).astype(int)
    missing = round(holdout * int(counts.sum())) - int(quotas.sum())
    largest = np.argsort(quotas - exact, kind="stable")[: max(missing, 0)]
    quotas[largest] += 1
    return [int(quota) for quota in np.minimum(quotas, counts - 1)]


def _feature_columns(config: RunConfig) -> list[tuple[str, Column]]:
    columns = config.data.columns.items()
    return [(name, c) for name, c in columns if c.type in ("number", "category")]


def _features(column: Column, cells: Sequence[Any]) -> NDArray[np.float64]:
    """Return one column's features, shape (n, width)."""
    if column.type == "number":
        values = np.array(cells, np.float64)[:, None]
        empty = np.isnan(values)
        features = np.where(empty, 0.0, (values - column.mean) / column.std)
    else:
        chosen = np.array(cells, np.int64)[:, None]
        empty = chosen < 0
        features = (chosen == np.arange(len(column.values))).astype(np.float64)
    return np.hstack([features, empty]) if column.optional else features
