"""A client of a population, beside its training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest

from anabranch.client.models import Models
from anabranch.client.tuning.lora import load_adapter, read_adapter
from anabranch.client.tuning.metrics import evaluate
from anabranch.client.tuning.prefix import PrefixCache
from anabranch.client.tuning.training import predict
from anabranch.protocols.messages import Assignment
from anabranch.simulations.population.clients import Partition
from tests.simulations.populations import digits_run, population


def test_held_out_records_are_evaluated_on_what_all_clients_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = msgspec.structs.replace(digits_run().federation, client_evaluation=True)
    config = msgspec.structs.replace(digits_run(), federation=federation)
    whole = population(tmp_path, [30])
    held = Partition(whole.partition.rows, whole.partition.start, np.array([12]))
    clients = dataclasses.replace(whole, partition=held)
    classifier = Models().classifier(config, "cpu")
    adapter = read_adapter(classifier)
    load_adapter(classifier, adapter)
    records = clients.records.take(held.held_out(0))
    features = PrefixCache(1 << 26).prepare(classifier, records.inputs)
    expected = evaluate(predict(classifier, features), records.labels)
    monkeypatch.setattr(PrefixCache, "prepare", None)  # hashes every record

    said = clients.site(0).evaluate(Assignment(run="0" * 32, round=1, config=config), adapter)

    assert said.num_examples == 12
    assert said.metrics == pytest.approx(expected, abs=1e-5)
    stats = clients.data.stats
    assert stats is not None
    assert stats.cached == 12
