import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from anabranch.protocols.adapter import Adapter, Delta, checked
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.spec import AdapterSpec, require_same_spec, shown

FIELDS: dict[str, Any] = {
    "base": "b" * 64,
    "tokenizer": "7" * 64,
    "rank": 2,
    "alpha": 3.0,
    "targets": ("q",),
    "tensors": (("head.weight", (3, 2)), ("q.lora_A.weight", (2, 5)), ("q.lora_B.weight", (4, 2))),
}
SPEC = AdapterSpec(**FIELDS)
VALUES = st.floats(-8, 8, width=16)


def spec(**changes: Any) -> AdapterSpec:
    return AdapterSpec(**(FIELDS | changes))


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, NDArray[np.float32]]:
    return {
        name: draw(hnp.arrays(np.float32, shape, elements=VALUES)) for name, shape in SPEC.tensors
    }


adapters = st.builds(Adapter, st.just(SPEC), arrays())
deltas = st.builds(Delta, st.just(SPEC), arrays(), st.integers(0, 1000))


def assert_close(left: Adapter | Delta, right: Adapter | Delta) -> None:
    assert left.spec == right.spec
    for name, array in left.arrays.items():
        np.testing.assert_allclose(array, right.arrays[name], rtol=1e-6, atol=1e-5)


# Laws: deltas of one spec form a vector space


@given(a=deltas, b=deltas)
def test_plus_is_commutative_to_the_last_bit(a: Delta, b: Delta) -> None:
    left, right = a.plus(b), b.plus(a)

    assert left.num_examples == right.num_examples == a.num_examples + b.num_examples
    for name in left.arrays:
        np.testing.assert_array_equal(left.arrays[name], right.arrays[name])


@given(a=deltas, b=deltas, c=deltas)
def test_plus_is_associative(a: Delta, b: Delta, c: Delta) -> None:
    assert_close(a.plus(b).plus(c), a.plus(b.plus(c)))


@given(a=deltas, b=deltas, factor=VALUES)
def test_times_distributes_over_plus(a: Delta, b: Delta, factor: float) -> None:
    left, right = a.plus(b).times(factor), a.times(factor).plus(b.times(factor))

    for name, array in left.arrays.items():
        np.testing.assert_allclose(array, right.arrays[name], rtol=1e-6, atol=1e-4)


@given(a=deltas)
def test_times_one_changes_nothing_and_minus_one_is_the_inverse(a: Delta) -> None:
    assert a.times(1).num_examples == a.num_examples
    for name, array in a.arrays.items():
        np.testing.assert_array_equal(a.times(1).arrays[name], array)
        np.testing.assert_array_equal(a.plus(a.times(-1)).arrays[name], np.zeros_like(array))


@given(after=adapters, before=adapters)
def test_before_plus_what_changed_is_after(after: Adapter, before: Adapter) -> None:
    delta = after.minus(before, num_examples=3)

    assert delta.num_examples == 3
    assert_close(before.plus(delta), after)


@given(a=deltas, b=deltas, factor=VALUES)
def test_norm_is_a_norm(a: Delta, b: Delta, factor: float) -> None:
    assert a.times(factor).norm() == pytest.approx(abs(factor) * a.norm(), rel=1e-5)
    assert a.plus(b).norm() <= (a.norm() + b.norm()) * (1 + 1e-6)


# Examples


def test_norm_and_counts_of_a_small_delta() -> None:
    ones = {name: np.full(shape, 2.0, np.float32) for name, shape in SPEC.tensors}

    assert SPEC.num_values == 6 + 10 + 8
    assert Delta(SPEC, ones, 1).norm() == pytest.approx(math.sqrt(24 * 4))
    assert SPEC.scaling == 1.5
    assert list(SPEC.factors()) == [("q", "q.lora_A.weight", "q.lora_B.weight")]


def test_an_adapter_without_factors_has_scaling_one() -> None:
    assert spec(rank=0, targets=(), tensors=(("head.bias", (2,)),)).scaling == 1.0


def test_equal_specs_have_one_digest_whatever_their_number_types() -> None:
    same = spec(
        alpha=3,
        targets=["q"],
        tensors=[(n, [np.int64(d) for d in shape]) for n, shape in SPEC.tensors],
    )

    assert same == SPEC
    assert same.digest() == SPEC.digest()
    assert spec(alpha=3.5).digest() != SPEC.digest()


def test_a_spec_survives_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(SPEC), type=AdapterSpec) == SPEC


def test_num_values_does_not_overflow() -> None:
    huge = spec(rank=0, targets=(), tensors=(("w", (2**31 - 1,) * 8),))

    assert huge.num_values == (2**31 - 1) ** 8


def test_arrays_are_kept_in_the_order_of_the_spec_and_without_dimensions_if_so() -> None:
    scalars = spec(rank=0, targets=(), tensors=(("a", ()), ("b", (1,))))
    adapter = Adapter(scalars, {"b": np.ones(1, np.float32), "a": np.full((), 2, np.float32)})

    assert list(adapter.arrays) == ["a", "b"]
    assert adapter.arrays["a"].shape == ()


