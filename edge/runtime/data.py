"""A device's records: read strictly, tokenized, cut into batches, split by content.

    suffix         convention                                      task
    .jsonl         one JSON object per line, one key per column     texts, tables
    .csv           RFC 4180: UTF-8, first line names the columns    texts, tables
    .npz           arrays `inputs` (n, …) float and `labels` (n,)   images, tables

Columns are those of the bundle's data contract, or `text` and `label` without one (columns.py).
A label is one of the bundle's, spelled exactly so; in .npz also its index. Other columns are
not used. The first thing that is wrong ends the reading with a DataError that names the file,
the line and the column, and shows nothing of what a record holds.

A record's identity is the SHA-256 of its cells as the file has them, also of columns that are
not used: no bundle can give an old record a new one. The held-out part is drawn by identities,
so it does not depend on the order of the file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from anabranch.edge.runtime.bundle_manifest import Manifest
from anabranch.edge.runtime.columns import MISSING, features, name_of
from anabranch.edge.runtime.engine import Batch, Floats
from anabranch.edge.runtime.tokenizer import WordPiece
from anabranch.protocols.errors import DataError

TEXT, LABEL = "text", "label"  # columns, where the bundle has no data contract
TABLES = "tabular-classification"
INPUTS, LABELS = "inputs", "labels"
SHOWN_LABELS = 10
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Records:
    """n prepared records. Not to be printed: this is what does not leave."""

    names: tuple[str, ...]  # of the model's inputs
    features: Sequence[Ints] | Floats  # texts: ids (T_i,) each; else (n, …)
    labels: Ints  # (n,)
    identities: tuple[bytes, ...]  # 32 bytes per record
    padding: int = 0  # id that fills up shorter texts

    def __post_init__(self) -> None:
        counts = {len(self.features), len(self.labels), len(self.identities)}
        if len(counts) != 1:
            raise ValueError(f"expected as many labels and identities as inputs, got {counts}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Records(n={len(self)})"

    @property
    def lengths(self) -> Ints:
        """Return the tokens of every record, (n,); 1 for images and tables."""
        if isinstance(self.features, np.ndarray):
            return np.ones(len(self), np.int64)
        return np.array([len(one) for one in self.features], np.int64)

    def take(self, rows: Sequence[int] | Ints) -> Records:
        """Return the records at `rows`, in that order."""
        at = np.asarray(rows, np.int64)
        features = self.features
        chosen = features[at] if isinstance(features, np.ndarray) else [features[i] for i in at]
        identities = tuple(self.identities[i] for i in at)
        return replace(self, features=chosen, labels=self.labels[at], identities=identities)

    def feeds(self, rows: Sequence[int] | Ints) -> dict[str, NDArray[Any]]:
        """Return the model's inputs of the records at `rows`, padded on the right."""
        at = np.asarray(rows, np.int64)
        if isinstance(self.features, np.ndarray):
            return {self.names[0]: self.features[at]}
        chosen = [self.features[i] for i in at]
        longest = max(map(len, chosen), default=1)
        ids = np.full((len(chosen), longest), self.padding, np.int64)
        mask = np.zeros((len(chosen), longest), np.int64)
        for row, one in enumerate(chosen):
            ids[row, : len(one)] = one
            mask[row, : len(one)] = 1
        return {self.names[0]: ids, self.names[1]: mask}

    def batch(self, rows: Sequence[int] | Ints, weights: Floats) -> Batch:
        """Return the records at `rows` with one weight each, as the graphs take them."""
        at = np.asarray(rows, np.int64)
        return Batch(self.feeds(at), self.labels[at], np.asarray(weights, np.float32))

    def digest(self) -> str:
        """Return the SHA-256 (hex) of what the model sees, in its order."""
        hasher = hashlib.sha256(b"anabranch device records 1\n")
        hasher.update(np.int64(len(self)).tobytes() + self.labels.astype("<i8").tobytes())
        for one in self.features:
            hasher.update(f"{one.dtype.str} {one.shape}\n".encode() + one.tobytes())
        return hasher.hexdigest()


