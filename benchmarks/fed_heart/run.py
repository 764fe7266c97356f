"""Fed-Heart-Disease (FLamby): the published rows again, then ours, then ours under DP.

Test accuracy. mean4: the mean of the four hospitals' own tests; pooled: all 254 test patients on
one scale. How the records are prepared: data.py; published methods: published.py; how ours are
chosen without the test records: ours.py.

    pooled_training.pooled, fedavg.pooled, fedadam.mean4, fedyogi.mean4    the published methods
    reproduction.max_difference    largest |ours − published| over 7 methods × (4 hospitals, mean4,
                                   pooled), means over seeds 42 to 46
    best.mean4, best.pooled        our federated method with the best validation accuracy
    one_model.mean4                the best that gives every hospital the same model
    alone.mean4                    the personal steps of best.mean4, without a federation
    eps1.mean4                     one model, record-level DP at every hospital: ε = 1, δ = 1e-4

--quick: ours with two seeds, five noise seeds, one repeat of the folds, every third candidate.
The published methods run with all five seeds: their published means are over those.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

import numpy as np
import torch

from anabranch.protocols.adapter import Adapter
from benchmarks.fed_heart.data import (
    Floats,
    Split,
    data_folder,
    divided,
    load,
    published_split,
)
from benchmarks.fed_heart.federation import counts, sizes, with_mean
from benchmarks.fed_heart.ours import (
    MEAN,
    POOLED,
    Choices,
    choose,
    personal_models,
    shared_model,
    tailored,
    with_epsilon,
)
from benchmarks.fed_heart.published import PUBLISHED, SEEDS, TOLERANCE, reproduced
from benchmarks.fed_heart.table import EPSILONS, Rows, chart, mean, table
from benchmarks.harness import ROOT, Figure, header, report, write_between_markers

THREADS = 1
PACKAGES = ("torch", "opacus", "scikit-learn", "numpy")
PAGE = ROOT / "docs" / "benchmarks" / "fed_heart.md"
PICTURE = ROOT / "docs" / "images" / "fed_heart.svg"
FLAMBY = "FLamby, published"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is run."""

    seeds: Sequence[int] = SEEDS  # of ours
    noise_seeds: Sequence[int] = tuple(range(20))
    repeats: int = 3  # of the folds
    every: int = 1  # candidate of a grid


QUICK = Effort(seeds=SEEDS[:2], noise_seeds=tuple(range(5)), repeats=1, every=3)


def measured(split: Split, choices: Choices, effort: Effort) -> dict[str, Floats]:
    """Return name -> test accuracies (seeds, 6). The only place that reads the test records."""
    rows = {"majority": [majority(split)]}
    for method in PUBLISHED:
        rows[method] = [reproduced(method, split, seed) for seed in SEEDS]
    for name in ("for_pooled", "for_mean"):
        config = getattr(choices, name)
        rows[name] = [row(shared_model(config, split, s), split) for s in effort.seeds]
    for name in ("personal", "alone"):
        personal = getattr(choices, name)
        rows[name] = [row(personal_models(personal, split, s), split) for s in effort.seeds]
    for epsilon in EPSILONS:
        config = with_epsilon(choices.private, epsilon)
        models = [shared_model(config, split, s) for s in effort.noise_seeds]
        rows[f"eps{epsilon:g}"] = [row(model, split) for model in models]
        if epsilon == 1.0:
            own = [tailored(choices.personal, m, split, s) for s, m in enumerate(models)]
    rows["eps1_personal"] = [row(models_of, split) for models_of in own]
    return {name: np.array(values, np.float32) for name, values in rows.items()}


def row(models: Adapter | Sequence[Adapter], split: Split) -> Floats:
    """Return one row of the table: accuracies on the split's test records."""
    return with_mean(counts(models, split) / sizes(split))


def majority(split: Split) -> Floats:
    """Return the row of always saying the commoner label of the training records."""
    pairs = [*zip(split.train, split.test, strict=True), (split.pooled_train, split.pooled_test)]
    labels = [(float(a.labels.float().mean() > 0.5), b.labels.float()) for a, b in pairs]
    return with_mean(np.array([float((b == a).float().mean()) for a, b in labels], np.float32))


def figures(rows: Rows, choices: Choices, seconds: float) -> list[Figure]:
    """Return the figures of measured rows."""

    def accuracy(
        name: str, of: str, column: int, target: str | None, peer: str | None, note: str
    ) -> Figure:
        values = rows[of][:, column]
        return Figure(
            figure=name,
            value=float(values.mean()),
            unit="",
            target=target,
            spread=(float(values.min()), float(values.max())),
            peer=peer,
            note=note,
        )

    def published(method: str, column: int) -> Figure:
        part = "mean4" if column == MEAN else "pooled"
        said = f"published {PUBLISHED[method][column]:.4f}"
        return accuracy(f"{method}.{part}", method, column, None, FLAMBY, said)

    federated = max(("for_mean", "personal"), key=lambda n: choices.validation[n][MEAN])
    own = "one model per hospital" if federated == "personal" else "one model"
    chosen = "chosen on validation folds"
    seeds = f"{len(rows['for_mean'])} seeds"
    return [
        published("pooled_training", POOLED),
        published("fedavg", POOLED),
        published("fedadam", MEAN),
        published("fedyogi", MEAN),
        Figure(
            figure="reproduction.max_difference",
            value=max_difference(rows),
            unit="",
            target=f"<= {TOLERANCE}",
            peer=FLAMBY,
            note=f"{len(PUBLISHED)} methods × 6 cells, means of {len(SEEDS)} seeds",
        ),
        accuracy(
            "best.mean4", federated, MEAN, ">= 0.731", "FedYogi .7314", f"{own}, {chosen}, {seeds}"
        ),
        accuracy("best.pooled", "for_pooled", POOLED, ">= 0.79", "pooled training .7953", chosen),
        accuracy("one_model.mean4", "for_mean", MEAN, ">= 0.731", "FedYogi .7314", chosen),
        accuracy("alone.mean4", "alone", MEAN, None, "best.mean4", f"no federation, {chosen}"),
        accuracy(
            "eps1.mean4",
            "eps1",
            MEAN,
            ">= 0.6853",
            "FLamby .6853 at nominal ε = 1",
            f"{len(rows['eps1'])} noise seeds, {chosen}",
        ),
        Figure(figure="seconds", value=seconds, unit="s", note="the whole run"),
    ]


def max_difference(rows: Rows) -> float:
    """Return the largest distance of a reproduced mean from the published one."""
    return max(
        float(np.abs(mean(rows[method]) - np.array(values)).max())
        for method, values in PUBLISHED.items()
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less work, within two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header and figures here")
    parser.add_argument("--page", action="store_true", help="write the page's table and chart, too")
    chosen = parser.parse_args(argv)
    effort = QUICK if chosen.quick else Effort()
    torch.set_num_threads(THREADS)
    started = time.perf_counter()
    tables = load(data_folder())
    choices = choose([divided(t)[0] for t in tables], effort.repeats, effort.every)
    rows = measured(published_split(tables), choices, effort)
    found = figures(rows, choices, time.perf_counter() - started)
    head = header(
        "fed_heart", packages=PACKAGES, threads=THREADS, seed=SEEDS[0], quick=chosen.quick
    )
    report(head, found, chosen.json)
    print(table(rows, choices))
    if chosen.page:
        write_between_markers(PAGE, "table", table(rows, choices))
        PICTURE.write_text(chart(rows))


if __name__ == "__main__":
    main()
