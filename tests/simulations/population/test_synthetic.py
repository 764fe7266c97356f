"""FedProx's synthetic(α, β): the law as published."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from anabranch.client.data.records import Records
from anabranch.protocols.errors import ConfigError
from anabranch.simulations.population.synthetic import Synthetic, synthetic


def inputs_of(made: Synthetic, client: int) -> NDArray[np.float32]:
    inputs = made.records.inputs
    assert isinstance(inputs, np.ndarray)
    return inputs[made.partition.start[client] : made.partition.start[client + 1]]


@given(seed=st.integers(0, 2**31), clients=st.integers(1, 8), holdout=st.sampled_from([0.0, 0.1]))
def test_every_record_has_one_client_and_the_seed_decides(
    seed: int, clients: int, holdout: float
) -> None:
    once, again = (
        synthetic(1.0, 1.0, clients=clients, seed=seed, holdout=holdout, most_records=80)
        for _ in range(2)
    )

    assert once.partition.rows.tolist() == list(range(len(once.records)))
    assert (np.diff(once.partition.start) >= 50).all()
    assert np.diff(once.partition.start).max() <= 80
    assert once.records.labels.tolist() == again.records.labels.tolist()
    assert set(once.records.labels.tolist()) <= set(range(10))
    assert isinstance(once.records, Records)
    assert (once.partition.held > 0).all() == (holdout > 0)


def test_inputs_have_the_covariance_of_the_paper() -> None:
    made = synthetic(0.0, 0.0, clients=1, seed=0, iid=True, holdout=0.0)
    many = [inputs_of(synthetic(0.0, 0.0, clients=40, seed=s, iid=True), 0) for s in range(40)]
    pooled = np.concatenate([inputs_of(made, 0), *many])

    expected = np.arange(1, 61) ** -1.2
    np.testing.assert_allclose(pooled.var(axis=0), expected, rtol=0.15)
    assert np.abs(pooled.mean(axis=0) / np.sqrt(expected)).max() < 0.1


def test_beta_sets_clients_inputs_apart() -> None:
    """The mean of the 60 means of client k is B_k ± 1/√60, B_k ~ N(0, β)."""
    clients = 300
    for beta in (0.0, 1.0, 3.0):
        made = synthetic(0.0, beta, clients=clients, seed=1, most_records=60)
        centres = np.array([inputs_of(made, k).mean() for k in range(clients)])
        assert centres.std() == pytest.approx(np.sqrt(beta**2 + 1 / 60), rel=0.15)


def test_the_label_is_the_largest_logit_of_a_linear_model() -> None:
    """In synthetic-IID one linear model is behind all labels: it can be learned from any half."""
    made = synthetic(0.0, 0.0, clients=30, seed=2, iid=True)
    inputs, labels = np.asarray(made.records.inputs, np.float64), made.records.labels
    design = np.hstack([inputs, np.ones((len(inputs), 1))])
    half = len(labels) // 2
    targets = np.eye(10)[labels[:half]]
    weights, *_ = np.linalg.lstsq(design[:half], targets, rcond=None)

    right = ((design[half:] @ weights).argmax(axis=1) == labels[half:]).mean()
    assert right > 0.7


def test_sizes_are_lognormal_above_fifty() -> None:
    logs = [
        np.log(np.diff(synthetic(1.0, 1.0, clients=1, seed=s).partition.start)[0] - 50 + 0.5)
        for s in range(400)
    ]

    assert np.median(logs) == pytest.approx(4.0, abs=0.35)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"alpha -1.*expected alpha, beta >= 0"):
        synthetic(-1.0, 1.0, seed=0)
