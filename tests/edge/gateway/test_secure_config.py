"""[secure_aggregation] of gateway.toml: what does not go together is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from anabranch.edge.gateway.config import Limits
from anabranch.edge.gateway.operator import gateway_file
from anabranch.edge.gateway.store import Store
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Federation
from tests.edge.phones import Made, begin
from tests.gateway_cases import open_round

PRIVATE = {"epsilon": 4.0, "population": 100, "noise_multiplier": 2.0, "clipping_norm": 1.0}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"client_privacy": PRIVATE}, r"does not go with \[client_privacy\]"),
        ({"clipping_norm": 1.0}, "does not go with clipping_norm"),
        ({"secure_aggregation": {"threshold": 0.5}}, r"expected at least \(1 \+ colluding\) / 2 ="),
        ({"secure_aggregation": {"minimum": 51}}, "minimum = 51 is above cohort = 50"),
        ({"cohort": 900}, "1170 devices, at most 1000"),
        ({"limits": Limits(message_bytes=1 << 15, chunk_bytes=1024)}, "of up to 37376 bytes"),
        ({"secure_aggregation": {"ring": 20}}, "ring"),
        ({"secure_aggregation": {"ring": 16}}, "20 bits from 65 members overflow a ring of 16"),
        ({"secure_aggregation": {"range": 1e-40}}, "secure_aggregation.range between"),
        ({"secure_aggregation": {"stage_s": 1.0}}, "stage_s"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"secure_aggregation": {}} | settings
    with pytest.raises(ConfigError, match=words):
        gateway_file("north", ["localhost"], **given)


def test_stages_that_leave_no_time_for_training_are_refused(phones: Made, adapter: Adapter) -> None:
    gateway, _ = phones(3)
    with pytest.raises(ConfigError, match=r"five stages of .* leave too little of the 162 s"):
        begin(gateway, adapter, deadline_s=180.0)
    assert gateway.parts.store.rows("SELECT * FROM rounds") == []


def test_rounds_of_single_ranks_are_refused(phones: Made, adapter: Adapter) -> None:
    gateway, _ = phones(3)
    federation = Federation(rounds=10, method="fedavg", mixed_ranks=True, deadline_s=600.0)
    part = Part(ranks=(0,))
    with pytest.raises(ConfigError, match="does not go with single ranks"):
        open_round(gateway.opener, adapter, federation=federation, part=part)


def test_the_state_of_an_earlier_version_gets_its_tables(phones: Made) -> None:
    gateway, (one, *_) = phones(3)
    with gateway.parts.store.writing() as db:
        db.execute("DROP TABLE sums")
        db.execute("DROP TABLE peers")
    store = Store(gateway.folder.state)
    try:
        assert store.peers() == {}
    finally:
        store.close()
    one.ask()
    assert set(gateway.parts.store.peers()) == {one.name}
