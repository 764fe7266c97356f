"""What merging costs: the throughput of weighted_mean, and its memory for many clients.

    merge.bandwidth_ratio      seconds of `total += delta` in float32, over those of weighted_mean
                               on the same deltas: 1 is as fast as a plain sum. One thread, CPU
                               seconds, both in turn in one process; 32 deltas come round, so
                               they are read from memory and not from a cache.
    merge.peak_ratio_1000_to_10    peak of what is allocated while a stream of clients is merged,
                               1,000 clients over 10. Every delta of the stream is new.

Deltas have a million values: eight layers of 4096 × 4096 with rank 16, A and B alike.
"""

from __future__ import annotations

import statistics
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from anabranch.protocols.adapter import Delta
from anabranch.protocols.spec import LORA_A, LORA_B, AdapterSpec
from anabranch.server.aggregation.mean import weighted_mean
from benchmarks.harness import Figure, alternate, header, options, ratio, report

RANK, WIDTH, LAYERS = 16, 4096, 8
DISTINCT = 32  # 134 MB of deltas
SEED = 0


def figures(quick: bool) -> list[Figure]:
    """Return the figures of the module's docstring."""
    return [_bandwidth(quick), _peak()]


def spec() -> AdapterSpec:
    """Return the spec of an adapter with 1,048,576 values."""
    targets = tuple(f"layer.{i}.query" for i in range(LAYERS))
    tensors: dict[str, tuple[int, ...]] = {}
    for name in targets:
        tensors |= {name + LORA_A: (RANK, WIDTH), name + LORA_B: (WIDTH, RANK)}
    return AdapterSpec(
        base="0" * 64,
        tokenizer="",
        rank=RANK,
        alpha=float(RANK),
        targets=targets,
        tensors=tuple(sorted(tensors.items())),
    )


def _deltas(count: int) -> list[Delta]:
    rng, shapes = np.random.default_rng(SEED), spec()
    return [
        Delta(
            shapes,
            {n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.tensors},
            100 + 17 * k,
        )
        for k in range(count)
    ]


def _bandwidth(quick: bool) -> Figure:
    clients, repeats = (100, 3) if quick else (1000, 7)
    deltas = _deltas(DISTINCT)

    def plain() -> None:
        total = {name: np.zeros(shape, np.float32) for name, shape in spec().tensors}
        for k in range(clients):
            for name, array in deltas[k % DISTINCT].arrays.items():
                total[name] += array

    def mean() -> None:
        weighted_mean((d, float(d.num_examples)) for d in _again(deltas, clients))

    mean()
    seconds = alternate({"plain": plain, "mean": mean}, repeats, clock=time.process_time)
    value, spread = ratio(seconds["plain"], seconds["mean"])
    gigabytes = clients * spec().num_values * 4 / 1e9
    speeds = {name: gigabytes / statistics.median(taken) for name, taken in seconds.items()}
    return Figure(
        figure="merge.bandwidth_ratio",
        value=value,
        unit="ratio",
        target=">= 0.6",
        spread=spread,
        peer=f"numpy {np.__version__}, total += delta in float32",
        note=f"{clients} clients; {speeds['mean']:.1f} against {speeds['plain']:.1f} GB/s",
    )


def _again(deltas: list[Delta], clients: int) -> Iterator[Delta]:
    return (deltas[k % len(deltas)] for k in range(clients))


def _peak() -> Figure:
    [pattern] = _deltas(1)
    peaks = {clients: _peak_of(pattern, clients) for clients in (10, 100, 1000)}
    listed = ", ".join(f"{peak / 1e6:.1f} MB for {clients:,}" for clients, peak in peaks.items())
    return Figure(
        figure="merge.peak_ratio_1000_to_10",
        value=peaks[1000] / peaks[10],
        unit="ratio",
        target="<= 1.1",
        note=f"{listed} clients; a delta is {pattern.spec.num_values * 4 / 1e6:.1f} MB",
    )


def _peak_of(pattern: Delta, clients: int) -> int:
    """Return the most bytes that NumPy and Python held while so many clients were merged."""

    def stream() -> Iterator[tuple[Delta, float]]:
        for k in range(clients):
            arrays = {name: array.copy() for name, array in pattern.arrays.items()}
            yield Delta(pattern.spec, arrays, 1), 1.0 + k

    tracemalloc.start()
    weighted_mean(stream())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    """Print the figures."""
    chosen = options(__doc__)
    head = header("merge", packages=["numpy"], threads=1, seed=SEED, quick=chosen.quick)
    report(head, figures(chosen.quick), chosen.json)


if __name__ == "__main__":
    main()
