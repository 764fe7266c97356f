"""Step graphs of the tiny classifiers, each exported once, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.edge.export.joint import step_graph

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="session")
def steps(make_classifier: Callable[..., Classifier]) -> Callable[..., onnx.ModelProto]:
    """Return a function from kind and form to a step graph."""
    made: dict[tuple[str, bool], onnx.ModelProto] = {}

    def step(kind: str, clipped: bool = False) -> onnx.ModelProto:
        if (kind, clipped) not in made:
            made[kind, clipped] = step_graph(make_classifier(kind), clipped=clipped)
        return made[kind, clipped]

    return step


class StepSession:
    """A step in onnxruntime, with an adapter."""

    def __init__(self, step: onnx.ModelProto, classifier: Classifier) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(step.SerializeToString(), options)
        self.adapter = dict(read_adapter(classifier).arrays)

    def __call__(self, feeds: Arrays, bound: float | None = None) -> Arrays:
        extra = {} if bound is None else {"clipping_norm": np.array(bound, np.float32)}
        names = [o.name for o in self.session.get_outputs()]
        found = self.session.run(names, {**feeds, **extra, **self.adapter})
        return dict(zip(names, found, strict=True))


@pytest.fixture(scope="session")
def open_step() -> type[StepSession]:
    """Return `StepSession`."""
    return StepSession


@pytest.fixture(scope="session")
def sessions(
    steps: Callable[..., onnx.ModelProto], make_classifier: Callable[..., Classifier]
) -> Callable[..., StepSession]:
    """Return a function from kind and form to an open step with the classifier's adapter."""
    opened: dict[tuple[str, bool], StepSession] = {}

    def session(kind: str, clipped: bool = False) -> StepSession:
        if (kind, clipped) not in opened:
            opened[kind, clipped] = StepSession(steps(kind, clipped), make_classifier(kind))
        return opened[kind, clipped]

    return session


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Arrays]:
    """Return a function from a kind to feeds of a step, without the adapter."""
    return batch


def batch(kind: str, rows: int = 6, tokens: int = 9, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 1.0, rows).astype(np.float32)
    found: Arrays = {"labels": rng.integers(0, 3, rows), "weights": weights}
    if kind == "text":
        mask = np.ones((rows, tokens), np.int64)
        mask[1::2, tokens // 2 :] = 0
        return {
            "input_ids": rng.integers(5, 60, (rows, tokens)) * mask,
            "attention_mask": mask,
            **found,
        }
    if kind == "image":
        return {"pixels": rng.random((rows, 1, 12, 12), np.float32), **found}
    return {"features": rng.standard_normal((rows, 5), np.float32), **found}
