"""From messages to replies: a client's failure is its own reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from anabranch.client.local import Learned, Local
from anabranch.client.tuning.examples import Examples
from anabranch.protocols.errors import AnabranchError
from anabranch.server.evaluation import initial_adapter
from anabranch.simulations import engines
from anabranch.simulations.cohort.engine import CohortEngine
from anabranch.simulations.population.client import VirtualSite
from anabranch.simulations.population.clients import PopulationClients
from tests.simulations.populations import digits_run, population
from tests.simulations.rig import Events


class WrongLabels(VirtualSite):
    """Its labels are none of the run's: an IndexError in training that nobody foresaw."""

    def _training(self, *given):  # type: ignore[no-untyped-def]
        examples, identities = super()._training(*given)
        wrong = torch.full_like(examples.labels, 99)
        return Examples(examples.features, wrong), identities


@dataclass(frozen=True, eq=False)
class OneWrong(PopulationClients):
    """A population whose first client has wrong labels."""

    def site(self, index: int) -> VirtualSite:
        site = super().site(index)
        if index == 0:
            site.__class__ = WrongLabels
        return site


@pytest.mark.parametrize("broken", [False, True])
def test_a_client_that_fails_in_an_unforeseen_way_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    if broken:

        def train(self: CohortEngine, locals: Sequence[Local]) -> list[Learned | AnabranchError]:
            raise RuntimeError("nobody foresaw this")

        monkeypatch.setattr(CohortEngine, "train", train)
    config, honest = digits_run(), population(tmp_path, [12, 9, 14, 8, 11, 10])
    clients = OneWrong(honest.records, honest.partition, tmp_path)
    adapters, failed = [], []
    for engine in ("sequential", "cohort"):
        events = Events()
        result = engines.run(
            engine,
            config,
            clients,
            initial_adapter(config),
            run_name="x-1",
            event=events,
        )
        adapters.append(result.adapter.arrays)
        failed.append([(e["site"], e["reason"]) for e in events.of("site_failed")])

    assert failed == [[("client-000000", "internal")] * 2] * 2
    for name, array in adapters[0].items():
        np.testing.assert_allclose(adapters[1][name], array, rtol=1e-5, atol=1e-5)
