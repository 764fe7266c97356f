"""Memory models lie above what was measured; a measurement that fails says why."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.edge.runtime.bundle_manifest import MANIFEST, Memory
from anabranch.edge.runtime.measure import (
    Job,
    Point,
    made_up,
    measure,
    memory_model,
    peak_bytes,
    reset_peak,
    unverified,
)
from anabranch.protocols.errors import BundleError
from tests.edge.made import Made

Bundles = Callable[[str], Made]
SHAPES = st.tuples(st.integers(1, 64), st.integers(1, 512))
PEAKS = st.integers(0, 1 << 36)
POINTS = st.lists(
    st.builds(lambda shape, peak: point(shape[0], shape[1], peak), SHAPES, PEAKS),
    min_size=1,
    max_size=9,
)


def point(records: int, tokens: int, peak: int) -> Point:
    return Point(records, tokens, (0.1,), (0.1,), peak)


def terms(memory: Memory) -> tuple[int, ...]:
    return memory.fixed, memory.per_record, memory.per_token, memory.per_pair


# -- laws ---------------------------------------------------------------------------------------


@given(POINTS)
def test_the_model_lies_above_every_measured_point(points: list[Point]) -> None:
    memory = memory_model(points)
    for one in points:
        assert memory.needed(one.records, one.tokens) >= one.peak


@given(POINTS)
def test_no_term_is_negative_and_the_manifest_takes_it(points: list[Point]) -> None:
    memory = memory_model(points)
    assert min(terms(memory)) >= 0
    assert msgspec.json.decode(msgspec.json.encode(memory), type=Memory) == memory


@given(POINTS, SHAPES, st.integers(0, 9), st.integers(0, 99))
def test_more_records_and_longer_ones_never_need_less(
    points: list[Point], shape: tuple[int, int], records: int, tokens: int
) -> None:
    memory = memory_model(points)
    assert memory.needed(*shape) <= memory.needed(shape[0] + records, shape[1] + tokens)


@settings(max_examples=40)
@given(
    st.tuples(*[st.integers(0, 1 << top) for top in (30, 22, 16, 10)]),
    st.permutations(list(itertools.product((1, 3, 8), (5, 17, 64)))),
)
def test_peaks_that_follow_the_formula_are_found_with_the_margin(
    truth: tuple[int, ...], shapes: list[tuple[int, int]]
) -> None:
    fixed, record, token, pair = truth
    exact = Memory(fixed=fixed, per_record=record, per_token=token, per_pair=pair)
    memory = memory_model([point(b, t, exact.needed(b, t)) for b, t in shapes])
    for shape in [(2, 10), (8, 64), (16, 64)]:
        needed = exact.needed(*shape)
        rounding = Memory(fixed=2, per_record=2, per_token=2, per_pair=2).needed(*shape)
        assert needed <= memory.needed(*shape) <= 1.06 * needed + rounding


@given(st.integers(1, 64), st.integers(1, 512), PEAKS)
def test_a_single_point_gives_a_constant(records: int, tokens: int, peak: int) -> None:
    memory = memory_model([point(records, tokens, peak)])
    assert peak <= memory.needed(records, tokens) <= 1.05 * peak + 2


def test_without_a_point_there_is_no_model() -> None:
    with pytest.raises(ValueError, match=r"no model fits the peaks \[\]"):
        memory_model([])


# -- measuring ----------------------------------------------------------------------------------


def job(made: Made, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "folder": str(made.folder), "role": "infer", "precision": "fp32", "points": ((1, 5),)
    }  # fmt: skip
    return Job(**(fields | changes))


@pytest.mark.parametrize(
    ("role", "engine"),
    [("infer", "joint"), ("train_step_dp", "joint"), ("train_step", "ort-training")],
)
def test_a_job_gives_a_point_for_each_shape(made: Bundles, role: Any, engine: Any) -> None:
    shapes = ((1, 5), (3, 24), (9, 2))
    found = measure(job(made("text"), role=role, engine=engine, points=shapes, repeats=4))
    assert [(one.records, one.tokens) for one in found] == list(shapes)
    for one in found:
        assert len(one.wall) == len(one.cpu) == 4
        assert min(one.wall) > 0
        assert one.cpu_ms == pytest.approx(1000 * float(np.median(one.cpu)))
        assert 20 << 20 < one.peak < 400 << 20  # a process with onnxruntime, and without torch


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"points": ((1, 25),)}, "a record has 25 tokens, this bundle allows 24"),
        ({"role": "train_step", "engine": "ort-training", "precision": "int8"}, "over fp32 alone"),
        ({"threads": 0}, "expected threads >= 1, got 0"),
    ],
)
def test_a_job_that_fails_names_itself_and_the_reason(
    made: Bundles, changes: dict[str, Any], reason: str
) -> None:
    asked = job(made("text"), **changes)
    with pytest.raises(BundleError, match="measuring failed: ") as caught:
        measure(asked)
    assert f"{asked.role}.{asked.precision} in {asked.folder}" in str(caught.value)
    assert reason in str(caught.value)


def test_a_folder_without_a_bundle_is_named(tmp_path: Path) -> None:
    nowhere = Job(folder=str(tmp_path), role="infer", precision="fp32", points=((1, 1),))
    with pytest.raises(BundleError, match=rf"infer.fp32 in .*No such file.*{MANIFEST}"):
        measure(nowhere)


def test_a_process_that_dies_without_a_word_is_told(
    made: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BundleError, match="measuring failed: no output"):
        measure(job(made("text")))


@pytest.mark.parametrize("kind", ["text", "image", "tabular"])
def test_made_up_inputs_are_what_the_graphs_take(kind: str, made: Bundles) -> None:
    manifest = made(kind).manifest
    feeds = made_up(manifest, 3, 7)
    assert tuple(feeds) == manifest.inputs
    for array in feeds.values():
        assert array.shape == (3, *(manifest.shape or (7,)))
        assert array.dtype == (np.int64 if kind == "text" else np.float32)
    if kind == "text":
        assert feeds["attention_mask"].all()  # as long as asked, no padding
    for name, array in made_up(manifest, 3, 7).items():
        np.testing.assert_array_equal(array, feeds[name])


def test_unverified_is_the_bundle_that_opens(made: Bundles) -> None:
    opened, raw = made("text").open(), unverified(made("text").folder)
    assert (raw.digest, raw.manifest) == (opened.digest, opened.manifest)
    assert raw.tokenizer is not None
    assert opened.tokenizer is not None
    assert raw.tokenizer.encode("acute femur") == opened.tokenizer.encode("acute femur")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux alone")
def test_the_peak_starts_anew() -> None:
    held = np.ones(64 << 17)  # 64 MiB
    high = peak_bytes()
    assert high > held.nbytes
    del held
    reset_peak()
    assert peak_bytes() < high - (32 << 20)
