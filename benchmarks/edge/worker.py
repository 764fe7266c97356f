"""What runs on the device: the product's edge runtime alone, asked by run.py through a pipe.

One JSON object per line in, one per line out. Run by the interpreter of a device's environment
(.venv-edge: stock onnxruntime, no torch); for engine "ort-training" by one with that build.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

if "torch" not in sys.modules:
    sys.modules["torch"] = None  # type: ignore[assignment]  # the training build would load it

import numpy as np

from anabranch.edge.runtime.bundle import open_bundle
from anabranch.edge.runtime.bundle_manifest import Precision
from anabranch.edge.runtime.data import read_records
from anabranch.edge.runtime.engine import Batch, EngineName
from anabranch.edge.runtime.joint import open_engine
from anabranch.edge.runtime.measure import made_up, peak_bytes
from anabranch.edge.runtime.optimizer import fresh, update
from anabranch.edge.runtime.predict import Predictor
from anabranch.edge.runtime.training import train
from anabranch.protocols import wire


class Worker:
    """Keeps what it has opened between requests."""

    def __init__(self) -> None:
        self.bundle: Any = None
        self.engines: dict[tuple[str, str], Any] = {}

    def open(self, folder: str, key: str) -> dict[str, Any]:
        self.bundle = open_bundle(Path(folder), trusted=[bytes.fromhex(key)])
        return {"digest": self.bundle.digest}

    def engine(
        self, engine: EngineName, precision: Precision, memory_bytes: int | None = None
    ) -> Any:
        at = (engine, precision)
        if at not in self.engines:
            self.engines[at] = open_engine(
                self.bundle,
                engine=engine,
                precision=precision,
                threads=1,
                memory_bytes=memory_bytes,
            )
        return self.engines[at]

    def step(
        self,
        engine: EngineName,
        precision: Precision,
        records: int,
        tokens: int,
        count: int,
        clip: float | None,
    ) -> dict[str, Any]:
        """Return CPU seconds of each of `count` gradient steps on one whole batch."""
        run = self.engine(engine, precision, 1 << 40)
        feeds = made_up(self.bundle.manifest, records, tokens)
        labels = np.arange(records, dtype=np.int64) % len(self.bundle.manifest.labels)
        weights = np.full(records, 1 / records if clip is None else 1, np.float32)
        seconds = []
        for _ in range(count):
            began = time.process_time()
            run.grads(Batch(feeds, labels, weights), clipping_norm=clip)
            seconds.append(time.process_time() - began)
        return {"seconds": seconds}

    def memory(
        self, engine: EngineName, precision: Precision, records: int, tokens: int, micro: int
    ) -> dict[str, Any]:
        """Return the peak of this whole process over AdamW steps of `records`, in micro-batches."""
        run = self.engine(engine, precision, 1 << 40)
        manifest = self.bundle.manifest
        params, training = run.params(), manifest.training
        state = fresh(training, params, params)
        for step in range(6):
            feeds = made_up(manifest, records, tokens, seed=step)
            labels = np.arange(records, dtype=np.int64) % len(manifest.labels)
            sums = {name: np.zeros_like(value) for name, value in params.items()}
            for at in range(0, records, micro):
                part = {name: value[at : at + micro] for name, value in feeds.items()}
                weights = np.full(len(labels[at : at + micro]), 1 / records, np.float32)
                found = run.grads(Batch(part, labels[at : at + micro], weights))
                for name, value in found.arrays.items():
                    sums[name] += value
            params, state = update(training, params, sums, state, step=step, rate=1.0)
            run.set_params(params)
        return {"peak": peak_bytes()}

    def train(self, precision: Precision, data: str, steps: int, out: str) -> dict[str, Any]:
        """Train from the bundle's adapter; return losses, write the adapter's frame."""
        records = read_records(Path(data), self.bundle.manifest, self.bundle.tokenizer)
        engine = self.engine("joint", precision, 1 << 40)
        engine.set_params(self.bundle.adapter.arrays)
        done = train(engine, records, self.bundle.manifest.training, steps=steps, seed=0)
        Path(out).write_bytes(wire.encode(done.adapter))
        return {"losses": list(map(float, done.losses)), "seconds": done.seconds}

    def accuracy(self, precision: Precision, data: str, adapter: str) -> dict[str, Any]:
        """Return the accuracy of an adapter over the inference graph of a precision."""
        frame = Path(adapter).read_bytes()
        loaded = wire.decode_adapter(frame, self.bundle.manifest.spec)
        rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
        labels = np.array([self.bundle.manifest.labels.index(row["label"]) for row in rows])
        predictor = Predictor.open(
            self.bundle,
            precision=precision,
            adapter=loaded,
            threads=1,
        )
        logits = predictor.logits([row["text"] for row in rows])
        return {"accuracy": float((logits.argmax(1) == labels).mean())}

    def latency(self, precision: Precision, count: int, tokens: int) -> dict[str, Any]:
        """Return CPU seconds of single records of `tokens` tokens."""
        predictor = Predictor.open(self.bundle, precision=precision, threads=1)
        feeds = made_up(self.bundle.manifest, 1, tokens)
        seconds = []
        for _ in range(count):
            began = time.process_time()
            predictor.run(feeds)
            seconds.append(time.process_time() - began)
        return {"seconds": seconds}

    def adapters(self, data: str, adapters: list[str]) -> dict[str, Any]:
        """Return whether logits under each adapter are the same bits before and after a switch."""
        texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()[:16]]
        found: list[bytes] = []
        predictor = Predictor.open(self.bundle, precision="int8", threads=1)
        for path in adapters:
            adapter = wire.decode_adapter(Path(path).read_bytes(), self.bundle.manifest.spec)
            predictor.use(adapter)
            found.append(predictor.logits(texts).tobytes())
        return {"same": found[0] == found[-1], "different": found[0] != found[1]}


def main() -> None:
    """Answer requests until the pipe closes."""
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("op"))(**request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
