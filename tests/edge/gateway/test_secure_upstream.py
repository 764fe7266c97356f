"""Above, a gateway is one member of the coordinator's secure sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.flower import SummingSite
from anabranch.client.sums.given import InMemory
from anabranch.client.sums.participant import Participant
from anabranch.client.sums.terms import vector_of
from anabranch.edge.gateway.aggregate import require_linear
from anabranch.edge.gateway.upstream import GatewaySite
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import ConfigError, ProtocolError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.part import Part
from anabranch.protocols.secagg.contribution import WEIGHT_UNIT, mean_of, sizes
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.fixed_point import ring_for
from anabranch.protocols.secagg.member import Limits
from anabranch.protocols.secagg.terms import Peer, Roster, Terms
from anabranch.protocols.tables import Federation, Privacy, SecureAggregation, Training
from benchmarks.edge.gateway_load import config_of
from tests.edge.phones import deltas_of, mean
from tests.gateway_cases import row_of

SECURE = SecureAggregation(minimum=3, threshold=0.7, colluding=0.0)
Fleet = Callable[..., Any]


def terms_among(roster: Roster, assignment: Assignment, adapter: Adapter) -> Terms:
    values, counters = sizes(adapter.spec, Part(), by_rank=False)
    return Terms(
        run=assignment.run,
        round=assignment.round,
        instance="1" * 64,
        config=assignment.config.digest(),
        model=wire.digest(wire.encode(adapter)),
        roster=roster.digest,
        members=tuple(peer.name for peer in roster.peers),
        minimum=SECURE.minimum,
        threshold=SECURE.threshold,
        colluding=SECURE.colluding,
        ring=ring_for(len(roster.peers), SECURE.value_bits).bits,
        limit=SECURE.range,
        weight=WEIGHT_UNIT * 100,
        values=values,
        counters=counters,
        keystream="chacha20",
    )


def test_its_devices_mean_is_one_update_in_the_coordinators_sum(
    fleet: Fleet, adapter: Adapter
) -> None:
    gateway, devices = fleet(3)
    deltas = deltas_of(adapter.spec, 5)
    assignment = Assignment(run="run", round=1, config=config_of(secure_aggregation=SECURE))
    row = gateway.opener.open(assignment, adapter)
    for device, delta in zip(devices, deltas, strict=False):
        device.examples = delta.num_examples
        device.check_in()
        assert device.send(wire.encode(delta)).accepted
    site = GatewaySite(gateway.folder.folder)
    assert isinstance(site, SummingSite)
    trained, frame = site.train(assignment, adapter)
    assert (frame, trained.num_examples, trained.steps, trained.loss) == (b"", 0, 0, None)
    others = {}
    for name, delta in (("east", deltas[3]), ("west", deltas[4])):
        others[name] = Participant(name, Ed25519PrivateKey.generate(), InMemory())
        others[name].keep(assignment, adapter, delta)
    key = site.peer_key("run", assignment.config)
    assert key == GatewaySite(gateway.folder.folder).peer_key("run", assignment.config)
    keys = {name: one.public_key for name, one in others.items()} | {"north": key}
    roster = Roster.of(Peer(name=name, key=str(one)) for name, one in keys.items())
    aggregation = Aggregation(terms_among(roster, assignment, adapter), roster)
    last = None
    while aggregation.stage not in ("done", "aborted"):
        for name, request in aggregation.requests().items():
            if name == "north":
                answer = site.secure(assignment, request)
                last = request
            else:
                answer = others[name].answer(assignment, request, Limits(), vector_of)
            aggregation.take(name, answer.reply, answer.data)
        aggregation.close()
    assert aggregation.stage == "done", aggregation.reason
    (opened,) = aggregation.sums
    got = mean_of(
        opened.total, aggregation.terms, adapter.spec, Part(), normalize_steps=False, by_rank=False
    )
    described = row_of(gateway.parts.store, row)["examples"]
    assert got.num_examples == sum(delta.num_examples for delta in deltas[3:]) + described
    for name, expected in mean(deltas).items():
        np.testing.assert_allclose(got.arrays[name], expected, atol=1e-4)
    assert last is not None
    assert [path.name for path in (gateway.folder.folder / "secure").iterdir()]
    site.train(assignment, adapter)  # the same round again: its sum was opened
    again = msgspec.structs.replace(aggregation.terms, instance="2" * 64)
    with pytest.raises(ProtocolError, match="has given its update to a sum already"):
        site.secure(assignment, Aggregation(again, roster).requests()["north"])


def test_a_run_without_sums_has_no_key_and_noise_within_the_sum_is_refused(fleet: Fleet) -> None:
    gateway, _ = fleet(1)
    assert GatewaySite(gateway.folder.folder).peer_key("run", config_of()) is None
    config = config_of(
        secure_aggregation=SECURE,
        privacy=Privacy(epsilon=8.0, delta=1e-4, noise="distributed"),
        training=Training(
            local_steps=1, batch_size=2, optimizer="sgd", momentum=0.0, weight_decay=0.0
        ),
        federation=Federation(rounds=2, method="ffa", weighting="uniform"),
    )
    with pytest.raises(ConfigError, match="make no noise with other members"):
        require_linear(config)
