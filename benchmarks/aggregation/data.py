"""The two corpora of the text benchmark, and how their training records fall to clients.

    SST-2     Stanford Sentiment Treebank, sentences, 2 labels: 2,000 of its training sentences
              (seeded), 800 of its validation sentences, all 1,821 test sentences
    MedQuAD   answers of NIH sources, 15 question types: 2,400 / 700 / all others, split by focus
              (a disease is on one side only); the eight sources are eight unequal institutions

Partitions of n training records among K clients:

    iid           a random cut into K equal parts
    dirichlet α   K equal parts; a client's labels are drawn from its own p ~ Dir(α, …, α), without
                  replacement (Hsu, Qi and Brown 2019, arXiv:1909.06335, with a flat prior)
    natural       one client per source (MedQuAD)
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
SPLIT_SEED = 2024  # which records are used at all: the same for every seed of the benchmark
TRAIN = {"sst2": 2000, "medquad": 2400}
VALIDATION = {"sst2": 800, "medquad": 700}
MAX_TOKENS = {"sst2": 32, "medquad": 32}
LEAST_OF_A_LABEL = 40  # MedQuAD: rarer question types cannot be learnt by 50 clients
PARTITIONS = ("iid", "dirichlet-0.5", "dirichlet-0.1", "natural")

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Records:
    """Texts with their label and, where there is one, the source they come from."""

    texts: tuple[str, ...]
    labels: Ints  # (n,)
    sources: tuple[str, ...]  # n, or none

    def __len__(self) -> int:
        return len(self.texts)

    def digest(self) -> str:
        """Return the SHA-256 of the texts, in their order."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()

    def first(self, count: int) -> Records:
        """Return the first `count` records."""
        return Records(self.texts[:count], self.labels[:count], self.sources[:count])


@dataclass(frozen=True)
class Corpus:
    """One data set as the benchmark uses it."""

    name: str
    labels: tuple[str, ...]
    train: Records
    validation: Records
    test: Records


def folder() -> Path:
    """Return where the data are: ANABRANCH_DATA, or ../shared/data beside the project."""
    return Path(os.environ.get("ANABRANCH_DATA", ROOT.parent / "shared" / "data"))


def available() -> bool:
    """Return whether both data sets are there."""
    return (folder() / "sst2").is_dir() and (folder() / "medquad").is_dir()


def load(name: str) -> Corpus:
    """Return a corpus by name: "sst2" or "medquad"."""
    loaders: Mapping[str, Callable[[Path], Corpus]] = {"sst2": sst2, "medquad": medquad}
    return loaders[name](folder() / name)


def shortened(corpus: Corpus, count: int) -> Corpus:
    """Return the first `count` records of each part: for quick runs."""
    parts = (corpus.train, corpus.validation, corpus.test)
    return Corpus(corpus.name, corpus.labels, *(part.first(count) for part in parts))


def sst2(at: Path) -> Corpus:
    """Return SST-2 with a seeded subset of its training and validation sentences."""
    rng = np.random.default_rng(SPLIT_SEED)

    def read(part: str, count: int | None) -> Records:
        lines = (at / f"stsa.binary.{part}").read_text().splitlines()
        chosen = range(len(lines)) if count is None else rng.permutation(len(lines))[:count]
        labels = np.array([int(lines[i][0]) for i in chosen], np.int64)
        return Records(tuple(lines[i][2:] for i in chosen), labels, ())

    train, validation = read("train", TRAIN["sst2"]), read("dev", VALIDATION["sst2"])
    return Corpus("sst2", ("negative", "positive"), train, validation, read("test", None))


def medquad(at: Path) -> Corpus:
    """Return MedQuAD: the question type is read off the answer; no focus is on two sides."""
    with (at / "answers.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    types = [row["question_type"] for row in rows]
    names = tuple(sorted({t for t in types if types.count(t) >= LEAST_OF_A_LABEL}))
    rows = [row for row in rows if row["question_type"] in names]
    focuses = sorted({row["focus"] for row in rows})
    order = np.random.default_rng(SPLIT_SEED).permutation(len(focuses))
    place = {focuses[i]: int(at) for at, i in enumerate(order)}
    rows.sort(key=lambda row: place[row["focus"]])  # stable: the file's order within a focus

    def records(chosen: Sequence[Mapping[str, str]]) -> Records:
        labels = np.array([names.index(row["question_type"]) for row in chosen], np.int64)
        texts = tuple(row["answer_first_400_chars"] for row in chosen)
        return Records(texts, labels, tuple(row["source"] for row in chosen))

    first = _end_of_focus(rows, TRAIN["medquad"])
    second = _end_of_focus(rows, first + VALIDATION["medquad"])
    parts = (rows[:first], rows[first:second], rows[second:])
    return Corpus("medquad", names, *map(records, parts))


def _end_of_focus(rows: Sequence[Mapping[str, str]], at: int) -> int:
    """Return the first place from `at` on where a new focus begins."""
    while rows[at]["focus"] == rows[at - 1]["focus"]:
        at += 1
    return at


def partition(records: Records, kind: str, clients: int, seed: int) -> list[Ints]:
    """Return the indices of each client's records; every record belongs to at most one client.

    With "natural", `clients` must be the number of sources. Otherwise sizes differ by at most one.
    """
    if kind == "natural":
        names = sorted(set(records.sources))
        if len(names) != clients:
            raise ValueError(
                f"natural: there are {len(names)} sources, asked for {clients} clients"
            )
        of = np.array(records.sources)
        return [np.flatnonzero(of == name) for name in names]
    rng = np.random.default_rng([seed, clients])
    if kind == "iid":
        return np.array_split(rng.permutation(len(records)), clients)
    return _dirichlet(records.labels, float(kind.removeprefix("dirichlet-")), clients, rng)


def _dirichlet(labels: Ints, alpha: float, clients: int, rng: np.random.Generator) -> list[Ints]:
    """Return equal parts; each client draws labels from its own Dirichlet, as long as they last."""
    count = int(labels.max()) + 1
    left = [rng.permutation(np.flatnonzero(labels == label)).tolist() for label in range(count)]
    parts = []
    for client in range(clients):
        size = len(labels) // clients + (client < len(labels) % clients)
        wanted = rng.dirichlet(np.full(count, alpha))
        chosen: list[int] = []
        while len(chosen) < size:
            there = np.array([len(rest) > 0 for rest in left])
            weights = np.where(there, wanted + 1e-9, 0.0)
            label = int(rng.choice(count, p=weights / weights.sum()))
            chosen.append(left[label].pop())
        parts.append(np.array(sorted(chosen), np.int64))
    return [parts[i] for i in rng.permutation(clients)]  # the last ones get what is left
