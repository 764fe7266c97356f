"""Which tensors and ranks a fit trains, and that all of them can be trained afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.tuning.active import only, union
from anabranch.client.tuning.lora import load_adapter, read_adapter, trainable_parameters
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.part import Part
from tests.client.tuning.private_rig import make

A, B = "layers.0.lora_A.weight", "layers.1.lora_B.weight"

parts = st.builds(
    Part,
    factors=st.sampled_from(["A", "B", "both", "none"]),
    ranks=st.sampled_from([None, (0,), (1,), (0, 1)]),
    dense=st.booleans(),
).filter(lambda part: part.factors != "none" or part.dense)


@given(part=parts, kept=st.none() | parts)
def test_a_union_holds_what_is_in_either_part(part: Part, kept: Part | None) -> None:
    spec = make().spec
    ones = {name: np.ones(shape, np.float32) for name, shape in spec.tensors}
    chosen = [one.spread(spec, one.take(spec, ones)) for one in (part, kept) if one is not None]

    masks = union(spec, part, kept)

    for name, _ in spec.tensors:
        expected = np.max([one[name] for one in chosen], axis=0) > 0
        if name not in masks:
            assert not expected.any()
        elif (mask := masks[name]) is None:
            assert expected.all()
        else:
            np.testing.assert_array_equal(mask, expected)


@given(part=parts)
def test_what_is_frozen_asks_for_no_gradient_and_all_may_be_trained_again(part: Part) -> None:
    classifier = make()
    everything = trainable_parameters(classifier)

    with only(classifier, part) as active:
        assert set(active.parameters) == set(part.names(classifier.spec))
        for name, p in everything.items():
            assert p.requires_grad is (name in active.parameters)
        assert list(read_adapter(classifier).arrays) == list(everything)

    assert all(p.requires_grad for p in everything.values())


def test_an_adapter_is_read_and_loaded_whole_while_a_part_is_trained() -> None:
    classifier, other = make(), read_adapter(make())
    changed = {name: array + 1 for name, array in other.arrays.items()}

    with only(classifier, Part(factors="B")):
        load_adapter(classifier, type(other)(other.spec, changed))

    for name, array in read_adapter(classifier).arrays.items():
        np.testing.assert_array_equal(array, changed[name])


def test_an_error_inside_frees_what_was_frozen() -> None:
    classifier = make()

    with pytest.raises(KeyError), only(classifier, Part(factors="none")):
        raise KeyError

    assert all(p.requires_grad for p in trainable_parameters(classifier).values())


def test_gradients_and_values_outside_the_mask() -> None:
    classifier = make()
    part = Part(factors="B", ranks=(1,), dense=False)

    with only(classifier, part) as active, torch.no_grad():
        p = active.parameters[B]
        before = p.clone()
        p.grad = torch.ones_like(p)
        active.mask_gradients()
        p.add_(3.0)
        active.hold()

    assert p.grad is not None
    assert p.grad[:, 0].tolist() == [0.0] * 8
    assert p.grad[:, 1].tolist() == [1.0] * 8
    assert torch.equal(p[:, 0], before[:, 0])
    assert torch.equal(p[:, 1], before[:, 1] + 3)


def test_fedprox_pulls_towards_the_start_and_undo_goes_back_there() -> None:
    classifier = make()

    with only(classifier, WHOLE) as active, torch.no_grad():
        p = active.parameters[A]
        p.add_(2.0)
        p.grad = torch.full_like(p, 0.5)
        active.pull(0.25)
        active.undo()

    torch.testing.assert_close(p.grad, torch.full_like(p, 1.0))
    assert torch.equal(p, active.start[A])


@pytest.mark.parametrize("ranks", [(2,), (1, 0), ()])
def test_ranks_that_are_not_there_are_refused_and_nothing_is_frozen(ranks: tuple[int, ...]) -> None:
    classifier = make()

    with (
        pytest.raises(IncompatibleAdapter, match="ranks: expected different indices from 0 to 1"),
        only(classifier, Part(factors="A", ranks=ranks)),
    ):
        pass

    assert all(p.requires_grad for p in trainable_parameters(classifier).values())
