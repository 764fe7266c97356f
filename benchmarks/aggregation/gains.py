"""The figures that are read off the grid, and those of the uplink.

mixed_ranks.gain_points_naive     best one-factor or product-space rule minus fedavg "skip"
mixed_ranks.gain_points_padding   the same minus fedavg "zero"
uplink.ratio_floats               values of AltQR / values of FedIT, an even number of rounds
uplink.ratio_int8_bytes           frames of AltQR in int8 / frames of FedIT in fp32
uplink.int8_loss_points           accuracy that int8 costs (robustness.py runs it)
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from anabranch.protocols import wire
from anabranch.protocols.adapter import Delta
from anabranch.protocols.codecs.codec import CodecName
from anabranch.protocols.config import RunConfig
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Method
from anabranch.server.aggregation.choose import rule_for
from benchmarks.aggregation.federation import RANK, Cell, Outcome
from benchmarks.aggregation.grid import DATASETS, Job
from benchmarks.aggregation.model import INNER, TARGET, WIDTH
from benchmarks.aggregation.tables import OURS, TITLES, Situation, interval, paired, units
from benchmarks.harness import Figure

MIXED = Situation("fixed", 0.0, "mixed")
CHALLENGERS = ("altqr", "rolora", "ffa", "flexlora", "flora")


def int8_loss(points: Sequence[float]) -> list[Figure]:
    """Return the accuracy that int8 costs, from paired losses in points; none if not run."""
    if not points:
        return []
    mean, half = interval(points)
    return [
        Figure(
            figure="uplink.int8_loss_points",
            value=mean,
            unit="points",
            target="<= 0.5",
            spread=(mean - half, mean + half),
            peer="AltQR, fp32",
            note=f"MedQuAD, {len(points)} paired runs over partitions and seeds, spread: 95 %",
        )
    ]


def mixed_ranks(results: Mapping[Job, Outcome]) -> list[Figure]:
    """Return the gains over both ways of averaging factors of mixed ranks; none if not run."""
    figures = []
    for name, rival in (("naive", "fedavg-skip"), ("padding", "fedavg")):
        rows = [row for dataset in DATASETS for row in _gains(results, dataset, rival)]
        if not rows:
            continue
        mean, half, count, rule, dataset = max(rows, key=lambda row: row[0] - row[1])
        ours = ", ".join(f"{TITLES[d]} {m:+.1f}" for m, _, _, r, d in rows if r == OURS)
        figures.append(
            Figure(
                figure=f"mixed_ranks.gain_points_{name}",
                value=mean,
                unit="points",
                target=">= 3",
                spread=(mean - half, mean + half),
                peer=f"fedavg, absent_ranks = {'skip' if name == 'naive' else 'zero'}",
                note=f"{rule} on {TITLES[dataset]}, mean of {count} paired runs, spread: 95 %; "
                f"no more bytes; AltQR: {ours}",
            )
        )
    return figures


def _gains(
    results: Mapping[Job, Outcome], dataset: str, rival: str
) -> list[tuple[float, float, int, str, str]]:
    """Return (mean gain, half width, pairs, rule, data set) of every rule that sends no more."""
    found = units(results, lambda cell: MIXED.of(cell) and cell.dataset == dataset)
    rows = []
    for rule in CHALLENGERS:
        points = paired(found.get(rule, {}), found.get(rival, {}))
        if points and _bytes(found[rule]) <= 1.001 * _bytes(found[rival]):  # headers differ a bit
            rows.append((*interval(points), len(points), rule, dataset))
    return rows


def _bytes(rows: Mapping[Cell, Outcome]) -> float:
    return statistics.mean(outcome.uplink_bytes for outcome in rows.values())


def uplink(config: RunConfig) -> list[Figure]:
    """Return how much smaller AltQR's uplink is than FedIT's, for the benchmark's layer."""
    labels = len(config.task.labels)
    bare, headed = _sizes(config, None), _sizes(config, labels)
    return [
        Figure(
            figure="uplink.ratio_floats",
            value=bare["floats"],
            unit="ratio",
            target="<= 0.5",
            peer="fedavg (FedIT)",
            note=f"AltQR, factors of {TARGET}, rounds 1 and 2; with the head of {labels} labels "
            f"{headed['floats']:.3f}; FedEx sends what FedIT sends",
        ),
        Figure(
            figure="uplink.ratio_int8_bytes",
            value=bare["int8"],
            unit="ratio",
            target="<= 0.14",
            peer="fedavg (FedIT), fp32",
            note=f"AltQR, whole frames; with the head {headed['int8']:.3f}",
        ),
    ]


def _sizes(config: RunConfig, labels: int | None) -> dict[str, float]:
    """Return AltQR / FedIT in values and in bytes (int8 / fp32), frames of two rounds."""
    ours, theirs = (
        _two_rounds(config, "altqr", "int8", labels),
        _two_rounds(config, "fedavg", "fp32", labels),
    )
    return {"floats": ours[0] / theirs[0], "int8": ours[1] / theirs[1]}


def _two_rounds(
    config: RunConfig, method: Method, codec: CodecName, labels: int | None
) -> tuple[int, int]:
    """Return (values, bytes) that a client sends in rounds 1 and 2."""
    federation = msgspec.structs.replace(config.federation, method=method)
    rule = rule_for(msgspec.structs.replace(config, federation=federation))
    spec, rng = _spec(labels), np.random.default_rng(0)
    values = size = 0
    for number in (1, 2):
        part = rule.part(spec, number, "0", RANK)
        shapes = part.shapes(spec)
        arrays = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        frame = wire.encode(Delta(spec, arrays, 100, part=part), codec=codec, rng=rng)
        values += sum(array.size for array in arrays.values())
        size += len(frame)
    return values, size


def _spec(labels: int | None) -> AdapterSpec:
    """Return the adapter of the benchmark, with a head of so many labels or without one."""
    tensors: dict[str, tuple[int, ...]] = {
        f"{TARGET}.lora_A.weight": (RANK, INNER),
        f"{TARGET}.lora_B.weight": (WIDTH, RANK),
    }
    if labels is not None:
        tensors |= {"head.bias": (labels,), "head.weight": (labels, WIDTH)}
    return AdapterSpec(
        base="0" * 64,
        tokenizer="0" * 64,
        rank=RANK,
        alpha=2.0 * RANK,
        targets=(TARGET,),
        tensors=tuple(sorted(tensors.items())),
    )
