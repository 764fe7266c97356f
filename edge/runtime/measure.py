"""Time and peak memory of one engine or predictor, each in a process of its own.

`measure(job)` starts a fresh interpreter, so that nothing of the caller (torch, another graph)
counts. Peak memory is the resident set of that whole process, mapped weights included, reset
before every point where the system allows it (Linux: /proc/self/clear_refs).
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from anabranch.edge.runtime import bundle_manifest as names
from anabranch.edge.runtime.bundle import Bundle
from anabranch.edge.runtime.bundle_manifest import Manifest, Memory, Precision, Role
from anabranch.edge.runtime.engine import Batch, EngineName, Feeds
from anabranch.edge.runtime.manifest import TOKENIZER
from anabranch.edge.runtime.tokenizer import WordPiece, parse
from anabranch.protocols import wire
from anabranch.protocols.errors import BundleError

MARGIN = 1.05  # of the measured peaks: another allocator, another kernel
STATUS = Path("/proc/self/status")
CLIPPING_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run: `points` are (records, tokens); images and tables have 1 token."""

    folder: str
    role: Role
    precision: Precision
    points: tuple[tuple[int, int], ...]
    engine: EngineName = "joint"
    threads: int = 1
    repeats: int = 3


@dataclass(frozen=True)
class Point:
    """One shape: seconds of each repeat (wall, CPU), and the process's peak in bytes."""

    records: int
    tokens: int
    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    peak: int

    @property
    def cpu_ms(self) -> float:
        """Median CPU time of a call in milliseconds."""
        return 1000 * statistics.median(self.cpu)


def measure(job: Job) -> list[Point]:
    """Run a job in a fresh process. Raises BundleError with its last words if it fails.

    The bundle's signature is not checked: the caller has opened it, or is making it.
    """
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": str(job.threads)}
    done = subprocess.run(
        [sys.executable, "-m", "anabranch.edge.runtime.measure"],
        input=json.dumps(asdict(job)),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BundleError(f"{job.role}.{job.precision} in {job.folder}: measuring failed: {last}")
    return [Point(**one) for one in json.loads(done.stdout)]


def memory_model(points: Sequence[Point]) -> Memory:
    """Return a model of the peaks that lies above every one of them, with MARGIN.

    Least squares with non-negative terms (all subsets of the three slopes are tried), then
    `fixed` is raised until no measured peak is above it.
    """
    rows = np.array([[1, p.records, p.records * p.tokens, p.records * p.tokens**2] for p in points])
    peaks = np.array([p.peak for p in points], float)
    best: tuple[float, np.ndarray] | None = None
    for subset in range(8):
        columns = [0] + [i + 1 for i in range(3) if subset >> i & 1]
        if len(columns) > len(points):
            continue
        found = np.linalg.lstsq(rows[:, columns], peaks, rcond=None)[0]
        found[(found < 0) & (found > -0.5)] = 0  # bytes: rounding of a term that is not there
        if (found < 0).any():
            continue
        terms = np.zeros(4)
        terms[columns] = found
        error = float(((rows @ terms - peaks) ** 2).sum())
        if best is None or error < best[0]:
            best = error, terms
    if best is None:
        raise ValueError(f"no model fits the peaks {peaks.tolist()}")
    terms = best[1]
    terms[0] += max(0.0, float((peaks - rows @ terms).max()))
    fixed, record, token, pair = (int(np.ceil(MARGIN * t)) for t in terms)
    return Memory(fixed=fixed, per_record=record, per_token=token, per_pair=pair)


def unverified(folder: Path) -> Bundle:
    """Return the bundle in `folder` as it lies there, for measuring alone."""
    data = (folder / names.MANIFEST).read_bytes()
    manifest = msgspec.json.decode(data, type=Manifest)
    adapter = wire.decode_adapter((folder / names.ADAPTER).read_bytes(), manifest.spec)
    words = folder / TOKENIZER
    return Bundle(
        folder=folder,
        manifest=manifest,
        digest=wire.digest(data),
        adapter=adapter,
        tokenizer=WordPiece(parse(words.read_bytes())) if words.exists() else None,
    )


def made_up(manifest: Manifest, records: int, tokens: int, seed: int = 0) -> Feeds:
    """Return model inputs of a shape; values do not matter for time and memory."""
    rng = np.random.default_rng(seed)
    if not manifest.shape:
        shape = (records, tokens)
        ids = rng.integers(1, 100, shape)
        return dict(zip(manifest.inputs, (ids, np.ones(shape, np.int64)), strict=True))
    values = rng.standard_normal((records, *manifest.shape)).astype(np.float32)
    return {manifest.inputs[0]: values}


def _run(job: Job) -> list[Point]:
    from anabranch.edge.runtime.joint import open_engine
    from anabranch.edge.runtime.predict import Predictor

    bundle = unverified(Path(job.folder))
    manifest = bundle.manifest
    labels = len(manifest.labels)
    if job.role == "infer":
        predictor = Predictor.open(bundle, precision=job.precision, threads=job.threads)
        call: Any = predictor.run
    else:
        engine = open_engine(
            bundle, engine=job.engine, precision=job.precision, threads=job.threads
        )
        clip = CLIPPING_NORM if job.role == "train_step_dp" else None

        def call(feeds: Feeds) -> object:
            rows = len(next(iter(feeds.values())))
            y = np.arange(rows, dtype=np.int64) % labels
            weights = np.full(rows, 1 if clip else 1 / rows, np.float32)
            return engine.grads(Batch(feeds, y, weights), clipping_norm=clip)

    points = []
    for records, tokens in job.points:
        feeds = made_up(manifest, records, tokens)
        reset_peak()
        wall, cpu = [], []
        for _ in range(job.repeats):
            began, busy = time.perf_counter(), time.process_time()
            call(feeds)
            wall.append(time.perf_counter() - began)
            cpu.append(time.process_time() - busy)
        points.append(Point(records, tokens, tuple(wall), tuple(cpu), peak_bytes()))
    return points


def reset_peak() -> None:
    """Start the peak anew where the system can; elsewhere it stays that of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the largest resident set of this process in bytes."""
    if STATUS.exists():
        line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _main() -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # the training build would load it
    job = json.loads(sys.stdin.read())
    job["points"] = tuple(tuple(point) for point in job["points"])
    sys.stdout.write(json.dumps([asdict(point) for point in _run(Job(**job))]))


if __name__ == "__main__":
    _main()
