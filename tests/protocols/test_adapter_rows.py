import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec

SPEC = AdapterSpec(
    base="b" * 64,
    tokenizer="",
    rank=2,
    alpha=3.0,
    targets=("q",),
    tensors=(("head.weight", (3, 2)), ("q.lora_A.weight", (2, 5)), ("q.lora_B.weight", (4, 2))),
)
LENGTH = SPEC.num_values
ROWS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.just(LENGTH)), elements=st.floats(-8, 8, width=32)
)


def adapters(rows: NDArray[np.float32]) -> list[Adapter]:
    found = Adapter.of_rows(SPEC, rows)
    assert all(isinstance(one, Adapter) for one in found)
    return [one for one in found if isinstance(one, Adapter)]


def apart(adapter: Adapter) -> Adapter:
    """Return an equal adapter whose arrays lie apart."""
    return Adapter(SPEC, {name: array.copy() for name, array in adapter.arrays.items()})


@given(ROWS)
def test_rows_are_the_adapters_of_their_tensors(rows: NDArray[np.float32]) -> None:
    for row, adapter in zip(rows, adapters(rows), strict=True):
        assert list(adapter.arrays) == list(SPEC.shapes)
        flat = [array.reshape(-1) for array in adapter.arrays.values()]
        np.testing.assert_array_equal(np.concatenate(flat), row)
        assert all(adapter.arrays[name].shape == shape for name, shape in SPEC.tensors)


@given(ROWS, ROWS)
def test_a_delta_of_rows_equals_that_of_tensors_to_the_last_bit(
    before: NDArray[np.float32], after: NDArray[np.float32]
) -> None:
    then, now = adapters(before)[0], adapters(after)[0]
    fast = now.minus(then, num_examples=3, steps=2)
    slow = apart(now).minus(apart(then), num_examples=3, steps=2)
    assert fast.row is not None
    assert slow.row is None
    for name, array in slow.arrays.items():
        np.testing.assert_array_equal(fast.arrays[name], array)
    assert fast.norm() == slow.norm()
    assert wire.encode(fast) == wire.encode(slow)
    assert wire.size(fast) == len(wire.encode(fast))


def test_a_row_that_is_not_finite_is_refused_and_the_others_are_not() -> None:
    rows = np.ones((3, LENGTH), np.float32)
    rows[1, 7] = np.nan  # the first tensor has six values
    first, refused, last = Adapter.of_rows(SPEC, rows)
    assert isinstance(first, Adapter)
    assert isinstance(last, Adapter)
    assert isinstance(refused, IncompatibleAdapter)
    assert "q.lora_A.weight: 1 of 10 values are NaN or infinite" in str(refused)


@pytest.mark.parametrize(
    "rows", [np.ones((2, LENGTH + 1), np.float32), np.ones((2, LENGTH)), np.ones(3, np.float32)]
)
def test_rows_of_another_shape_or_type_are_refused(rows: NDArray[np.float32]) -> None:
    with pytest.raises(IncompatibleAdapter, match=f"expected float32 of {LENGTH} values"):
        Adapter.of_rows(SPEC, rows)


def test_a_delta_that_overflows_is_refused() -> None:
    largest = np.finfo(np.float32).max
    low, high = adapters(np.array([[-largest] * LENGTH, [largest] * LENGTH], np.float32))
    with (
        np.errstate(over="ignore"),
        pytest.raises(IncompatibleAdapter, match=r"head\.weight: 6 of 6 values are NaN"),
    ):
        high.minus(low, num_examples=1)


def test_a_row_is_refused_as_the_constructor_refuses_it() -> None:
    row = np.ones(LENGTH, np.float32)
    with pytest.raises(ValueError, match="expected num_examples >= 0, got -1"):
        Delta.of_row(SPEC, row, -1)
    with pytest.raises(IncompatibleAdapter, match="expected float32, got float64"):
        Delta.of_row(SPEC, row.astype(np.float64), 1)
    with pytest.raises(IncompatibleAdapter, match="of a whole adapter"):
        Delta.of_row(SPEC, row, 1, part=Part(factors="B"))
    with pytest.raises(IncompatibleAdapter, match=f"expected {LENGTH} values"):
        Delta.of_row(SPEC, row[1:], 1)


def test_what_is_changed_in_place_is_seen_by_both_and_a_copy_has_no_row() -> None:
    then, now = adapters(np.zeros((2, LENGTH), np.float32))
    now.arrays["head.weight"][0, 0] = 2.0
    delta = now.minus(then, num_examples=1)
    assert delta.norm() == 2.0
    pickled = pickle.loads(pickle.dumps(delta))  # noqa: S301 - written above
    for again in (pickled, copy.deepcopy(delta)):
        again.arrays["head.weight"][0, 0] = 5.0
        assert again.norm() == 5.0
    assert copy.deepcopy(now).row is None


def test_a_decoded_adapter_is_one_row() -> None:
    (adapter,) = adapters(np.arange(LENGTH, dtype=np.float32)[None])
    again = wire.decode_adapter(wire.encode(adapter))
    assert again.row is not None
    np.testing.assert_array_equal(again.row, adapter.row)
