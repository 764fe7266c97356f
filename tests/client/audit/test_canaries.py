"""Canaries: orthonormal directions, loud gradients, and what is read off noisy means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anabranch.client.audit.canaries import LOUDNESS, Canaries, draw_directions
from anabranch.client.audit.checks import Floats


@given(st.integers(1, 30), st.integers(0, 40), st.integers(0, 1000))
def test_directions_are_orthonormal_and_stay_on_what_is_trained(
    count: int, more: int, seed: int
) -> None:
    size = 2 * (count + more)
    trained = np.arange(0, size, 2)

    directions = draw_directions(trained, count, np.random.default_rng(seed))
    rows = np.stack([directions.project(row) for row in np.eye(size)], axis=1)

    np.testing.assert_allclose(rows @ rows.T, np.eye(count), atol=1e-12)
    assert not rows[:, 1::2].any()
    used = np.concatenate([directions.groups.ravel(), directions.spare])
    assert sorted(used) == trained.tolist()


def probe(included: list[bool], size: int = 12, seed: int = 0) -> Canaries:
    directions = draw_directions(np.arange(size), len(included), np.random.default_rng(seed))
    return Canaries(
        directions=directions,
        tensors=np.repeat([0, 2], [4, size - 4]),
        included=np.array(included),
        records=7,
        expected_batch=4.0,
        clipping_norm=0.5,
    )


def tensors(values: Floats) -> dict[str, Tensor]:
    """Return gradients of two tensors, named so that their order matters."""
    flat = torch.from_numpy(values.astype(np.float32))
    return {"b": flat[4:].reshape(2, 4), "a": flat[:4]}


def test_a_canary_is_louder_than_the_clipping_norm_along_its_direction() -> None:
    canaries = probe([True, False, True])

    rows = canaries.gradients([1, 0], 12).numpy().astype(np.float64)

    assert canaries.count == 2
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), LOUDNESS * 0.5, rtol=1e-6)
    along = np.stack([canaries.directions.project(row) for row in rows])
    np.testing.assert_allclose(along, LOUDNESS * 0.5 * np.eye(3)[[2, 0]], atol=1e-6)


def test_scores_contributions_and_noise_are_in_units_of_the_clipping_norm() -> None:
    canaries = probe([True, False, True])
    clipped = canaries.gradients([1], 12).numpy()[0].astype(np.float64) / LOUDNESS
    canaries.observe(5, tensors(clipped / 4.0))
    canaries.observe(3, tensors(np.full(12, 0.25)))

    seen = canaries.seen

    assert seen.population == 9
    assert seen.drawn.tolist() == [5, 3]
    assert seen.participation.tolist() == [0, 1]
    np.testing.assert_allclose(seen.contributions, [1.0], rtol=1e-5)
    flat = canaries.directions.project(np.full(12, 2.0))  # 0.25 q n / C
    np.testing.assert_allclose(seen.scores, flat + np.array([0, 0, 1]), atol=1e-5)
    np.testing.assert_allclose(seen.noise[0], 0, atol=1e-6)
    np.testing.assert_allclose(seen.noise[1], 2.0, rtol=1e-6)


def test_noise_is_looked_at_where_no_included_canary_reaches() -> None:
    canaries = probe([True, False, True], size=13)
    loud = set(canaries.directions.groups[[0, 2]].ravel().tolist())

    at = set(canaries.seen.noise_at.tolist())

    assert at == set(range(13)) - loud


def test_every_tensor_is_looked_at_however_small() -> None:
    tensors = np.repeat([0, 1, 5], [2, 5000, 3000])
    directions = draw_directions(np.arange(len(tensors)), 1, np.random.default_rng(0))
    canaries = Canaries(
        directions=directions,
        tensors=tensors,
        included=np.zeros(1, np.bool_),
        records=7,
        expected_batch=4.0,
        clipping_norm=0.5,
    )

    counts = np.bincount(canaries.seen.noise_tensors, minlength=6)

    assert counts.tolist() == [2, 511, 0, 0, 0, 511]


def test_more_canaries_than_values_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 3 canaries, got 4"):
        draw_directions(np.arange(3), 4, np.random.default_rng(0))
