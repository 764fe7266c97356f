"""Bad networks: slow, lossy, cut, flapping; sites that are slow or gone. No wait without an end.

Every machine has an address and a link of its own (tests/network.py). While anything is waited
for, `coordinator status` says who, since when, until when, why, and what happens then.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.killing import accounts, undisturbed
from tests.faults.rig import Rig
from tests.network import Link, Network, NotPermitted
from tests.runs import table_text, write_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SITES = ("east", "north", "south")
DEADLINE_S = 15.0


def records(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    return {name: write_table(folder / f"{name}.csv", seed=i) for i, name in enumerate(SITES)}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("network")
    data = records(folder / "records")
    try:
        with Network() as network:
            rig = Rig(folder / "rig", SITES, network=network)
            try:
                rig.gather(lambda name: data[name])
                yield rig
            finally:
                rig.close()
    except NotPermitted as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def mended(rig: Rig) -> Iterator[None]:
    """Put every link and agent in order again after a test."""
    yield
    for machine in rig.machines.values():
        machine.link = Link()
    for name, agent in rig.agents.items():
        if not agent.alive:
            rig.start(name)


def toml(rounds: int, quorum: int, deadline_s: float, hidden: str = "[5, 7]", rank: int = 3) -> str:
    return table_text(
        ("rounds = 2", f"rounds = {rounds}\nquorum = {quorum}\ndeadline_s = {deadline_s}"),
        ("hidden = [5, 7]", f"hidden = {hidden}"),
        ("rank = 3", f"rank = {rank}"),
    )


def wait_for(rig: Rig, run: str, *sites: str) -> dict[str, Any]:
    """Return the wait that `coordinator status` shows, once it is for exactly these sites."""
    found: dict[str, Any] = {}

    def shown() -> bool:
        (one,) = [one for one in rig.status()["runs"] if one["run"] == run]
        found.update(one["wait"] or {})
        return tuple(found.get("who", ())) == sites

    rig.until(shown, 60.0, why=f"no wait for {sites} is shown")
    assert found["since"] <= time.time() <= found["until"] + 2.0
    assert found["why"].startswith("sites train round")
    assert found["then"]
    return found


def whole(rig: Rig, run: str, text: str, folder: Path) -> None:
    """Require that every site was in every round, and the undisturbed run's adapter."""
    assert accounts(rig, run) == (0, 0)
    expected = undisturbed(folder / "undisturbed", text, records(rig.folder / "records"))
    assert rig.adapter(run) == expected


def failures(rig: Rig, run: str) -> set[tuple[str, str]]:
    return {(e["site"], e["reason"]) for e in rig.events(run) if e["kind"] == "site_failed"}


@contextmanager
def repeating(*steps: tuple[Callable[[], object], float]) -> Iterator[None]:
    """Do these in turn, each for its seconds, until the block ends, and then the first again."""
    over = threading.Event()

    def go() -> None:
        while not over.is_set():
            for step, seconds in steps:
                step()
                over.wait(seconds)

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        steps[0][0]()


def test_a_site_at_4_mbit_one_at_30_and_one_that_loses_packets(rig: Rig, tmp_path: Path) -> None:
    rig.machines["coordinator"].link = Link(bits_per_s=1e9)
    rig.machines["east"].link = Link(bits_per_s=30e6)
    rig.machines["north"].link = Link(bits_per_s=4e6)
    rig.machines["south"].link = Link(loss=0.03, delay_s=0.2)
    text = toml(2, 3, 240.0, hidden="[128, 64]", rank=16)

    run = rig.begin(text)

    assert rig.over(run, 480.0).state == "finished"
    whole(rig, run, text, tmp_path)


def test_a_partition_that_heals_before_the_deadline_costs_time_alone(
    rig: Rig, tmp_path: Path
) -> None:
    text = toml(8, 3, 240.0)
    run = rig.begin(text)
    rig.until_merged(run, 1, 120.0)

    rig.machines["south"].link.up = False
    wait = wait_for(rig, run, "south")
    rig.machines["south"].link.up = True

    assert wait["then"] == "the round is merged from those that answered, if they are 3 or more"
    assert rig.over(run, 240.0).state == "finished"
    whole(rig, run, text, tmp_path)


def test_a_partition_past_the_deadline_costs_the_site_its_round(rig: Rig) -> None:
    run = rig.begin(toml(8, 2, DEADLINE_S))
    rig.until_merged(run, 1, 120.0)

    rig.machines["south"].link.up = False
    wait = wait_for(rig, run, "south")
    rig.until(lambda: bool(failures(rig, run)), 4 * DEADLINE_S)
    rig.machines["south"].link.up = True

    assert wait["until"] - wait["since"] == pytest.approx(DEADLINE_S, abs=1.0)
    assert failures(rig, run) <= {("south", "deadline"), ("south", "flower")}
    assert rig.over(run, 8 * DEADLINE_S).state == "finished"
    merges = [e["sites"] for e in rig.events(run) if e["kind"] == "round_aggregated"]
    assert {"east", "north"} <= set.intersection(*map(set, merges))
    assert ["east", "north"] in merges


def test_a_site_twenty_times_slower_is_waited_for(rig: Rig, tmp_path: Path) -> None:
    text = toml(2, 3, 240.0)
    slow = rig.agents["east"].process
    assert slow is not None
    going = (lambda: os.kill(slow.pid, signal.SIGCONT), 0.05)
    stopped = (lambda: os.kill(slow.pid, signal.SIGSTOP), 0.95)

    run = rig.begin(text)
    rig.until_merged(run, 1, 120.0)
    with repeating(going, stopped):
        assert rig.over(run, 300.0).state == "finished"

    whole(rig, run, text, tmp_path)


def test_a_link_that_flaps_ends_no_run(rig: Rig, tmp_path: Path) -> None:
    text, link = toml(5, 3, 240.0), rig.machines["north"].link

    run = rig.begin(text)
    with repeating(
        (lambda: setattr(link, "up", True), 2.0), (lambda: setattr(link, "up", False), 3.0)
    ):
        assert rig.over(run, 480.0).state == "finished"

    whole(rig, run, text, tmp_path)


def test_the_single_remaining_site_goes_on_alone(rig: Rig) -> None:
    run = rig.begin(toml(6, 1, DEADLINE_S))
    rig.until_merged(run, 1, 120.0)

    for name in ("east", "north"):
        rig.agents[name].kill()

    assert rig.over(run, 6 * 2 * DEADLINE_S).state == "finished"
    merges = [e["sites"] for e in rig.events(run) if e["kind"] == "round_aggregated"]
    assert merges[-1] == ["south"]
    assert {site for site, _ in failures(rig, run)} <= {"east", "north"}


def test_too_few_sites_fail_the_run_with_their_names(rig: Rig) -> None:
    run = rig.begin(toml(40, 3, DEADLINE_S))
    rig.until_merged(run, 1, 120.0)

    rig.agents["east"].kill()

    entry = rig.over(run, 8 * DEADLINE_S)
    assert entry.state == "failed"
    assert "2 of 3 sites sent a delta that counts (north, south), 3 are needed" in entry.detail
    assert "east: deadline: no answer within 15 s" in entry.detail
