"""From the federations that were run to the tables and figures of docs/benchmarks/aggregation.md.

A unit is one cell with one seed. Rules are compared on the units that all compared rules have,
pairwise: same clients, same records, same seed. Intervals are Student's t over the paired
differences of the units, 95 %; units of one data set share test records, so they are a little
too narrow.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from benchmarks.aggregation.federation import Cell, Outcome
from benchmarks.aggregation.grid import DATASETS, NATURAL_CLIENTS, PLAIN, SEEDS, Job, Variant, rules

Results = Mapping[Job, Outcome]
Units = dict[Cell, Outcome]

CONFIDENCE = 0.95
HALVED = ("fedavg", "fedavg-skip")
DOUBLED = ("fedavg", "fedex", "flexlora", "flora")
OURS = "altqr"
COLUMNS = (
    (10, "iid"),
    (10, "dirichlet-0.5"),
    (10, "dirichlet-0.1"),
    (NATURAL_CLIENTS, "natural"),
    (4, "iid"),
    (4, "dirichlet-0.5"),
    (4, "dirichlet-0.1"),
    (50, "iid"),
    (50, "dirichlet-0.5"),
    (50, "dirichlet-0.1"),
)
# The coordinator needs no more than one weighted sum: what secure aggregation computes.
LINEAR = ("fedavg", "fedavg-skip", "altqr", "rolora", "ffa")
NAMES = {
    "fedavg": "FedIT (fedavg, absent ranks zero)",
    "fedavg-skip": "FedIT (fedavg, absent ranks skipped)",
    "ffa": "FFA-LoRA",
    "rolora": "RoLoRA",
    "altqr": "AltQR-LoRA",
    "fedex": "FedEx-LoRA",
    "flora": "FLoRA",
    "flexlora": "FlexLoRA",
    "hetlora": "HetLoRA",
}
TITLES = {"medquad": "MedQuAD", "sst2": "SST-2"}


@dataclass(frozen=True)
class Situation:
    """What a default is chosen for."""

    head: str
    epsilon: float
    ranks: str

    @property
    def title(self) -> str:
        """Return it in words."""
        ranks = "equal ranks (8)" if self.ranks == "equal" else "mixed ranks (2, 4, 8)"
        private = f"ε = {self.epsilon:g}" if self.epsilon else "no DP"
        head = "" if self.head == "fixed" else ", head trained too"
        return f"{ranks}, {private}{head}"

    def of(self, cell: Cell) -> bool:
        """Return whether a cell belongs to this situation."""
        return (cell.head, cell.epsilon, cell.ranks) == (self.head, self.epsilon, self.ranks)


SITUATIONS = tuple(
    Situation(head, epsilon, ranks)
    for head, epsilon in (("fixed", 0.0), ("fixed", 8.0), ("fixed", 3.0), ("trained", 0.0))
    for ranks in ("equal", "mixed")
)


def units(results: Results, wanted: Callable[[Cell], bool]) -> dict[str, Units]:
    """Return rule -> (cell with the rule left out -> outcome) of the plain runs wanted."""
    found: dict[str, Units] = {}
    for job, outcome in results.items():
        if job.variant == PLAIN and wanted(job.cell):
            unit = dataclasses.replace(job.cell, rule="")
            found.setdefault(job.cell.rule, {})[unit] = outcome
    return found


def shared(found: Mapping[str, Units]) -> list[Cell]:
    """Return the units that every rule has."""
    return [
        unit for unit in next(iter(found.values()), {}) if all(unit in u for u in found.values())
    ]


def paired(one: Units, other: Units) -> list[float]:
    """Return the differences one − other in points of accuracy over their common units."""
    return [100 * (one[unit].accuracy - other[unit].accuracy) for unit in one if unit in other]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return (mean, half width) of Student's interval; the half width is inf for one value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.inf
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def summary(results: Results, situation: Situation) -> str:
    """Return one row per rule over the units that all rules of the situation have, as Markdown."""
    found = units(results, situation.of)
    names = [rule for rule in rules(situation.ranks) if rule in found]
    if OURS not in names:
        return f"**{situation.title}**: not run."
    common = _most_shared(found, names)
    names = [rule for rule in names if all(unit in found[rule] for unit in common)]
    best = max(names, key=lambda rule: _mean(found[rule], common, "accuracy"))
    lines = [
        f"**{situation.title}**, {len(common)} units ({_described(common)})",
        "",
        "| rule | accuracy | macro-F1 | minus AltQR, points [95 %] | minus best [95 %] | up kB "
        "| down kB | error | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rule in sorted(names, key=lambda r: -_mean(found[r], common, "accuracy")):
        rows = {unit: found[rule][unit] for unit in common}
        ours = paired(rows, found[OURS])
        behind = paired(rows, {unit: found[best][unit] for unit in common})
        tied = rule == best or abs(interval(behind)[0]) <= interval(behind)[1]
        name = f"**{NAMES[rule]}**" if tied else NAMES[rule]
        cells = [
            f"{100 * _mean(rows, common, 'accuracy'):.1f}",
            f"{100 * _mean(rows, common, 'macro_f1'):.1f}",
            "" if rule == OURS else signed(ours),
            "best" if rule == best else signed(behind),
            f"{_mean(rows, common, 'uplink_bytes') / 1000:.1f}",
            f"{_mean(rows, common, 'downlink_bytes') / 1000:.0f}",
            _known(_mean(rows, common, "error")),
            f"{_mean(rows, common, 'cpu_seconds'):.1f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    absent = [NAMES[rule] for rule in rules(situation.ranks) if rule not in names]
    if situation.ranks == "mixed":
        absent.append("FedEx-LoRA — (refuses mixed ranks)")
    if absent:
        lines += ["", "Not run: " + ", ".join(absent) + "."]
    return "\n".join(lines)


def _known(error: float) -> str:
    return "—" if math.isnan(error) else f"{error:.2g}"


def signed(values: Sequence[float]) -> str:
    """Return the mean of paired differences with its interval."""
    mean, half = interval(values)
    return f"{mean:+.1f} ± {half:.1f}" if math.isfinite(half) else f"{mean:+.1f}"


def _most_shared(found: Mapping[str, Units], names: Sequence[str]) -> list[Cell]:
    """Return the units that AltQR has and every rule with at least half as many units has too."""
    counts = {rule: len(found[rule].keys() & found[OURS].keys()) for rule in names}
    kept = {rule: found[rule] for rule in names if 2 * counts[rule] >= counts[OURS]}
    return shared(kept)


def _mean(rows: Units, common: Sequence[Cell], name: str) -> float:
    return float(statistics.mean(getattr(rows[unit], name) for unit in common))


def _described(common: Iterable[Cell]) -> str:
    seen: dict[str, set[str]] = {}
    for unit in common:
        label = (
            unit.partition if unit.partition == "natural" else f"{unit.clients} {unit.partition}"
        )
        seen.setdefault(TITLES[unit.dataset], set()).add(label)
    return "; ".join(
        f"{name}: {', '.join(sorted(labels))}" for name, labels in sorted(seen.items())
    )


def decisions(results: Results) -> str:
    """Return, per situation, who is best among all rules and among linear ones, as Markdown."""
    lines = [
        "| situation | units | best of all | AltQR minus best [95 %] | AltQR wins or ties "
        "| best linear rule | AltQR minus best linear [95 %] | AltQR wins or ties |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for situation in SITUATIONS:
        found = units(results, situation.of)
        if OURS not in found:
            lines.append(f"| {situation.title} | not run | | | | | | |")
            continue
        common = _most_shared(found, list(found))
        among = [rule for rule in found if all(unit in found[rule] for unit in common)]
        cells = [situation.title, str(len(common))]
        for chosen in (among, [rule for rule in among if rule in LINEAR]):
            cells += _verdict(found, common, chosen)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _verdict(found: Mapping[str, Units], common: Sequence[Cell], among: Sequence[str]) -> list[str]:
    """Return [best rule, AltQR minus best, whether that is a win or a tie]."""
    best = max(among, key=lambda rule: _mean(found[rule], common, "accuracy"))
    if best == OURS:
        others = [rule for rule in among if rule != OURS]
        second = max(others, key=lambda rule: _mean(found[rule], common, "accuracy"))
        lead = paired({unit: found[OURS][unit] for unit in common}, found[second])
        return [NAMES[OURS], f"{signed(lead)} over {NAMES[second]}", "**yes**"]
    gap = paired({unit: found[OURS][unit] for unit in common}, found[best])
    mean, half = interval(gap)
    return [NAMES[best], signed(gap), "**yes**" if -mean <= half else "**no**"]


def grid_table(results: Results, situation: Situation, dataset: str) -> str:
    """Return accuracy mean ± standard deviation over seeds, rules by partitions, as Markdown."""
    columns = [c for c in COLUMNS if dataset == "medquad" or c[1] != "natural"]
    found = units(results, lambda cell: situation.of(cell) and cell.dataset == dataset)
    if not found:
        return f"{TITLES[dataset]}, {situation.title}: not run."
    texts: dict[str, list[str]] = {rule: [] for rule in rules(situation.ranks)}
    for clients, partition in columns:
        at = {
            rule: {
                unit: outcome
                for unit, outcome in rows.items()
                if (unit.clients, unit.partition) == (clients, partition)
            }
            for rule, rows in found.items()
        }
        for rule in texts:
            texts[rule].append(_entry(rule, {r: rows for r, rows in at.items() if rows}))
    heads = [p if p == "natural" else f"{k} {p.replace('dirichlet-', 'Dir ')}" for k, p in columns]
    lines = [
        f"{TITLES[dataset]}, {situation.title}",
        "",
        "| rule | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
        *(f"| {NAMES[rule]} | " + " | ".join(row) + " |" for rule, row in texts.items()),
    ]
    if situation.ranks == "mixed":
        lines.append(f"| {NAMES['fedex']} | " + " | ".join("—" for _ in heads) + " |")
    return "\n".join(lines)


def _entry(rule: str, at: Mapping[str, Units]) -> str:
    """Return one cell: bold for the best rule, ° where its lead is within the paired interval."""
    if rule not in at:
        return "not run"
    values = [100 * outcome.accuracy for outcome in at[rule].values()]
    best = max(at, key=lambda r: statistics.mean(o.accuracy for o in at[r].values()))
    text = spread(values)
    if len(values) < len(SEEDS):
        text += f" ({len(values)})"
    if rule == best:
        return f"**{text}**"
    behind = paired(at[rule], at[best])
    tied = len(behind) > 1 and abs(interval(behind)[0]) <= interval(behind)[1]
    return f"{text}°" if tied else text


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def grids(results: Results) -> str:
    """Return every grid table."""
    return "\n\n".join(
        grid_table(results, situation, dataset) for situation in SITUATIONS for dataset in DATASETS
    )


def summaries(results: Results) -> str:
    """Return every summary table."""
    return "\n\n".join(summary(results, situation) for situation in SITUATIONS)


def equal_bytes(results: Results) -> str:
    """Return AltQR against rules of both factors at the same number of bytes, as Markdown.

    One factor per round is half the uplink: the others have half of the rounds, or AltQR twice.
    """
    lines = [
        "| situation | units | AltQR | rounds | other rule | rounds | AltQR minus other [95 %] |",
        "|---|---|---|---|---|---|---|",
    ]
    for situation in SITUATIONS[:4]:
        lines += _matched(results, situation, "all", HALVED, "half")
        lines += _matched(results, situation, "double", DOUBLED, "all")
    return "\n".join(lines)


def _matched(
    results: Results, situation: Situation, rounds: str, others: Iterable[str], theirs: str
) -> list[str]:
    """Return one line per rule that was run with `theirs` rounds on units AltQR has."""
    mine = _with_rounds(results, situation, OURS, rounds)
    lines = []
    for rule in others:
        rows = _with_rounds(results, situation, rule, theirs)
        both = [unit for unit in rows if unit in mine]
        if both:
            gap = signed(paired({unit: mine[unit] for unit in both}, rows))
            lines.append(
                f"| {situation.title} | {len(both)} | {100 * _mean(mine, both, 'accuracy'):.1f} "
                f"| {rounds} | {NAMES[rule]} {100 * _mean(rows, both, 'accuracy'):.1f} "
                f"| {theirs} | {gap} |"
            )
    return lines


def _with_rounds(results: Results, situation: Situation, rule: str, rounds: str) -> Units:
    return {
        dataclasses.replace(job.cell, rule=""): outcome
        for job, outcome in results.items()
        if job.variant == Variant(rounds=rounds)
        and job.cell.rule == rule
        and situation.of(job.cell)
    }


def rates_table(rates: Mapping[tuple[object, ...], Mapping[float, float]]) -> str:
    """Return the learning rate chosen per situation and rule, as Markdown."""
    chosen: dict[tuple[object, ...], dict[str, str]] = {}
    for (dataset, head, epsilon, ranks, rule), tried in rates.items():
        best = max(sorted(tried), key=lambda rate: tried[rate])
        chosen.setdefault((dataset, head, epsilon, ranks), {})[str(rule)] = f"{best:g}"
    names = [rule for rule in NAMES if any(rule in row for row in chosen.values())]
    lines = [
        "| data | head | ε | ranks | " + " | ".join(names) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for (dataset, head, epsilon, ranks), row in chosen.items():
        cells = " | ".join(row.get(rule, "—") for rule in names)
        shown = f"{epsilon:g}" if epsilon else "none"
        lines.append(f"| {TITLES[str(dataset)]} | {head} | {shown} | {ranks} | {cells} |")
    return "\n".join(lines)
