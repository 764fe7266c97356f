"""The same laws as flwr-datasets, where it is installed (partitions.py says why it is not)."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from anabranch.simulations.population import partitions
from anabranch.simulations.population.partitions import Sharing

if find_spec("flwr_datasets") is not None:  # not a skip: nothing is promised where it is not there
    LABELS = np.repeat(np.arange(5), [400, 300, 200, 60, 40])

    def theirs(kind: str, **options: Any) -> list[np.ndarray[Any, Any]]:
        """Return the labels of each partition that flwr-datasets makes."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = getattr(import_module("flwr_datasets.partitioner"), kind)(**options)
            made.dataset = import_module("datasets").Dataset.from_dict({"label": LABELS})
            parts = [made.load_partition(i)["label"] for i in range(made.num_partitions)]
            return [np.array(part) for part in parts]

    @pytest.mark.parametrize("alpha", [0.5, 5.0])
    def test_dirichlet_mixtures_are_as_concentrated(alpha: float) -> None:
        """InnerDirichletPartitioner takes each label's own concentration, α · p.

        A fifth of the records is dealt, so that no label is used up: what is done then differs
        (they draw record by record for a random client, we client by client).
        """
        each = (alpha * np.bincount(LABELS) / LABELS.size).tolist()
        found, ours = [], []
        for seed in range(8):
            parts = theirs(
                "InnerDirichletPartitioner",
                partition_sizes=[10] * 20,
                partition_by="label",
                alpha=each,
                seed=seed,
            )
            found += [np.bincount(part, minlength=5) / 10 for part in parts]
            sharing = Sharing(clients=20, seed=seed, records_per_client=10)
            partition = partitions.by_label(LABELS, alpha, sharing)
            ours += [np.bincount(LABELS[partition.train(i)], minlength=5) / 10 for i in range(20)]

        ratio = np.var(ours, axis=0).sum() / np.var(found, axis=0).sum()
        assert ratio == pytest.approx(1.0, abs=0.2)

    def test_shards_have_as_many_labels() -> None:
        found = theirs(
            "ShardPartitioner", num_partitions=20, partition_by="label", num_shards_per_partition=2
        )
        partition = partitions.by_shards(LABELS, 2, Sharing(clients=20, seed=0))
        ours = [LABELS[partition.train(i)] for i in range(20)]

        assert {len(part) for part in ours} == {len(part) for part in found} == {50}
        assert max(len(set(p.tolist())) for p in (*ours, *found)) <= 4
