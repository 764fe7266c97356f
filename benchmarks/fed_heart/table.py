"""The table, the choices and the chart of the page, from measured rows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from anabranch.protocols.config import RunConfig
from anabranch.server.charts import Comparison, comparison_svg
from benchmarks.fed_heart.data import PATIENTS, Floats
from benchmarks.fed_heart.ours import Choices, Personal
from benchmarks.fed_heart.published import (
    PUBLISHED,
    PUBLISHED_PRIVATE,
    nominal_epsilon,
)

EPSILONS = tuple(PUBLISHED_PRIVATE)
NAMES = {
    "majority": "each hospital's commoner label",
    "pooled_training": "pooled training",
    "local": "local",
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fedadagrad": "FedAdagrad",
    "for_pooled": "**ours**, one model, chosen for the pooled test",
    "for_mean": "**ours**, one model, chosen for the mean of four",
    "personal": "**ours**, one model per hospital",
    "alone": "the same steps alone, no federation",
    **{f"eps{e:g}": f"**ours**, one model, ε = {e:g}" for e in EPSILONS},
    "eps1_personal": "**ours**, ε = 1, one model per hospital",
}
HEAD = "| | Cleveland | Hungary | Switzerland | VA | mean of 4 | pooled test |"
RULE = "|---|--:|--:|--:|--:|--:|--:|"
CHART = (
    "majority",
    "local",
    "fedavg",
    "fedadam",
    "fedyogi",
    "pooled_training",
    "for_mean",
    "alone",
    "personal",
    "eps1",
    "eps0.1",
)

Rows = Mapping[str, Floats]  # name -> (seeds, 6)


def table(rows: Rows, choices: Choices) -> str:
    """Return the page's tables as Markdown: test accuracy, privacy, and what was chosen."""
    lines = [HEAD, RULE]
    for name, values in rows.items():
        cells = [f"{m:.4f} ± {s:.4f}" for m, s in zip(mean(values), deviation(values), strict=True)]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
        if name in PUBLISHED:
            published = " | ".join(f"{value:.4f}" for value in PUBLISHED[name])
            lines.append(f"| … published | {published} |")
    return "\n".join([*lines, "", *private_table(rows), "", *chosen_table(choices)])


def private_table(rows: Rows) -> list[str]:
    """Return accuracy against ε, and what the published ε come to when every step counts."""
    lines = [
        "| ε | ours, mean of 4 | ours, pooled | published, mean of 4 | ε of the published run |",
        "|--:|--:|--:|--:|--:|",
    ]
    for epsilon, published in PUBLISHED_PRIVATE.items():
        values = rows[f"eps{epsilon:g}"]
        m, s = mean(values), deviation(values)
        lines.append(
            f"| {epsilon:g} | {m[4]:.4f} ± {s[4]:.4f} | {m[5]:.4f} ± {s[5]:.4f} "
            f"| {published:.4f} | {true_epsilons(epsilon)} |"
        )
    return lines


def true_epsilons(nominal: float) -> str:
    """Return the smallest and the largest ε over the hospitals of a published run."""
    found = [nominal_epsilon(nominal, train) for train, _ in PATIENTS.values()]
    low, high = (f"{x:.3g}" if math.isfinite(x) else "over 100" for x in (min(found), max(found)))
    return low if low == high else f"{low} to {high}"


def chosen_table(choices: Choices) -> list[str]:
    """Return what validation chose, with its validation accuracies."""
    lines = [
        "| chosen | validation, mean of 4 | validation, pooled | what |",
        "|---|--:|--:|---|",
    ]
    for name, row in choices.validation.items():
        what = getattr(choices, name)
        said = of_personal(what) if isinstance(what, Personal) else of_run(what)
        lines.append(f"| `{name}` | {row[4]:.4f} | {row[5]:.4f} | {said} |")
    return lines


def of_run(config: RunConfig) -> str:
    """Return a federated configuration in words."""
    federation, training, server = config.federation, config.training, config.server
    parts = [f"{federation.rounds} rounds", f"weighting {federation.weighting}", of_steps(config)]
    if server is not None:
        parts.append(f"server {server.optimizer} at {server.learning_rate:g}")
    if federation.normalize_steps:
        parts.append("FedNova")
    if config.privacy is not None:
        parts.append(f"clipping {config.privacy.clipping}, C = {config.privacy.clipping_norm:g}")
    return f"SGD at {training.learning_rate:g}; " + "; ".join(parts)


def of_steps(config: RunConfig) -> str:
    """Return the local work of a round in words."""
    training = config.training
    if training.local_steps is None:
        return f"{training.local_epochs} epoch of batches of {training.batch_size} per round"
    batch = "all records" if config.privacy else f"{training.batch_size}"
    count = "1 step" if training.local_steps == 1 else f"{training.local_steps} steps"
    return f"{count} of {batch} per round"


def of_personal(personal: Personal) -> str:
    """Return the further steps in words."""
    training = personal.training
    steps = f"{training.local_steps} steps of {training.batch_size}, SGD at "
    said = f"{steps}{training.learning_rate:g}, λ = {personal.pull:g}"
    return (
        f"from zero: {said}" if personal.base is None else f"{of_run(personal.base)}; then {said}"
    )


def chart(rows: Rows) -> str:
    """Return the mean of the four hospitals as an SVG file."""
    bars = [
        Comparison(
            name=NAMES[name].replace("*", ""),
            accuracy=float(mean(rows[name])[4]),
            ours=name in ("for_mean", "personal") or name.startswith("eps"),
        )
        for name in CHART
    ]
    return str(
        comparison_svg(
            bars,
            title="Fed-Heart-Disease: mean of four hospitals",
            subtitle="test accuracy, mean over seeds; ε: local DP at every hospital, δ = 1e-4",
        )
    )


def mean(values: Floats) -> Floats:
    """Return the mean over the seeds, (6,)."""
    return np.asarray(values.mean(axis=0), np.float32)


def deviation(values: Floats) -> Floats:
    """Return the standard deviation (n − 1) over the seeds, (6,); 0 of one seed."""
    if len(values) == 1:
        return np.zeros(values.shape[1], np.float32)
    return np.asarray(values.std(axis=0, ddof=1), np.float32)
