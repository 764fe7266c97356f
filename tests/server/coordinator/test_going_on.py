"""What a coordinator that goes on with a run keeps to: its software, and no long pause."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from anabranch.client.policy.code import app_bundle, version
from anabranch.protocols.identity.proposal import Signed, sign
from anabranch.server.coordinator import supervisor
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.proposing import propose
from anabranch.server.coordinator.running import app_of
from anabranch.server.coordinator.state import RunEntry
from anabranch.server.coordinator.supervisor import Child, Supervisor
from tests.page_cases import make
from tests.runs import TABLE_RUN


def proposed(federation: Federation, folder: Path) -> RunEntry:
    (folder / "run.toml").write_text(TABLE_RUN)
    return propose(federation, folder / "run.toml", 1_000_000.0)


def test_a_run_is_offered_for_the_software_that_it_was_proposed_for(tmp_path: Path) -> None:
    federation = make(tmp_path / "heart")
    ours = proposed(federation, tmp_path)
    signed = msgspec.json.decode(ours.signed, type=Signed)
    other = msgspec.structs.replace(signed.proposal, run="other-1", code="5" * 64, version="0.0.9")
    again = sign(other, federation.author("operator"))
    federation.state.propose(
        msgspec.structs.replace(ours, run="other-1", signed=msgspec.json.encode(again).decode())
    )

    assert app_of(federation, ours.run) == app_bundle(federation.code, version())
    assert app_of(federation, "other-1") == app_bundle("5" * 64, "0.0.9")
    assert app_of(federation, "nobody") == b""


def ended(child: Child) -> None:
    """Let a child's process run to its end, which comes at once."""
    child.start(0.0)
    assert child.process is not None
    child.process.wait()
    assert child.ended(0.0) is not None


@pytest.mark.parametrize("rounds", [0, 3])
def test_only_a_run_that_merges_nothing_is_started_after_longer_pauses(
    tmp_path: Path, rounds: int
) -> None:
    federation = make(tmp_path / "heart")
    run = proposed(federation, tmp_path).run
    watch = Supervisor(federation)
    child = Child(f"run {run}", ["anabranch.no_such_module"], tmp_path / "run.log")
    watch.children[child.name] = child
    checkpoints = federation.run_folder(run) / "checkpoints"
    checkpoints.mkdir(parents=True)
    ended(child)
    ended(child)
    assert child.pause == 2 * supervisor.SHORTEST_PAUSE_S

    for number in range(rounds):
        (checkpoints / f"round-{number:04d}.adapter").touch()
    watch._run_ended(child, -9)

    assert child.pause == (0.0 if rounds else 2 * supervisor.SHORTEST_PAUSE_S)
    entry = federation.state.run(run)
    assert entry is not None
    assert entry.restarts == 1