def test_arithmetic_leaves_its_operands_alone() -> None:
    ones = {name: np.ones(shape, np.float32) for name, shape in SPEC.tensors}
    delta = Delta(SPEC, ones, 1)
    delta.plus(delta)
    delta.times(3)
    Adapter(SPEC, ones).plus(delta)

    assert all((array == 1).all() for array in ones.values())


# Refusals


def zeros() -> dict[str, Any]:
    return {name: np.zeros(shape, np.float32) for name, shape in SPEC.tensors}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, r"head.weight: expected shape \(3, 2\), got absent"),
        ({"extra": np.zeros(2, np.float32)}, r"extra: expected shape absent, got \(2,\)"),
        ({"head.weight": np.zeros((2, 3), np.float32)}, r"expected shape \(3, 2\), got \(2, 3\)"),
        ({"head.weight": np.zeros((3, 2))}, "head.weight: expected float32, got float64"),
        ({"head.weight": np.zeros((3, 2), ">f4")}, "head.weight: expected float32, got >f4"),
        ({"head.weight": np.full((3, 2), np.nan, np.float32)}, "6 of 6 values are NaN"),
        ({"head.weight": np.full((3, 2), -np.inf, np.float32)}, "6 of 6 values are NaN or inf"),
    ],
)
def test_arrays_that_do_not_fit_the_spec_are_refused(change: dict[str, Any], message: str) -> None:
    changed = {name: a for name, a in (zeros() | change).items() if a is not None}

    for make in (
        lambda a: Adapter(SPEC, a),
        lambda a: Delta(SPEC, a, 1),
        lambda a: checked(SPEC, a),
    ):
        with pytest.raises(IncompatibleAdapter, match=message):
            make(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "0" * 64}, "base model 000000000000…, expected bbbbbbbbbbbb…: load the same"),
        ({"tokenizer": ""}, "tokenizer none…, expected 777777777777…"),
        ({"alpha": 4.0}, "adapter has alpha 4.0, expected 3.0"),
        (
            {"rank": 1, "tensors": (("q.lora_A.weight", (1, 5)), ("q.lora_B.weight", (4, 1)))},
            "adapter has rank 1, expected 2",
        ),
        ({"targets": (), "tensors": (("head.weight", (3, 2)),)}, "q: expected a target"),
        ({"tensors": SPEC.tensors[1:]}, r"head.weight: expected shape \(3, 2\), got absent"),
    ],
)
def test_an_adapter_of_another_spec_is_refused_by_its_first_difference(
    change: dict[str, Any], message: str
) -> None:
    other = spec(**change)
    theirs = Delta(other, {n: np.zeros(s, np.float32) for n, s in other.tensors}, 1)
    ours = Adapter(SPEC, zeros())

    for refused in (
        lambda: require_same_spec(SPEC, other),
        lambda: ours.plus(theirs),
        lambda: Delta(SPEC, zeros(), 1).plus(theirs),
    ):
        with pytest.raises(IncompatibleAdapter, match=message):
            refused()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "x" * 64}, "base: expected 64 hex digits"),
        ({"alpha": math.inf}, "alpha: expected a number > 0, got inf"),
        ({"alpha": math.nan}, "alpha: expected a number > 0, got nan"),
        ({"rank": 3}, r"q.lora_A.weight: expected shape \(rank, in\) with rank 3, got \(2, 5\)"),
        ({"rank": 0}, "rank 0 has no factors, but target 'q'"),
        ({"targets": ("q", "v")}, "v.lora_A.weight: missing, but its module is a target"),
        ({"targets": ()}, "q.lora_A.weight: a factor, but its module is not a target"),
        ({"tensors": ()}, "tensors: expected at least one"),
        ({"tensors": SPEC.tensors[::-1]}, "tensors: 'q.lora_A.weight' must come before"),
        ({"tensors": SPEC.tensors[:1] * 2}, "tensors: 'head.weight' appears twice"),
        ({"tensors": (("head.weight", (3, 0)),)}, r"got shape '\(3, 0\)'"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(IncompatibleAdapter, match=message):
        spec(**change)


def test_arithmetic_that_overflows_is_refused_and_not_sent() -> None:
    large = {name: np.full(shape, 3e38, np.float32) for name, shape in SPEC.tensors}

    with (
        np.errstate(over="ignore"),
        pytest.raises(IncompatibleAdapter, match="6 of 6 values are NaN or infinite"),
    ):
        Delta(SPEC, large, 1).times(10)


def test_a_negative_number_of_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="expected num_examples >= 0, got -1"):
        Delta(SPEC, zeros(), -1)


def test_text_of_a_peer_is_shown_short_and_without_control_characters() -> None:
    assert shown("a\x1b[2J\n") == r"'a\x1b[2J\n'"
    assert shown("x" * 100, limit=3) == r"'xxx\u2026'"
