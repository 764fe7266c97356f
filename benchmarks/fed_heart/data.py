"""Fed-Heart-Disease: 740 patients of four hospitals, prepared as FLamby prepares them.

Source: UCI Heart Disease (Detrano et al. 1989; CC BY 4.0), four files processed.*.data. FLamby
(Ogier du Terrail et al. 2022, arXiv:2210.04620; owkin/FLamby, datasets/fed_heart_disease) makes of
them, and so does this module:

    columns 10, 11, 12 (slope, ca, thal) go, then every patient with a "?"
    columns 2 and 6 (chest pain, resting ECG) one-hot without their first value    13 features
    label 1 if column 13 > 0
    66 % of each hospital are for training: random_state 43, stratified where both labels have
    three patients (Switzerland has one healthy patient among 46)
    (x − mean) / (std + 1e-9), mean and std (n − 1) over the training records; 0 where std is 0

    own scale      mean and std of the hospital: what it trains on, and its own test
    pooled scale   mean and std of all training records: "pooled training" and "pooled test"
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold, train_test_split

from anabranch.client.tuning.examples import Examples
from benchmarks.harness import ROOT

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
MD5 = {
    "cleveland": "2d91a8ff69cfd9616aa47b59d6f843db",
    "hungarian": "22e96bee155b5973568101c93b3705f6",
    "switzerland": "9a87f7577310b3917730d06ba9349e20",
    "va": "4249d03ca7711e84f4444768c9426170",
}
PATIENTS = {  # hospital -> (training, test), as published
    "cleveland": (199, 104),
    "hungarian": (172, 89),
    "switzerland": (30, 16),
    "va": (85, 45),
}
DROPPED = (10, 11, 12)
CATEGORIES = {2: (2.0, 3.0, 4.0), 6: (1.0, 2.0)}  # values that get a column: all but the first
LABEL = 13
TRAIN_SHARE = 0.66
SPLIT_SEED = 43
RAREST = 2  # FLamby stratifies if each label has more patients than this: not in Switzerland
NUM_FEATURES = 13


@dataclass(frozen=True, eq=False)
class Table:
    """Patients in the order of a file: features (n, 13) as they were measured, labels (n,)."""

    features: Floats
    labels: Ints

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Ints) -> Table:
        """Return the patients in `rows`, in that order."""
        return Table(self.features[rows], self.labels[rows])


@dataclass(frozen=True, eq=False)
class Split:
    """Training and evaluation records, on both scales; lists in the order of HOSPITALS."""

    train: list[Examples]  # own scale
    test: list[Examples]  # own scale
    pooled_train: Examples  # pooled scale
    pooled_test: Examples  # pooled scale


def data_folder() -> Path:
    """Return the folder of the four files; raise SystemExit, saying what to set, without it."""
    root = Path(os.environ.get("ANABRANCH_DATA", ROOT.parent / "shared" / "data"))
    folder = root / "heart-disease"
    missing = [name for name in HOSPITALS if not file_of(folder, name).is_file()]
    if missing:
        raise SystemExit(
            f"{file_of(folder, missing[0])} is missing: set ANABRANCH_DATA to the folder that "
            "holds heart-disease/ with UCI's processed.*.data of four hospitals"
        )
    return folder


def file_of(folder: Path, hospital: str) -> Path:
    """Return the file of a hospital."""
    return folder / f"processed.{hospital}.data"


def load(folder: Path) -> list[Table]:
    """Return the patients of the four hospitals; ValueError for a file that is not the original."""
    tables = []
    for name in HOSPITALS:
        content = file_of(folder, name).read_bytes()
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != MD5[name]:
            raise ValueError(f"{file_of(folder, name)} has MD5 {found}, expected {MD5[name]}")
        tables.append(parse(content.decode()))
    return tables


def parse(text: str) -> Table:
    """Return the patients of one file that have all columns that are kept."""
    kept = [i for i in range(LABEL + 1) if i not in DROPPED]
    cells = [line.split(",") for line in text.splitlines() if line]
    rows = [{i: row[i] for i in kept} for row in cells]
    numbers = [{i: float(x) for i, x in row.items()} for row in rows if "?" not in row.values()]
    plain = [i for i in kept if i != LABEL and i not in CATEGORIES]
    features = [
        [row[i] for i in plain] + [float(row[i] == x) for i, xs in CATEGORIES.items() for x in xs]
        for row in numbers
    ]
    return Table(np.array(features, np.float32), np.array([row[LABEL] > 0 for row in numbers], int))


def published_split(tables: Sequence[Table]) -> Split:
    """Return FLamby's training and test records; ValueError if their numbers are not FLamby's."""
    parts = [divided(table) for table in tables]
    for name, (train, test) in zip(HOSPITALS, parts, strict=True):
        if (len(train), len(test)) != PATIENTS[name]:
            raise ValueError(
                f"{name}: expected {PATIENTS[name]} training and test records, "
                f"got {(len(train), len(test))}"
            )
    return scaled([train for train, _ in parts], [test for _, test in parts])


def divided(table: Table) -> tuple[Table, Table]:
    """Return the (training, test) records of one hospital, each in the order of the file."""
    stratify = table.labels if np.bincount(table.labels, minlength=2).min() > RAREST else None
    parts = train_test_split(
        np.arange(len(table)),
        test_size=1.0 - TRAIN_SHARE,
        train_size=TRAIN_SHARE,
        random_state=SPLIT_SEED,
        stratify=stratify,
    )
    train, test = (table.take(np.sort(part)) for part in parts)
    return train, test


def folds(tables: Sequence[Table], count: int, seed: int) -> list[Split]:
    """Return `count` splits of the TRAINING records: each is held out once, scaled by the rest.

    Stratified within each hospital. No test record is read.
    """
    chosen = [
        list(StratifiedKFold(count, shuffle=True, random_state=seed).split(t.features, t.labels))
        for t in tables
    ]
    return [
        scaled(
            [t.take(parts[i][0]) for t, parts in zip(tables, chosen, strict=True)],
            [t.take(parts[i][1]) for t, parts in zip(tables, chosen, strict=True)],
        )
        for i in range(count)
    ]


def scaled(train: Sequence[Table], test: Sequence[Table]) -> Split:
    """Return examples on both scales; mean and std are of `train` alone."""
    own = [Scale.of(t) for t in train]
    both = joined(train), joined(test)
    pooled = Scale.of(both[0])
    return Split(
        train=[s.examples(t) for s, t in zip(own, train, strict=True)],
        test=[s.examples(t) for s, t in zip(own, test, strict=True)],
        pooled_train=pooled.examples(both[0]),
        pooled_test=pooled.examples(both[1]),
    )


def joined(tables: Sequence[Table]) -> Table:
    """Return the patients of all tables, one table after another."""
    features = np.concatenate([t.features for t in tables])
    return Table(features, np.concatenate([t.labels for t in tables]))


@dataclass(frozen=True, eq=False)
class Scale:
    """Mean and standard deviation of every feature."""

    mean: Floats
    std: Floats

    @classmethod
    def of(cls, table: Table) -> Scale:
        """Return the scale of a table; a feature that does not vary has std 0."""
        return cls(table.features.mean(axis=0), table.features.std(axis=0, ddof=1))

    def examples(self, table: Table) -> Examples:
        """Return the table as the training loops take it."""
        scaled = (table.features - self.mean) / (self.std + np.float32(1e-9))
        rows = np.where(self.std > 0, scaled, np.float32(0))
        return Examples(list(torch.from_numpy(rows)), torch.from_numpy(table.labels))