def read_records(path: Path, manifest: Manifest, tokenizer: WordPiece | None) -> Records:
    """Return the records in `path` as the bundle's model takes them.

    Raises DataError naming file, line and column of the first thing that is wrong.
    """
    suffix = path.suffix.lower()
    if suffix == ".npz" and tokenizer is None:
        return _read_arrays(path, manifest)
    table = tokenizer is not None or (manifest.task == TABLES and bool(manifest.columns))
    if suffix not in (".jsonl", ".csv") or not table:
        kinds = ".jsonl or .csv" if tokenizer is not None else ".npz (tables: .csv, .jsonl too)"
        _refuse(path, f"a bundle for {manifest.task} reads records from {kinds}")
    rows = list((_jsonl if suffix == ".jsonl" else _csv)(path, _read_text(path)))
    if not rows:
        _refuse(path, "no records in it")
    index = {label: at for at, label in enumerate(manifest.labels)}
    column = name_of(manifest.columns, "label", LABEL)
    for line, row in rows:
        if _plain(row.get(column)) not in index:
            problem = f"column {column!r}: expected one of {_listed(manifest.labels)}"
            _refuse(path, problem, line=line)
    inputs: Sequence[Ints] | Floats
    if tokenizer is None:
        inputs = features(
            manifest.columns, rows, lambda problem, line: _refuse(path, problem, line=line)
        )
    else:
        inputs = _tokenized(path, rows, name_of(manifest.columns, "text", TEXT), tokenizer)
    labels = np.array([index[str(_plain(row[column]))] for _, row in rows], np.int64)
    identities = tuple(_identity(row) for _, row in rows)
    padding = 0 if tokenizer is None else tokenizer.data.padding
    return Records(manifest.inputs, inputs, labels, identities, padding)


