"""The example of three hospitals: its page is typed, line by line, and every line works."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anabranch.client.policy.config_rules import CONFIG_RULES
from anabranch.client.policy.policy_file import default_policy, parse_policy
from anabranch.protocols.config import parse
from anabranch.server.coordinator.folder import Federation
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "hospital"
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
LATEST_S = 60.0


def lines() -> list[str]:
    """Return every command of the page."""
    text = "".join(BLOCK.findall((EXAMPLE / "README.md").read_text()))
    return [line.removeprefix("$ ") for line in text.splitlines()]


def until(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LATEST_S
    while not done():
        assert time.monotonic() < end, f"not within {LATEST_S:g} s: {what}"
        time.sleep(0.1)


class Terminal:
    """Types commands as a shell does: jobs in the background, a variable, %N."""

    def __init__(self, here: Path, home: Path) -> None:
        self.here = here
        self.env = os.environ | {"XDG_STATE_HOME": str(home), "PYTHONUNBUFFERED": "1"}
        self.jobs: list[subprocess.Popen[bytes]] = []
        self.said = ""  # by the last command that answered
        self.digest = ""
        self.port = str(free_port())

    @property
    def federation(self) -> Federation:
        return Federation(self.here / "heart")

    def type(self, line: str) -> None:
        """Type one line of the page; assert that it ends with 0."""
        line = line.replace("8443", self.port)
        words = shlex.split(line.replace("$DIGEST", self.digest))
        if words[0].startswith("DIGEST="):
            (self.digest,) = re.findall(r"^([0-9a-f]{12}) +pending", self.said, re.MULTILINE)
        elif words[0] == "kill":
            for job in words[1:]:
                self.end(self.jobs[int(job.removeprefix("%")) - 1])
        elif words[0] == "sed":
            subprocess.run(["bash", "-c", line], cwd=self.here, check=True)
        elif words[-1] == "&":
            self.jobs.append(self.start(words[:-1]))
            self.wait_for_job(words[:-1])
        elif "--watch" in words:
            (entry,) = self.federation.state.runs()
            until(lambda: self.state(entry.run) in ("finished", "failed"), "the run is over")
            assert self.state(entry.run) == "finished"
        else:
            if words[1:4] in (["site", "policy", "list"], ["site", "policy", "approve"]):
                site = words[words.index("-f") + 1]
                until(lambda: self.proposed(site), f"{site} has heard of the run")
            self.do(words)
            if words[1:3] == ["coordinator", "stop"]:
                newest = self.federation.state.runs()[-1].run
                until(lambda: self.state(newest) == "stopped", "the run has stopped")

    def do(self, words: list[str]) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "anabranch.cli.main", *words[1:]],
            cwd=self.here, env=self.env, input="y\n", capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
        self.said = done.stdout

    def start(self, words: list[str]) -> subprocess.Popen[bytes]:
        with (self.here / f"job-{len(self.jobs) + 1}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "anabranch.cli.main", *words[1:]],
                cwd=self.here, env=self.env, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def wait_for_job(self, words: list[str]) -> None:
        log = self.here / f"job-{len(self.jobs)}.log"
        word = "serving heart" if "coordinator" in words else "connected to"
        until(lambda: word in log.read_text(), f"{shlex.join(words)} says {word!r}")

    def state(self, run: str) -> str:
        entry = self.federation.state.run(run)
        assert entry is not None
        return entry.state

    def proposed(self, site: str) -> bool:
        file = self.here / site / "approvals.json"
        return file.exists() and "readmission" in file.read_text()

    def end(self, job: subprocess.Popen[bytes]) -> None:
        job.send_signal(signal.SIGTERM)
        job.wait(30)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    for name in ("hospital", "first-run"):
        shutil.copytree(ROOT / "examples" / name, tmp_path / "examples" / name)
    terminal = Terminal(tmp_path / "examples" / "hospital", tmp_path / "state")
    yield terminal
    for job in reversed(terminal.jobs):
        if job.poll() is None:
            terminal.end(job)


@pytest.mark.slow
def test_the_page_is_typed_and_every_line_works(terminal: Terminal) -> None:
    for line in lines():
        terminal.type(line)

    here, federation = terminal.here, terminal.federation
    assert (here / "released" / "release" / "onnx").is_dir()
    status = {site.name: site.status for site in federation.state.sites()}
    assert status == {"northgate": "revoked", "riverside": "left", "st-anna": "active"}
    assert [run.state for run in federation.state.runs()] == ["finished", "stopped"]
    noise = (here / "job-2.log").read_text()
    assert noise.count("waiting for the owner") <= 2  # once for each run
    assert "httpx" not in noise


def test_the_strict_default_takes_the_run_once_it_is_approved() -> None:
    config = parse((EXAMPLE / "run.toml").read_text(), source="run.toml")
    policy = parse_policy(default_policy({}, {}), source="policy.toml")
    assert all(rule(policy, config) is None for rule in CONFIG_RULES.values())


def test_the_policy_of_the_example_is_one() -> None:
    policy = parse_policy((EXAMPLE / "policy.toml").read_bytes(), source="policy.toml")
    assert policy.approval.rules[0].max_runs == 5
    config = parse((EXAMPLE / "run.toml").read_text(), source="run.toml")
    assert all(rule(policy, config) is None for rule in CONFIG_RULES.values())
