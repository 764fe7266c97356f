from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from anabranch.client.tuning.training import make_optimizer
from anabranch.edge.runtime import optimizer
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Training

Floats = NDArray[np.float32]
SPEC = AdapterSpec(
    base="b" * 64,
    tokenizer="",
    rank=3,
    alpha=6.0,
    targets=("q",),
    tensors=(
        ("head.weight", (2, 4)),
        ("q.lora_A.weight", (3, 5)),
        ("q.lora_B.weight", (4, 3)),
    ),
)
SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=3)
TRAININGS = st.builds(
    Training,
    optimizer=st.sampled_from(["sgd", "adamw"]),
    learning_rate=st.floats(1e-4, 0.3),
    head_learning_rate=st.none() | st.floats(1e-4, 0.3),
    weight_decay=st.sampled_from([0.0, 0.01, 0.3]),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
)


def arrays_of(shapes: Any, rng: np.random.Generator, scale: float = 1.0) -> dict[str, Floats]:
    named = {f"{'head' if i == 0 else 'q'}.{i}": shape for i, shape in enumerate(shapes)}
    return {n: rng.normal(size=s, scale=scale).astype(np.float32) for n, s in named.items()}


def close(got: Mapping[str, Floats], expected: Mapping[str, Floats]) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], array, rtol=2e-6, atol=1e-6, err_msg=name)


# The same as torch


@given(TRAININGS, SHAPES, st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_steps_are_those_of_torch(training: Training, shapes: Any, seed: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    params = arrays_of(shapes, rng)
    theirs = {n: torch.nn.Parameter(torch.from_numpy(a.copy())) for n, a in params.items()}
    reference = make_optimizer(theirs, training)
    rates = [group["lr"] for group in reference.param_groups]
    state = optimizer.fresh(training, params, params)
    for step in range(steps):
        factor = 1 / (step + 1)
        gradients = arrays_of(shapes, rng, scale=2.0)
        for name, p in theirs.items():
            p.grad = torch.from_numpy(gradients[name].copy())
        for group, rate in zip(reference.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        reference.step()
        params, state = optimizer.update(training, params, gradients, state, step=step, rate=factor)
    close(params, {n: p.detach().numpy() for n, p in theirs.items()})


@given(SHAPES, st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 0.5, 1.0, 100.0]))
def test_clipping_is_that_of_torch(shapes: Any, seed: int, most: float) -> None:
    gradients = arrays_of(shapes, np.random.default_rng(seed))
    theirs = {n: torch.nn.Parameter(torch.zeros(a.shape)) for n, a in gradients.items()}
    for name, p in theirs.items():
        p.grad = torch.from_numpy(gradients[name].copy())
    torch.nn.utils.clip_grad_norm_(theirs.values(), most)
    close(
        optimizer.clip(gradients, most),
        {n: p.grad.numpy() for n, p in theirs.items() if p.grad is not None},
    )


# Literal examples


def test_one_step_of_sgd_by_hand() -> None:
    training = Training(optimizer="sgd", learning_rate=0.1, head_learning_rate=1.0, momentum=0.5)
    params = {"head.b": np.array([1.0], np.float32), "q": np.array([1.0], np.float32)}
    gradients = {name: np.array([2.0], np.float32) for name in params}
    state = optimizer.fresh(training, params, params)
    params, state = optimizer.update(training, params, gradients, state, step=0, rate=0.5)
    np.testing.assert_allclose(params["head.b"], [0.0], atol=1e-6)  # 1 − 0.5 · 1.0 · 2
    np.testing.assert_allclose(params["q"], [0.9], atol=1e-6)
    params, state = optimizer.update(training, params, gradients, state, step=1, rate=1.0)
    np.testing.assert_allclose(params["q"], [0.6], atol=1e-6)  # momentum 0.5 · 2 + 2 = 3


def test_the_proximal_term_pulls_to_the_start() -> None:
    g = {"w": np.array([1.0], np.float32)}
    w, start = {"w": np.array([5.0], np.float32)}, {"w": np.array([3.0], np.float32)}
    assert optimizer.pull(g, w, start, 0.25)["w"].tolist() == [1.5]
    assert optimizer.pull(g, w, start, 0.0)["w"] is g["w"]


def test_what_is_given_is_not_changed() -> None:
    rng = np.random.default_rng(0)
    kinds: list[Any] = ["sgd", "adamw"]
    for kind in kinds:
        training = Training(optimizer=kind, weight_decay=0.1)
        params, gradients = arrays_of([(2, 3)], rng), arrays_of([(2, 3)], rng)
        state = optimizer.fresh(training, params, params)
        before = [a.copy() for one in (params, gradients, state) for a in one.values()]
        optimizer.update(training, params, gradients, state, step=0, rate=1.0)
        optimizer.clip(gradients, 1e-3)
        after = [a for one in (params, gradients, state) for a in one.values()]
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)


# Parts


def test_only_the_part_has_gradients_and_the_rest_is_held() -> None:
    rng = np.random.default_rng(1)
    full = {n: rng.normal(size=s).astype(np.float32) for n, s in SPEC.tensors}
    masks = optimizer.masks_of(SPEC, Part(factors="B", ranks=(0, 2), dense=False))
    assert list(masks) == ["q.lora_B.weight"]

    chosen = optimizer.masked(full, masks)["q.lora_B.weight"]
    np.testing.assert_array_equal(chosen[:, [0, 2]], full["q.lora_B.weight"][:, [0, 2]])
    assert not chosen[:, 1].any()

    moved = {n: a + 1 for n, a in full.items()}
    held = optimizer.hold(moved, full, masks)["q.lora_B.weight"]
    np.testing.assert_array_equal(held[:, 1], full["q.lora_B.weight"][:, 1])
    np.testing.assert_array_equal(held[:, 0], moved["q.lora_B.weight"][:, 0])


def test_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(IncompatibleAdapter, match="from 0 to 2"):
        optimizer.masks_of(SPEC, Part(ranks=(3,)))
    with pytest.raises(IncompatibleAdapter, match="nothing of this adapter"):
        optimizer.masks_of(SPEC, Part(factors="none", dense=False))
