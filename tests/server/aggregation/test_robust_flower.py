"""Robust rules beside Flower's own, on the same inputs.

Where the two differ, the paper decides; each such test says how. Median, trimmed mean and Krum
move with a common shift, so rules on differences and on whole models can be compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median, aggregate_trimmed_avg
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import RunError
from anabranch.protocols.tables import Robust
from anabranch.server.aggregation.robust import trimmed_mean
from tests.robust_cases import PART, SPEC, Values, cohort, filled, flat, krum_scores, merge, stack

SEEDS = st.integers(0, 2**32 - 1)


def as_results(deltas: list[Delta]) -> list[tuple[list[Any], int]]:
    return [(list(d.arrays.values()), d.num_examples) for d in deltas]


def as_contents(deltas: list[Delta]) -> list[RecordDict]:
    return [
        RecordDict(
            {
                "arrays": ArrayRecord({n: FlowerArray(a) for n, a in d.arrays.items()}),
                "metrics": MetricRecord({"client": i}),
            }
        )
        for i, d in enumerate(deltas)
    ]


def joined(arrays: list[Any]) -> Values:
    return np.concatenate([np.asarray(a).ravel() for a in arrays])


@given(seed=SEEDS, count=st.integers(1, 9))
def test_median_equals_flower(seed: int, count: int) -> None:
    deltas = cohort(count, seed)

    np.testing.assert_allclose(
        flat(merge(Robust(rule="median"), deltas)),
        joined(aggregate_median(as_results(deltas))),
        atol=1e-6,
    )


@given(seed=SEEDS, count=st.integers(1, 4))
def test_trimmed_mean_equals_flower_where_the_share_is_a_whole_number(
    seed: int, count: int
) -> None:
    deltas = cohort(5 * count, seed)

    ours = flat(merge(Robust(rule="trimmed-mean", trim=0.2), deltas))

    theirs = joined(aggregate_trimmed_avg(as_results(deltas), 0.2))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(ours, trim_mean(stack(deltas), 0.2), atol=1e-6)


def test_trimmed_mean_cuts_where_flower_rounds_the_share_down_to_nothing() -> None:
    """Four clients and a share of 0.2: Flower cuts int(0.8) = 0, which is the plain mean.

    The paper removes the share at each end; a share rounded down protects against fewer clients
    than was asked for.
    """
    deltas = [filled(v) for v in (1.0, 2.0, 3.0, 1000.0)]

    theirs = joined(aggregate_trimmed_avg(as_results(deltas), 0.2))
    ours = flat(merge(Robust(rule="trimmed-mean", trim=0.2), deltas))

    assert set(theirs) == {251.5}
    assert set(ours) == {2.5}


def test_trimmed_mean_survives_shares_that_float_cannot_hold() -> None:
    """0.1 of 30 is 3, though 0.1 × 30 is a little more."""
    values = np.arange(30.0)[:, None] ** 2

    assert trimmed_mean(values, 3) == (values[3:27]).mean()
    spread = [filled(float(v)) for v in np.arange(30.0) ** 2]
    found = flat(merge(Robust(rule="trimmed-mean", trim=0.1), spread))
    np.testing.assert_allclose(found, values[3:27].mean(), rtol=1e-6)


@given(seed=SEEDS, count=st.integers(5, 9))
def test_krum_equals_flower(seed: int, count: int) -> None:
    deltas = cohort(count, seed)

    ours = flat(merge(Robust(rule="krum", byzantine=1), deltas))

    theirs = aggregate_krum(as_results(deltas), num_malicious=1, to_keep=0)
    np.testing.assert_allclose(ours, joined(theirs), atol=1e-6)
    chosen = select_multikrum(as_contents(deltas), 1, 1)[0]
    np.testing.assert_allclose(
        ours, joined([a.numpy() for a in chosen.array_records["arrays"].values()]), atol=1e-6
    )


@given(seed=SEEDS, count=st.integers(5, 9))
def test_multi_krum_equals_flower_for_clients_of_equal_size(seed: int, count: int) -> None:
    deltas = cohort(count, seed)  # one record each

    ours = flat(merge(Robust(rule="multi-krum", byzantine=1), deltas))

    theirs = aggregate_krum(as_results(deltas), num_malicious=1, to_keep=count - 3)
    np.testing.assert_allclose(ours, joined(theirs), atol=1e-5)


def test_multi_krum_does_not_weigh_by_claimed_records_as_flower_does() -> None:
    """The paper's mean of the chosen is plain; a client that claims more records gains nothing."""
    deltas = [filled(v) for v in (1.0, 1.1, 1.2, 1.3, 9.0)]
    claim = [
        Delta(SPEC, d.arrays, n, part=PART)
        for d, n in zip(deltas, (1, 1, 10**6, 1, 1), strict=True)
    ]

    theirs = joined(aggregate_krum(as_results(claim), num_malicious=1, to_keep=2))
    ours = flat(merge(Robust(rule="multi-krum", byzantine=1), claim))

    np.testing.assert_allclose(theirs, 1.2, atol=1e-4)
    np.testing.assert_allclose(ours, 1.15, atol=1e-6)


def test_krum_distances_do_not_cancel_as_flower_s_float32_gram_does() -> None:
    """Flower 1.41 takes ‖x‖² + ‖y‖² − 2 <x, y> in float32; small differences of large vectors
    vanish in it, and its choice is then no longer that of the scores, but for where its rounding
    happens to agree: that differs between processors.
    """
    rng = np.random.default_rng(0)
    shapes, agreed = PART.shapes(SPEC), 0
    for _ in range(20):
        common = {n: 1e4 + rng.standard_normal(s) for n, s in shapes.items()}
        deltas = [
            Delta(
                SPEC,
                {n: (common[n] + step).astype(np.float32) for n in shapes},
                1,
                part=PART,
            )
            for step in (0.0, 0.02, 0.05, 0.09, 0.14)
        ]
        best = int(np.argmin(krum_scores(stack(deltas), 1)))

        ours = flat(merge(Robust(rule="krum", byzantine=1), deltas))
        (chosen,) = select_multikrum(as_contents(deltas), 1, 1)

        np.testing.assert_allclose(ours, flat(deltas[best]), atol=1e-6)
        agreed += chosen.metric_records["metrics"]["client"] == best
    assert agreed < 20


@pytest.mark.parametrize("name", ["krum", "multi-krum"])
def test_krum_with_too_few_clients_is_refused_where_flower_goes_on(name: Any) -> None:
    """Blanchard et al. need n >= 2f + 3; Flower takes max(1, n − f − 2) neighbours instead."""
    deltas = cohort(4, seed=0)

    assert len(aggregate_krum(as_results(deltas), num_malicious=1, to_keep=0)) > 0
    with pytest.raises(RunError, match=r"needs 5 deltas .* got 4: raise federation\.quorum to 5"):
        merge(Robust(rule=name, byzantine=1), deltas)
