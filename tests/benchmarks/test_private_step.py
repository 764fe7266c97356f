"""The benchmark of the private step measures variants that compute the same."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import trainable_parameters
from benchmarks import harness
from benchmarks.private_step import equality, memory, run, steps, workloads
from benchmarks.private_step.equality import NO_CLIPPING, SILENT
from benchmarks.private_step.workloads import Workload

SMALL = Workload(width=24, layers=2, heads=3, batch=5, tokens=6)
EVERY = {
    f"{title}.{name}"
    for name in workloads.WORKLOADS
    for title in (
        "ratio_plain",
        "speedup_hooks",
        "speedup_ghost",
        "speedup_ew",
        "speedup_own_opacus",
        "memory_ratio_plain",
        "noise.share",
    )
} | {"equality.norms", "equality.sums", "memory_ratio_hooks.minilm"}


@pytest.fixture(scope="module")
def batch() -> Examples:
    return workloads.batch(SMALL, workloads.classifier(SMALL))


def moved(variant: str, batch: Examples, clipping_norm: float) -> Tensor:
    """Return how far one step of learning rate 1, without noise, moves the trained values."""
    classifier = workloads.classifier(SMALL)
    config = msgspec.structs.replace(workloads.training(SMALL), learning_rate=1.0)
    before = [p.detach().clone() for p in trainable_parameters(classifier).values()]
    with steps.VARIANTS[variant](classifier, config, steps.plan(SILENT, clipping_norm)) as step:
        step(batch)
    after = trainable_parameters(classifier).values()
    return torch.cat([(p - b).detach().flatten() for p, b in zip(after, before, strict=True)])


@pytest.mark.parametrize("variant", ["private", "own_opacus", "ew", "ghost"])
def test_every_private_variant_takes_the_step_of_the_hooks(variant: str, batch: Examples) -> None:
    wanted = moved("hooks", batch, 0.5)

    assert 0.1 < float(wanted.norm()) <= 0.5  # a mean of gradients of norm 0.5
    torch.testing.assert_close(moved(variant, batch, 0.5), wanted, rtol=1e-4, atol=1e-6)


def test_without_clipping_a_private_step_is_the_plain_step(batch: Examples) -> None:
    wanted = moved("plain", batch, 1.0)

    assert float(wanted.norm()) > 0.5
    torch.testing.assert_close(moved("private", batch, NO_CLIPPING), wanted, rtol=1e-4, atol=1e-6)


def test_every_linear_layer_is_adapted_and_every_tensor_has_a_gradient(batch: Examples) -> None:
    classifier = workloads.classifier(SMALL)
    config = workloads.training(SMALL)
    found = equality.opacus(classifier, batch, config, 1.0)

    assert len(classifier.spec.targets) == 6 * SMALL.layers
    assert set(found.sums) == {name for name, _ in classifier.spec.tensors}
    assert all(bool(s.any()) for s in found.sums.values())


def test_differences_are_seen() -> None:
    theirs = equality.Gradients(torch.tensor([1.0, 2.0]), {"a": torch.tensor([1.0, -4.0])})
    ours = equality.Gradients(torch.tensor([1.0, 2.2]), {"a": torch.tensor([1.0, -3.0])})

    assert equality.relative(ours, theirs) == pytest.approx((0.1, 0.25))
    assert equality.relative(theirs, theirs) == (0.0, 0.0)


def test_gradients_of_the_private_step_are_those_of_opacus() -> None:
    norms, sums = equality.differences(SMALL)

    assert norms <= 1e-5
    assert sums <= 1e-5


def test_figures_are_named_finite_and_targets_belong_to_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "minilm", SMALL)
    monkeypatch.setattr(memory, "peaks", lambda _s, _w, variant, n: [len(variant)] * n)

    figures = [
        *run.time_figures("minilm", run.Turns(turns=2, steps=1)),
        *run.memory_figures("minilm", 2),
        *run.equality_figures(["minilm"]),
    ]

    found = {figure.figure: figure.value for figure in figures}
    assert set(found) == {name for name in EVERY if not name.endswith((".d64", ".d128"))}
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert found["memory_ratio_plain.minilm"] == 7 / 5
    assert found["memory_ratio_hooks.minilm"] == 7 / 5
    assert set(run.TARGETS) <= EVERY


@pytest.mark.slow
def test_the_private_step_benchmark_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    script = harness.ROOT / "benchmarks" / "private_step" / "run.py"

    subprocess.run([sys.executable, str(script), "--quick", "--json", str(file)], check=True)

    content = json.loads(file.read_text())
    found = {figure["figure"]: figure["value"] for figure in content["figures"]}
    assert set(found) == EVERY
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert max(found["equality.norms"], found["equality.sums"]) <= 1e-5
    assert content["header"]["quick"] is True