def split(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    """Return (training, held-out): about share · n records are held out, label by label.

    Guarantees: the same two sets whatever the order of the file; copies of one record lie on
    one side; every label that is there has a record in training. Raises ValueError unless
    0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"expected a share in [0, 1), got {share}")
    keys = [hashlib.sha256(b"%d " % seed + one).digest() for one in records.identities]
    held = np.zeros(len(records), bool)
    present, counts = np.unique(records.labels, return_counts=True)
    for label, quota in zip(present, _quotas(counts, share), strict=True):
        members = sorted(np.flatnonzero(records.labels == label), key=lambda i: keys[i])
        while quota > 0 and keys[members[quota - 1]] == keys[members[quota]]:
            quota -= 1  # copies of one record straddle the cut: all of them are trained on
        held[members[:quota]] = True
    return records.take(np.flatnonzero(~held)), records.take(np.flatnonzero(held))


def _quotas(counts: NDArray[np.int64], share: float) -> list[int]:
    """Round share · counts to integers that add up, by largest remainder; at most count − 1."""
    exact = share * counts
    quotas = np.floor(exact).astype(int)
    missing = round(share * int(counts.sum())) - int(quotas.sum())
    largest = np.argsort(quotas - exact, kind="stable")[: max(missing, 0)]
    quotas[largest] += 1
    return [int(quota) for quota in np.minimum(quotas, counts - 1)]


def _tokenized(
    path: Path, rows: Sequence[tuple[int, dict[str, Any]]], column: str, tokenizer: WordPiece
) -> list[Ints]:
    for line, row in rows:
        if not isinstance(row.get(column), str) or row[column].strip() in MISSING:
            _refuse(path, f"column {column!r}: expected text that is not empty", line=line)
    return [np.array(tokenizer.encode(row[column]), np.int64) for _, row in rows]


def _plain(label: Any) -> str | None:
    """Return a label as text: 1 is "1", true is "true"; None for what is no label."""
    if isinstance(label, bool):
        return str(label).lower()
    return str(label) if isinstance(label, str | int) else None


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror or error}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        _refuse(path, "these bytes are not UTF-8; save the file as UTF-8", line=line)


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, one in enumerate(text.split("\n"), 1):
        if not one.strip():
            continue
        try:
            row = json.loads(one, object_pairs_hook=_pairs)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no character
        except json.JSONDecodeError as error:
            _refuse(path, f"not JSON: {error.msg} at character {error.pos + 1}", line=line)
        except (RecursionError, ValueError):
            problem = "a key twice, nested too deeply, or no text; expected one flat JSON object"
            _refuse(path, problem, line=line)
        if not isinstance(row, dict):
            _refuse(path, "expected one JSON object per line", line=line)
        yield line, row


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            _refuse(path, f"{error}, in the record that begins here; check quotes", line=line)
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) != len(header):
                _refuse(path, "two columns have the same name", line=line)
        elif len(cells) != len(header):
            _refuse(path, f"{len(cells)} cells where the header has {len(header)}", line=line)
        else:
            yield line, dict(zip(header, cells, strict=True))


def _read_arrays(path: Path, manifest: Manifest) -> Records:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {name: loaded[name] for name in loaded.files}
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror or error}")
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, AttributeError):
        _refuse(path, "no .npz file of plain arrays; write it with numpy.savez")
    if set(arrays) != {INPUTS, LABELS}:
        _refuse(path, f"expected the arrays {INPUTS} and {LABELS}, got {sorted(arrays)}")
    inputs, labels = arrays[INPUTS], arrays[LABELS]
    form = f"(n, {', '.join(map(str, manifest.shape))})"
    if inputs.dtype.kind != "f" or inputs.shape[1:] != manifest.shape or inputs.ndim < 1:
        problem = f"{INPUTS}: expected float32 {form}, got {inputs.dtype} {inputs.shape}"
        _refuse(path, problem)
    if not len(inputs):
        _refuse(path, "no records in it")
    if labels.shape != (len(inputs),):
        _refuse(path, f"{LABELS}: expected shape ({len(inputs)},), got {labels.shape}")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(inputs, np.float32)
    rows = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
    if len(rows):
        _refuse(path, f"{INPUTS}: record {rows[0] + 1} holds NaN or infinite values")
    indices = _label_indices(path, labels, manifest.labels)
    identities = tuple(
        hashlib.sha256(b"array\n" + one.tobytes() + str(label).encode()).digest()
        for one, label in zip(values, labels.tolist(), strict=True)
    )
    return Records(manifest.inputs, values, indices, identities)


def _label_indices(path: Path, labels: NDArray[Any], expected: tuple[str, ...]) -> Ints:
    """Return labels, given as names or as indices, as indices."""
    index: dict[Any, int] = {at: at for at in range(len(expected))}
    if labels.dtype.kind == "U":
        index = {label: at for at, label in enumerate(expected)}
    elif labels.dtype.kind not in "iu":
        _refuse(path, f"{LABELS}: expected names or indices, got {labels.dtype}")
    for row, label in enumerate(labels.tolist(), 1):
        if label not in index:
            last = len(expected) - 1
            problem = f"expected 0 to {last} or one of {_listed(expected)}"
            _refuse(path, f"{LABELS}: record {row}: {problem}")
    return np.array([index[label] for label in labels.tolist()], np.int64)


def _identity(row: dict[str, Any]) -> bytes:
    cells = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(b"text\n" + cells.encode()).digest()


def _listed(labels: Sequence[str]) -> str:
    more = "" if len(labels) <= SHOWN_LABELS else f" … ({len(labels)} labels)"
    return ", ".join(map(repr, labels[:SHOWN_LABELS])) + more


def _refuse(path: Path, problem: str, *, line: int | None = None) -> NoReturn:
    where = f"{path}, line {line}" if line is not None else f"{path}"
    raise DataError(f"{where}: {problem}") from None
