import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.tuning.examples import Examples, collate, fetch, lengths

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
