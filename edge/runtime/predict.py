"""Classify with a bundle, under its released adapter or any other one.

    predictor = Predictor.open(bundle, precision="int8")
    predictor.classify(["Acute myocardial infarction"])   ->   [("Circulatory", 0.97)]
    predictor.use(personal)                                     the same session, other tensors

The adapter's tensors are inputs of the graph with the released values as their defaults: using
another adapter costs its bytes, and changes nothing else. Memory is bounded by the manifest
(memory.py), whatever the number of inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from anabranch.edge.runtime.bundle_manifest import Graph, Limits, Precision, key
from anabranch.edge.runtime.classify import Inputs, batches, rank
from anabranch.edge.runtime.data import Records
from anabranch.edge.runtime.engine import Engine, Feeds, Floats
from anabranch.edge.runtime.joint import load, require_inputs, run
from anabranch.edge.runtime.memory import cut, micro_batches, narrowed, records_of
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import BundleError
from anabranch.protocols.spec import require_same_spec

if TYPE_CHECKING:
    import onnxruntime

    from anabranch.edge.runtime.bundle import Bundle

EVALUATE = 64  # records sorted by length and given to the engine at once


@dataclass(eq=False)
class Predictor:
    """A bundle's inference graph with an adapter in it. Not safe for two threads."""

    bundle: Bundle
    precision: Precision
    _graph: Graph
    _limits: Limits
    _session: onnxruntime.InferenceSession
    _fed: dict[str, Floats] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        precision: Precision = "int8",
        adapter: Adapter | None = None,
        threads: int = 1,
        memory_bytes: int | None = None,
    ) -> Predictor:
        """Load the inference graph of `precision`; `adapter` None is the released one.

        Raises BundleError if the bundle has no such graph or it cannot be loaded, DeviceError
        if one record of one token needs more memory than the limit, IncompatibleAdapter for an
        adapter of another spec.
        """
        if threads < 1:
            raise ValueError(f"expected threads >= 1, got {threads}")
        manifest = bundle.manifest
        graph = manifest.graph("infer", precision)
        if graph is None:
            have = [p for p in ("fp32", "int8", "int4") if manifest.graph("infer", p)]
            raise BundleError(
                f"bundle {manifest.name}: has no graph {key('infer', precision)}; "
                f"it infers in {', '.join(have) or 'no precision'}"
            )
        limits = narrowed(manifest.limits, memory_bytes)
        micro_batches([1], graph.memory, limits)
        session = load(bundle.folder, graph, threads=threads)
        names = [*manifest.inputs, *manifest.spec.shapes]
        require_inputs(session, graph, dict.fromkeys(names, np.zeros(0)))
        predictor = cls(bundle, precision, graph, limits, session)
        predictor.use(adapter)
        return predictor

    def use(self, adapter: Adapter | None) -> None:
        """Take another adapter from now on, or the released one for None.

        Raises IncompatibleAdapter, with nothing changed, for an adapter of another spec.
        """
        if adapter is None:
            self._fed = {}
            return
        require_same_spec(self.bundle.manifest.spec, adapter.spec)
        self._fed = {name: array.copy() for name, array in adapter.arrays.items()}

    def classify(self, inputs: Inputs) -> list[tuple[str, float]]:
        """Return (most probable label, its probability) for every input."""
        return [best for (best,) in self.ranked(inputs, top=1)]

    def ranked(self, inputs: Inputs, *, top: int | None = None) -> list[list[tuple[str, float]]]:
        """Return the `top` labels (all, if None) of every input, the most probable first."""
        return rank(self.logits(inputs), self.bundle.manifest.labels, top)

    def logits(self, inputs: Inputs) -> Floats:
        """Return logits (n, labels) for texts, images (n, C, S, S) or table rows (n, F).

        Raises DataError when the inputs are not what this model takes, DeviceError when one of
        them does not fit into memory.
        """
        manifest = self.bundle.manifest
        result = np.empty((len(inputs), len(manifest.labels)), np.float32)
        tokenizer = self.bundle.tokenizer
        for rows, feeds in batches(inputs, manifest.inputs, manifest.shape, tokenizer):
            result[rows] = self.run(feeds)
        return result

    def run(self, feeds: Feeds) -> Floats:
        """Return the logits (B, labels) of prepared model inputs."""
        manifest = self.bundle.manifest
        logits = np.empty((records_of(feeds), len(manifest.labels)), np.float32)
        for rows, piece in cut(manifest, self._graph.memory, self._limits, feeds):
            fed = {**piece, **self._fed}
            (logits[rows],) = run(self._session, self._graph, ["logits"], fed)
        return logits


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well an adapter does on n records: accuracy, then cross-entropy in nats."""

    records: int
    accuracy: float
    loss: float

    def at_least(self, other: Score) -> bool:
        """Return whether this is not worse: higher accuracy, or equal and no higher loss.

        What is not finite is worse than everything.
        """
        if not math.isfinite(self.loss) or not math.isfinite(other.loss):
            return math.isfinite(self.loss)
        return (self.accuracy, -self.loss) >= (other.accuracy, -other.loss)


def evaluate(engine: Engine, records: Records) -> Score:
    """Return the engine's score on records, under its adapter. Raises ValueError without any."""
    if not len(records):
        raise ValueError("expected at least one record to evaluate on")
    order = np.argsort(records.lengths, kind="stable")
    right, loss = 0, 0.0
    for start in range(0, len(order), EVALUATE):
        rows = order[start : start + EVALUATE]
        z = engine.predict(records.feeds(rows)).astype(np.float64)
        y = records.labels[rows]
        top = z.max(axis=1, keepdims=True)
        logs = z - top - np.log(np.exp(z - top).sum(axis=1, keepdims=True))
        right += int(np.sum(z.argmax(axis=1) == y))
        loss -= float(logs[np.arange(len(y)), y].sum())
    return Score(records=len(records), accuracy=right / len(records), loss=loss / len(records))
