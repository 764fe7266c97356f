"""Gradients at the edge of float32: no record counts for more than C, or tells of itself."""

from __future__ import annotations

import pytest
import torch

from anabranch.client.tuning.clipping import clipping_factors
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.per_record import Ghost
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import Clipping, Engine
from tests.client.tuning.private_rig import (
    CLIPPINGS,
    ENGINES,
    SGD,
    clipped_sum,
    examples,
    make,
    moved,
    plan,
    run,
    values,
)
from tests.runs import table_run


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_record_whose_gradient_is_not_finite_counts_as_a_gradient_of_zero(
    clipping: Clipping, engine: Engine
) -> None:
    """A refusal instead would say, without any noise, that the record is there."""
    classifier, data = make(), examples()
    features = [*data.features, torch.full((3, 5), torch.nan)]
    odd = Examples(features, torch.cat([data.labels, torch.tensor([1])]))
    before, expected = values(classifier), clipped_sum(make(), data, clipping, 0.5) / len(odd)

    run(classifier, odd, plan(clipping=clipping), SGD, engine=engine)

    torch.testing.assert_close(moved(classifier, before), -expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_ghost_of_tiny_errors_and_huge_inputs_is_clipped(tokens: int) -> None:
    """The square of such an error is 0 in float32."""
    ghost = Ghost(torch.full((1, tokens, 9), 1e18), torch.full((1, tokens, 4), 1e-23))
    total = torch.zeros(36)

    ghost.add(total, clipping_factors("flat", ghost.norms(), 1e-6))

    assert 0 < float(total.norm()) <= 1e-6 * (1 + 1e-4)


@pytest.mark.parametrize("norm", ["1e-44", "1e-7", "1e7", "1e38", "nan", "inf", "0.0", "-1.0"])
def test_clipping_norms_that_float32_would_round_away_are_refused(norm: str) -> None:
    with pytest.raises(ConfigError, match="clipping_norm"):
        private(norm)


def test_the_smallest_and_the_largest_clipping_norm_are_kept() -> None:
    """After the widest move of an adaptive norm, the factor of the longest gradient is exact."""
    for text in ("1e-6", "1e6"):
        config = private(text)
        assert config.privacy is not None
        norm, longest = config.privacy.clipping_norm * 1e-4, 1.8e19
        factor = float(clipping_factors("flat", torch.tensor([longest]), norm))
        assert factor * longest == pytest.approx(norm, rel=1e-6)


def private(norm: str) -> RunConfig:
    extra = f"\n[privacy]\nepsilon = 8.0\nclipping_norm = {norm}\n"
    return table_run(("local_epochs = 2", "local_steps = 3"), extra=extra)
