"""The supervisor: what fails in it, and logs that a peer that is refused again could fill."""

from __future__ import annotations

import logging
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anabranch.protocols.errors import RunError
from anabranch.server.coordinator import supervisor
from anabranch.server.coordinator.folder import Federation
from tests.server.coordinator.served import Served, patiently, serving

TALKS = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


def test_a_log_is_cut_while_its_process_writes(tmp_path: Path) -> None:
    log = tmp_path / "door.log"
    log.write_bytes(b"x" * (supervisor.LOG_BYTES + 1))
    with (
        log.open("ab") as output,
        subprocess.Popen(
            [sys.executable, "-c", TALKS], stdin=subprocess.PIPE, stdout=output
        ) as process,
    ):
        supervisor._cut(log)
        process.communicate(b"goes on\n")

    assert log.read_bytes() == b"goes on\n"
    assert (tmp_path / "door.log.1").stat().st_size == supervisor.LOG_BYTES + 1


def test_a_small_log_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "door.log"
    log.write_bytes(b"a line\n")

    supervisor._cut(log)
    supervisor._cut(tmp_path / "missing.log")

    assert [one.name for one in tmp_path.iterdir()] == ["door.log"]
    assert stat.S_ISREG(log.stat().st_mode)


def test_a_tick_that_fails_ends_no_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.create(tmp_path / "heart", "heart", ["127.0.0.1"], 8443)
    one = supervisor.Supervisor(federation)
    ticks: list[float] = []

    def tick(now: float) -> None:
        ticks.append(now)
        if len(ticks) == 1:
            raise OSError(28, "No space left on device")
        one.stop.set()

    monkeypatch.setattr(supervisor, "RECONCILE_S", 0.0)
    monkeypatch.setattr(one, "_prepare", lambda: None)
    monkeypatch.setattr(one, "_tick", tick)
    one.serve()

    assert len(ticks) == 2


def test_a_site_may_join_while_the_superlink_is_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, supervisor.__name__)
    here = Served(tmp_path)
    first, second = here.joining("st-anna"), here.joining("riverside")
    with serving(here):
        end = time.monotonic() + 60
        while "serving heart: sites come to" not in caplog.text:
            assert time.monotonic() < end
            time.sleep(0.05)
        here.supervisor.link.wait_ready(60)
        first()

        superlink = here.supervisor.children["superlink"].process
        assert superlink is not None
        superlink.kill()
        superlink.wait()
        assert not here.supervisor.link.ready()
        tries: list[float] = []

        def again() -> None:
            tries.append(time.monotonic())
            second()

        patiently(again, passing=RunError)  # it waits; a slow machine has it try again
        assert len(tries) <= 4

    assert {site.name: site.status for site in here.federation.state.sites()} == {
        "riverside": "active", "st-anna": "active",
    }  # fmt: skip
