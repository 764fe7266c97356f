"""What is kept of a run comes back bit for bit, or not at all."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anabranch.server.aggregation.fedex import Carried
from anabranch.server.aggregation.optimizers import Moments, OptimizerState
from anabranch.server.aggregation.private import ClientPrivate
from anabranch.server.aggregation.products import Product
from anabranch.server.coordinator.progress_file import Damaged, ProgressFolder, read
from anabranch.server.progress import Progress
from tests.server.coordinator.progress_cases import CASES, SAMPLE, data_of, engine_of, progresses
from tests.simulations.rig import adapter


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every number, text and array of a value, with where it is, its type and its bits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        yield path, type(value)
        for name in names:
            if name != "row":  # how the arrays of an adapter lie in memory
                yield from leaves(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, msgspec.Struct):
        yield path, type(value)
        for name in value.__struct_fields__:
            yield from leaves(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, np.ndarray):
        yield path, (value.dtype.str, value.shape, value.tobytes())
    elif isinstance(value, dict):
        yield path, list(value)
        for name, one in value.items():
            yield from leaves(one, f"{path}[{name}]")
    elif isinstance(value, tuple):
        yield path, len(value)
        for place, one in enumerate(value):
            yield from leaves(one, f"{path}[{place}]")
    elif isinstance(value, float):
        yield path, struct.pack("<d", value)
    else:
        yield path, value


def assert_same(one: Any, other: Any) -> None:
    for first, second in zip(leaves(one), leaves(other), strict=True):
        assert first == second


@pytest.mark.parametrize("case", CASES)
def test_every_rule_comes_back_bit_for_bit(case: str) -> None:
    for progress in progresses(CASES[case]):
        back = read(data_of(progress), "a file")

        assert_same(progress, back)
        assert data_of(back) == data_of(progress)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("buffer",)])
def test_a_run_from_the_disk_ends_as_one_that_was_never_stopped(case: str, tmp_path: Path) -> None:
    run = CASES[case]
    if run.client_privacy is not None:
        run = CASES["method fedavg"]  # its noise is drawn anew: nothing to compare
    folder = ProgressFolder(tmp_path / "progress")
    plain = engine_of(run).run(adapter())
    points = len(progresses(run))

    class Died(Exception):
        pass

    for life in range(1, points + 1):
        seen: list[Progress] = []

        def keep(progress: Progress, seen: list[Progress] = seen) -> None:
            folder.save(progress)
            seen.append(progress)
            raise Died

        if life == 1:
            with pytest.raises(Died):
                engine_of(run, progress=keep).run(adapter())
            continue
        with pytest.raises(Died):
            engine_of(run, progress=keep).run(adapter(), folder.load())
    done = engine_of(run).run(adapter(9.0), folder.load())

    assert_same(done.adapter, plain.adapter)
    assert_same(done.best_adapter, plain.best_adapter)
    assert [r.trained for r in done.history] == [r.trained for r in plain.history]
    assert [r.client for r in done.history] == [r.client for r in plain.history]


DTYPES: list[np.dtype[Any]] = [np.dtype("<f8"), np.dtype("<f4")]
arrays: st.SearchStrategy[np.ndarray] = hnp.arrays(
    st.sampled_from(DTYPES),
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=4),
    elements=st.floats(width=32),
)


@settings(max_examples=50)
@given(first=arrays, second=arrays, numbers=st.lists(st.floats(), max_size=4), turned=st.booleans())
def test_every_state_comes_back_bit_for_bit(
    first: np.ndarray, second: np.ndarray, numbers: list[float], turned: bool
) -> None:
    product = Product(first.T if turned else first, second[:, ::-1])
    state = ClientPrivate(
        inner=OptimizerState(Carried({"a.b": product}), 3, {"w": Moments(2, second, first)}),
        clipping_norm=0.1,
        made=tuple(numbers),
    )
    progress = Progress(
        run="r", config="c", adapter=adapter(-0.0), state=state, best=adapter(1e-45), sites={}
    )

    back = read(data_of(progress), "a file")

    assert_same(back, progress)
    kept = back.state.inner.inner.products["a.b"].b
    assert kept.flags.f_contiguous or not first.T.flags.f_contiguous or not turned
    assert kept.flags.writeable


@settings(max_examples=60)
@given(at=st.integers(0, 10**6), change=st.integers(1, 255), cut=st.booleans())
def test_no_damage_is_ever_read(at: int, change: int, cut: bool) -> None:
    data = bytearray(data_of(SAMPLE))
    place = at % len(data)
    if cut:
        del data[place:]
    else:
        data[place] ^= change

    with pytest.raises(Damaged):
        read(bytes(data), "a file")
