"""Logs of a coordinator's processes, which a peer that is refused again and again could fill."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

from anabranch.server.coordinator import supervisor

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
