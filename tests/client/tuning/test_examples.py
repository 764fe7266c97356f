import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.tuning.examples import (
    Dense,
    Examples,
    Packing,
    Ragged,
    collate,
    fetch,
    lengths,
    runs,
)

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@given(LENGTHS)
def test_a_padded_batch_holds_every_sequence_and_the_mask_says_where(sizes: list[int]) -> None:
    features = [torch.randint(1, 9, (size,)) for size in sizes]

    batch, mask = collate(features)

    assert mask is not None
    assert batch.shape == mask.shape == (len(sizes), max(sizes))
    assert mask.sum(dim=1).tolist() == sizes
    assert (batch[~mask] == 0).all()
    for feature, row, real in zip(features, batch, mask, strict=True):
        assert torch.equal(row[real], feature)


@given(LENGTHS)
def test_hidden_states_are_padded_like_tokens(sizes: list[int]) -> None:
    batch, mask = collate([torch.ones(size, 3) for size in sizes])

    assert mask is not None
    assert batch.shape == (len(sizes), max(sizes), 3)
    assert torch.equal(batch.sum(dim=-1) == 3, mask)


@pytest.mark.parametrize("shape", [(5,), (3, 4, 6)])
def test_rows_pooled_vectors_and_images_are_stacked_without_a_mask(shape: tuple[int, ...]) -> None:
    batch, mask = collate([torch.zeros(shape), torch.ones(shape)])

    assert batch.shape == (2, *shape)
    assert mask is None


@given(st.lists(st.integers(0, 4), max_size=8))
def test_take_returns_features_and_labels_together_in_the_order_asked_for(at: list[int]) -> None:
    examples = Examples([torch.full((2,), float(i)) for i in range(5)], torch.arange(5))

    taken = examples.take(at)

    assert taken.labels.tolist() == at
    assert [int(feature[0]) for feature in taken.features] == at


def test_fetch_and_lengths_work_on_plain_lists() -> None:
    features = [torch.ones(3), torch.ones(1), torch.ones(2)]

    assert lengths(features) == [3, 1, 2]
    assert [len(f) for f in fetch(features, [2, 0, 2])] == [2, 3, 2]


@pytest.mark.parametrize("labels", [torch.zeros(2), torch.zeros(3, dtype=torch.int64)])
def test_labels_that_do_not_fit_the_features_are_refused(labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected int64 labels of shape \(2,\)"):
        Examples([torch.ones(1), torch.ones(1)], labels)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one feature"):
        collate([])


def ragged_of(sizes: list[int]) -> tuple[Ragged, list[torch.Tensor]]:
    """Return sequences as runs of one tensor, in reverse and with gaps, and as a list."""
    features = [torch.arange(2.0 * n).view(n, 2) + 100 * i for i, n in enumerate(sizes)]
    parts, start, at = [], [], 0
    for feature in reversed(features):
        parts += [feature, torch.full((1, 2), -1.0)]
        start.append(at)
        at += len(feature) + 1
    starts = torch.tensor(start[::-1])
    return Ragged(torch.cat(parts), starts, torch.tensor(sizes)), features


@given(LENGTHS, st.data())
def test_runs_of_one_tensor_are_the_sequences_of_a_list(
    sizes: list[int], data: st.DataObject
) -> None:
    ragged, features = ragged_of(sizes)
    at = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=7))
    expected = [features[i] for i in at]

    assert isinstance(ragged, Packing)
    assert lengths(ragged) == [len(f) for f in ragged] == sizes
    copied = Ragged.of(features)
    for taken in (
        fetch(ragged, at),
        list(ragged.subset(at)),
        [ragged[i] for i in at],
        fetch(copied, at),
    ):
        assert all(torch.equal(ours, f) for ours, f in zip(taken, expected, strict=True))
    values, length = ragged.packed(torch.tensor(at, dtype=torch.int64))
    assert length.tolist() == [len(f) for f in expected]
    assert torch.equal(values, torch.cat([*expected, torch.empty(0, 2)]))
    assert torch.equal(ragged.rows(torch.tensor(at, dtype=torch.int64)), values)


def test_sequences_taken_from_one_tensor_are_not_copied() -> None:
    ragged, _ = ragged_of([3, 1, 2])
    storage = ragged.values.untyped_storage().data_ptr()

    views = [*ragged.take([2, 0]), ragged.subset([1]).values, ragged[1]]

    assert {view.untyped_storage().data_ptr() for view in views} == {storage}


@given(st.lists(st.integers(0, 4), max_size=8))
def test_rows_of_one_tensor_are_the_features_of_a_list(at: list[int]) -> None:
    data = torch.arange(18.0).view(6, 3)
    dense = Dense(data, torch.tensor([5, 3, 1, 0, 3]))
    expected = [data[[5, 3, 1, 0, 3][i]] for i in at]

    assert lengths(dense) == [3] * 5
    for taken in (fetch(dense, at), list(dense.subset(at)), [dense[i] for i in at]):
        assert all(torch.equal(ours, f) for ours, f in zip(taken, expected, strict=True))
    assert torch.equal(dense.rows(torch.tensor(at, dtype=torch.int64)), data[dense.at[at]])


@given(st.lists(st.tuples(st.integers(-5, 20), st.integers(0, 4)), max_size=6))
def test_runs_are_ranges_one_after_the_other(pairs: list[tuple[int, int]]) -> None:
    start, length = (torch.tensor([p[i] for p in pairs], dtype=torch.int64) for i in (0, 1))

    assert runs(start, length).tolist() == [i for a, n in pairs for i in range(a, a + n)]


def test_a_start_without_a_length_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"one start and one length per feature.*\(2,\) and \(3,\)"
    ):
        Ragged(torch.zeros(4, 2), torch.zeros(2), torch.zeros(3))
