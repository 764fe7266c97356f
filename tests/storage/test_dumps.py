"""The memory of a process with secrets stays out of files."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from anabranch.storage.dumps import DUMPABLE

PR_GET_DUMPABLE = 3
SAYS = f"""
import ctypes, os, resource, subprocess, sys
dumpable = lambda: ctypes.CDLL(None).prctl({PR_GET_DUMPABLE}, 0, 0, 0, 0)
if sys.argv[1:] != ["child"]:
    from anabranch.storage.dumps import forbid_dumps
    forbid_dumps()
    forbid_dumps()
print(dumpable(), *resource.getrlimit(resource.RLIMIT_CORE), flush=True)
if sys.argv[1:] != ["child"]:
    subprocess.run([sys.executable, "-c", sys.orig_argv[2], "child"], check=True)
    open("/proc/self/statm").read()
    os.listdir("/proc/self/fd")
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is of Linux")


def said(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SAYS],
        env={key: value for key, value in os.environ.items() if key != DUMPABLE} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.splitlines()


def test_no_core_file_and_no_other_process_reads_it() -> None:
    """What it starts is its own again, but writes no core file either; its /proc still works."""
    assert said() == ["0 0 0", "1 0 0"]


def test_a_debugger_can_be_let_in() -> None:
    before = said(**{DUMPABLE: "1"})

    assert before[0].split()[0] == "1"
    assert before[0] == before[1]
