from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from anabranch.client.tuning.randomness import Randomness


def stream(seed: int = 0) -> Randomness:
    return Randomness.reproducible(torch.Generator().manual_seed(seed))


def test_gaussians_have_the_right_scale_and_one_half_wrong_is_noticed() -> None:
    values = stream().normal(4000)

    assert values.dtype == np.float32
    assert stats.kstest(values, "norm").pvalue > 0.01
    assert stats.kstest(values * 1.5, "norm").pvalue < 1e-6
    assert stats.kstest(values / 1.5, "norm").pvalue < 1e-6


def test_uniforms_are_uniform_and_below_one() -> None:
    values = stream().uniform(4001)

    assert values.shape == (4001,)
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 0.01


def test_batches_are_poisson_samples_not_shuffles() -> None:
    source = stream()
    batches = [source.sample(50, 0.2) for _ in range(2000)]
    sizes = np.array([len(batch) for batch in batches])
    counts = np.bincount(np.concatenate(batches), minlength=50)

    assert sizes.mean() == pytest.approx(10, abs=0.3)
    assert sizes.var() == pytest.approx(50 * 0.2 * 0.8, rel=0.15)  # a shuffle would have 0
    assert counts.min() > 300  # every record, 400 times on average
    assert counts.max() < 500


def test_everybody_is_in_a_sample_of_rate_one() -> None:
    assert stream().sample(7, 1.0) == list(range(7))


def test_fresh_streams_share_nothing() -> None:
    a, b = Randomness.fresh().normal(1000), Randomness.fresh().normal(1000)

    assert abs(np.corrcoef(a, b)[0, 1]) < 0.25  # 8 standard deviations


def test_seeds_that_differ_above_32_bits_differ() -> None:
    # torch's own CPU noise is the same for both.
    low, high = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + (1 << 40))
    assert torch.equal(torch.randn(4, generator=low), torch.randn(4, generator=high))

    a, b = Randomness(b"\x05" + bytes(31)), Randomness(b"\x05" + bytes(4) + b"\x01" + bytes(26))

    assert not np.array_equal(a.uniform(4), b.uniform(4))


def test_a_generator_makes_a_stream_reproducible() -> None:
    np.testing.assert_array_equal(stream(3).normal(9), stream(3).normal(9))
    assert not np.array_equal(stream(3).normal(9), stream(4).normal(9))


class Constant:
    """A key stream of one byte over and over."""

    def __init__(self, byte: bytes) -> None:
        self.byte = byte

    def update(self, data: bytes) -> bytes:
        return self.byte * len(data)


@pytest.mark.parametrize(("byte", "radius"), [(b"\0", 0.0), (b"\xff", 8.5716)])
def test_gaussians_are_finite_at_both_ends_of_the_stream(byte: bytes, radius: float) -> None:
    source = stream()
    source._stream = Constant(byte)  # type: ignore[assignment]

    values = source.normal(4)

    assert np.hypot(values[0], values[2]) == pytest.approx(radius, rel=1e-5)


def test_gaussians_are_the_transform_in_double_precision_to_float32() -> None:
    source, copy = stream(5), stream(5)
    radius = np.sqrt(-2 * np.log1p(-copy.uniform(5000)))
    words = np.frombuffer(copy._stream.update(bytes(4 * 5000)), "<i4")
    angle = np.pi * words.astype(np.float64) / 2**31
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])

    np.testing.assert_allclose(source.normal(10_000), expected, rtol=0, atol=3e-6)


def test_the_tail_is_as_heavy_as_a_gaussians() -> None:
    values = np.abs(stream(6).normal(2_000_000))

    for bound in (1.0, 3.0, 4.0):
        count = int((values > bound).sum())
        assert stats.binomtest(count, len(values), 2 * stats.norm.sf(bound)).pvalue > 0.001
