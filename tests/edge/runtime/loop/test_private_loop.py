"""The agent and its ledger: what is reserved, settled and sent of private tasks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import task
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.ledger_report import ledger_of
from anabranch.edge.runtime.spool import Spool
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.rdp import epsilon_of
from anabranch.protocols.spend import Spend
from anabranch.protocols.tables import Privacy
from tests.edge.agents import agent_of, killed, nothing_left, offer
from tests.edge.bundles import reseal
from tests.edge.gateways import FakeGateway, enrolled_at

ASKED = edge_pb2.RecordPrivacy(
    noise_multiplier=1.5, sample_rate=0.25, clipping_norm=1.0, delta=1e-3
)


def test_a_private_task_is_reserved_settled_and_sent(
    fake: FakeGateway, bundle: tuple[Path, Any], home: Home, data: Path, state_home: Path
) -> None:
    offer(fake, bundle, privacy=ASKED)
    with enrolled_at(fake, home) as gateway:
        agent_of(gateway, home, data).run(once=True)
    assert len(fake.committed) == 1
    (spend,) = ledger_of(home).history()
    assert (spend.noise_multiplier, spend.sample_rate, spend.steps) == (1.5, 0.25, 6)
    state = ledger_of(home).state()
    assert state is not None
    assert not state.open
    assert nothing_left(home)


PRIVATE_KILLS = [(task, "_reserve"), (task, "_frame"), (Spool, "put")]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "where"), PRIVATE_KILLS)
def test_a_killed_private_task_sends_one_delta_of_one_settled_training(
    owner: Any,
    where: str,
    after: bool,
    fake: FakeGateway,
    bundle: tuple[Path, Any],
    home: Home,
    data: Path,
    state_home: Path,
) -> None:
    offer(fake, bundle, privacy=ASKED)
    with enrolled_at(fake, home) as gateway:
        killed(agent_of(gateway, home, data), owner, where, after=after)
        agent_of(gateway, home, data).run(once=True)
    state = ledger_of(home).state()
    assert state is not None
    assert len(state.settled) == 1
    lost = where == "_reserve" and not after  # a reservation that nobody knows: it counts
    assert len(state.open) == int(lost)
    assert len(fake.committed) == 1


def test_a_gateway_cannot_renew_a_run_s_budget_by_another_name(
    fake: FakeGateway,
    bundle: tuple[Path, Any],
    home: Home,
    data: Path,
    state_home: Path,
    tmp_path: Path,
) -> None:
    one = Spend(noise_multiplier=1.5, sample_rate=0.25, steps=6)
    once, twice = epsilon_of([one], 1e-3), epsilon_of([one, one], 1e-3)
    folder = tmp_path / "private"
    shutil.copytree(bundle[0], folder)
    privacy = Privacy(epsilon=(once + twice) / 2, delta=1e-3)
    reseal(folder, lambda m: msgspec.structs.replace(m, privacy=privacy, privacy_steps=12))
    for path in folder.iterdir():
        fake.put(path.read_bytes())
    private = (folder, bundle[1])
    with enrolled_at(fake, home) as gateway:
        offer(fake, private, privacy=ASKED)
        agent_of(gateway, home, data).run(once=True)
        offer(fake, private, id="t-2", run="another", privacy=ASKED)
        with pytest.raises(PrivacyError, match="the budget of run"):
            agent_of(gateway, home, data).run(once=True)
    assert len(fake.committed) == 1


def test_a_budget_stops_private_training_and_forbids_any_other(
    fake: FakeGateway, bundle: tuple[Path, Any], home: Home, data: Path, state_home: Path
) -> None:
    home.folder.mkdir(exist_ok=True)
    (home.folder / "device.toml").write_text("[budget]\nepsilon = 0.01\ndelta = 1e-3\n")
    with enrolled_at(fake, home) as gateway:
        offer(fake, bundle)
        with pytest.raises(PrivacyError, match="private training alone"):
            agent_of(gateway, home, data).run(once=True)
        offer(fake, bundle, id="t-2", privacy=ASKED)
        with pytest.raises(PrivacyError, match=r"budget.*device\.toml|device\.toml.*budget"):
            agent_of(gateway, home, data).run(once=True)
    assert fake.aborted == [("t-1", "PrivacyError"), ("t-2", "PrivacyError")]
    assert fake.uploads == {}
