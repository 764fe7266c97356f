"""A federation as its users run it: a coordinator and sites as processes of the command line.

Each can be killed by signal at any moment, or at an exact write (hooks/sitecustomize.py). Over a
`Network` every one has a machine and an address of its own; without, all are on loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from anabranch.client.policy.approvals import Approvals
from anabranch.server.coordinator import enrolment, proposing
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.state import RunEntry
from tests.network import Machine, Network
from tests.ports import free_port

HOOKS = Path(__file__).parent / "hooks"
COMMAND = [sys.executable, "-m", "anabranch.cli.main"]
START_S = 90.0
MODULES = {
    "superlink": "superlink_server",
    "door": "door_server",
    "page": "page.server",
    "run": "coordinator.running",
}


@dataclass(eq=False)
class Process:
    """One process of the command line, and where its output goes."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, again if it has ended."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                list(self.command), stdout=output, stderr=subprocess.STDOUT, env=dict(self.env)
            )

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def kill(self, how: int = signal.SIGKILL) -> None:
        """Send a signal and wait for its end."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
        self.wait()

    def wait(self, seconds: float = 30.0) -> None:
        """Wait for its end; kill what does not end."""
        if self.process is not None:
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@dataclass(eq=False)
class Rig:
    """A federation in `folder`; end it with `close`."""

    folder: Path
    sites: Sequence[str]
    network: Network | None = None
    disks: Mapping[str, Path] = field(
        default_factory=dict
    )  # of "federation" and sites: else folder
    coordinator: Process = field(init=False)
    agents: dict[str, Process] = field(default_factory=dict)
    machines: dict[str, Machine] = field(default_factory=dict)
    env: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.kills = self.folder / "kills"
        self.kills.mkdir()
        state = self.folder / "state"
        self.env = os.environ | {
            "PYTHONPATH": str(HOOKS),
            "ANABRANCH_KILLS": str(self.kills),
            "XDG_STATE_HOME": str(state),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        host = "127.0.0.1"
        if self.network is not None:
            for name in ("coordinator", *self.sites):
                self.machines[name] = self.network.machine()
            host = self.machines["coordinator"].address
        port = 8443 if self.network is not None else free_port()
        self.federation = self.disks.get("federation", self.folder) / "federation"
        where = ("-f", str(self.federation))
        names = ("--name", "heart", "--host", host, "--port", str(port))
        self.do("coordinator", "init", *where, *names)
        self._set(self.federation / "coordinator.toml", page=f"127.0.0.1:{free_port()}")
        self.state = Federation(self.federation).state
        command = [*COMMAND, "coordinator", "serve", "--folder", str(self.federation)]
        self.coordinator = self._process("coordinator", command)

    # -- what a user types -----------------------------------------------------------------------

    def do(self, *words: str, machine: str = "coordinator", ok: bool = True) -> str:
        """Run one command to its end and return what it prints."""
        done = subprocess.run(
            [*self._prefix(machine), *COMMAND, *words],
            capture_output=True, text=True, env=self.env, timeout=120,
        )  # fmt: skip
        if ok and done.returncode:
            raise AssertionError(f"{' '.join(words)}: {done.stdout}\n{done.stderr}")
        return done.stdout

    def serve(self) -> None:
        """Start the coordinator and wait until its door is open."""
        self.coordinator.start()
        self.until(lambda: (self.federation / "logs" / "door.log").exists(), START_S)

    def join(self, name: str, data: Path, *options: str) -> str:
        """Invite a site and join it: one command, one string. Returns what the site is shown."""
        invitation = self.folder / f"invitation-{name}"
        made = enrolment.invite(Federation(self.federation), name, time.time())
        invitation.write_text(made.text())
        shown = ""

        def joined() -> bool:
            nonlocal shown
            try:
                shown = self.do(
                    "site", "join", f"@{invitation}", "--data", str(data),
                    "--folder", str(self.site(name)), *options, machine=name,
                )  # fmt: skip
            except AssertionError as error:
                passing = ("cannot be reached", "ended the connection without an answer")
                if not any(one in str(error) for one in passing):  # the door is not open yet
                    raise
                return False
            return True

        self.until(joined, START_S)
        return shown

    def allow(self, name: str, **limits: str) -> None:
        """Let a site take part in runs without privacy, of any cohort, all else as it joined."""
        policy = self.site(name) / "policy.toml"
        self._set(policy, required="false", minimum="1", **limits)

    def gather(self, records: Callable[[str], Path]) -> None:
        """Serve, let all sites join, allow what tests need, and start their agents."""
        self.serve()

        def take_in(name: str) -> None:
            self.join(name, records(name))
            self.allow(name)
            self.start(name)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(take_in, self.sites))

    def start(self, name: str) -> None:
        """Start a site's agent."""
        if name not in self.agents:
            command = [*COMMAND, "site", "serve", "-f", str(self.site(name))]
            self.agents[name] = self._process(name, [*self._prefix(name), *command])
        self.agents[name].start()

    def propose(self, run_toml: Path) -> str:
        """Propose a run, as `coordinator run` does, and return its id."""
        return proposing.propose(Federation(self.federation), run_toml, time.time()).run

    def approve(self, name: str, run: str) -> None:
        """Approve a run at a site, as `site policy approve` does, once it has heard of it."""
        approvals = Approvals(self.site(name))

        def digests() -> list[str]:
            return [d for d, one in approvals.entries().items() if one.proposal.run == run]

        self.until(lambda: bool(digests()), START_S)
        approvals.approve(digests()[0], by="its owner", now=time.time())

    def begin(self, toml: str) -> str:
        """Propose a run of this text and approve it at all sites; return its id."""
        file = self.folder / f"run-{len(list(self.folder.glob('run-*.toml')))}.toml"
        file.write_text(toml)
        run = self.propose(file)
        for name in self.sites:
            self.approve(name, run)
        return run

    def stop(self, run: str) -> None:
        """Stop a run, as `coordinator stop` does, and wait until it has stopped."""
        proposing.stop(Federation(self.federation), run)
        assert self.over(run, START_S).state == "stopped"

    # -- what there is to see --------------------------------------------------------------------

    def site(self, name: str) -> Path:
        """Return a site's folder."""
        return self.disks.get(name, self.folder) / name

    def run(self, run: str) -> RunEntry:
        """Return what `coordinator runs` says of one run."""
        entry = self.state.run(run)
        assert entry is not None
        return entry

    def status(self) -> dict[str, Any]:
        """Return what `coordinator status --json` says."""
        said = self.do("coordinator", "status", "-f", str(self.federation), "--json")
        return dict(json.loads(said))

    def events(self, run: str) -> list[dict[str, Any]]:
        """Return the events of a run so far, without a torn last line."""
        file = self.federation / "runs" / run / "events.jsonl"
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def over(self, run: str, seconds: float) -> RunEntry:
        """Wait for the end of a run and return what is known of it."""
        self.until(lambda: self.run(run).state in ("finished", "failed", "stopped"), seconds)
        return self.run(run)

    def finished(self, run: str, seconds: float) -> dict[str, Any]:
        """Wait for the end of a run and return what `coordinator runs --json` says of it."""
        return dict(msgspec.structs.asdict(self.over(run, seconds)))

    def merged(self, run: str) -> int:
        """Return how many merges a run has announced."""
        return sum(one["kind"] == "round_aggregated" for one in self.events(run))

    def until_merged(self, run: str, count: int, seconds: float) -> None:
        """Wait until a run has merged so many rounds."""
        self.until(lambda: self.merged(run) >= count, seconds)

    def adapter(self, run: str) -> bytes:
        """Return the frame of the last checkpoint."""
        found = sorted((self.federation / "runs" / run / "checkpoints").glob("*.adapter"))
        return found[-1].read_bytes()

    def pid(self, child: str) -> int | None:
        """Return the process of the coordinator's child: superlink, door, page or run."""
        module = MODULES[child]
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if module in words and self._child_of_mine(entry):
                return int(entry.name)
        return None

    def _child_of_mine(self, entry: Path) -> bool:
        mine = self.coordinator.process
        if mine is None:
            return False
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            return False
        return int(stat.rpartition(")")[2].split()[1]) == mine.pid

    def kill_child(self, child: str) -> bool:
        """Kill one of the coordinator's processes, now; False: it does not run."""
        pid = self.pid(child)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        return pid is not None

    def kill_coordinator(self) -> None:
        """Kill all processes of the coordinator, now."""
        children = [pid for child in MODULES if (pid := self.pid(child)) is not None]
        self.coordinator.kill()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):  # it ends with its supervisor
                os.kill(pid, signal.SIGKILL)

    def kill_at(self, role: str, step: int, label: str = "") -> Path:
        """Have the process of a role die at its `step`-th step of that label from now on.

        Labels are in hooks/sitecustomize.py. The file that is returned is gone once it died.
        """
        plan = self.kills / role
        hidden = plan.with_name(f".{role}")
        hidden.write_text(f"{step} {label}")
        hidden.replace(plan)
        return plan

    # -- helpers ---------------------------------------------------------------------------------

    def until(
        self, done: Callable[[], bool], seconds: float, every_s: float = 0.1, why: str = ""
    ) -> None:
        """Wait for something to hold; AssertionError with all logs' ends if it does not."""
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise AssertionError(f"{why}: not within {seconds:g} s\n{self.tails()}")
            time.sleep(every_s)

    def tails(self) -> str:
        """Return the ends of all logs."""
        files = [*self.folder.glob("*.log"), *(self.federation / "logs").glob("*.log")]
        return "\n".join(f"== {file.name}\n{file.read_text()[-1500:]}" for file in files)

    def close(self) -> None:
        """End everything."""
        for agent in self.agents.values():
            agent.kill(signal.SIGTERM)
        self.coordinator.kill(signal.SIGTERM)
        shutil.rmtree(self.kills, ignore_errors=True)

    def _prefix(self, machine: str) -> list[str]:
        return self.machines[machine].prefix if machine in self.machines else []

    def _process(self, name: str, command: Sequence[str]) -> Process:
        prefix = self._prefix(name) if name == "coordinator" else []
        return Process(name, [*prefix, *command], self.env, self.folder / f"{name}.log")

    @staticmethod
    def _set(file: Path, **values: str) -> None:
        """Change values of a TOML file where they stand."""
        mode, text = file.stat().st_mode & 0o777, file.read_text()
        for key, value in values.items():
            new = value if re.fullmatch(r"[0-9.]+|true|false|\[.*\]", value) else f'"{value}"'
            text, count = re.subn(rf"(?m)^{key} = [^#\n]*", f"{key} = {new} ", text, count=1)
            assert count == 1, f"{file}: no {key}"
        file.write_text(text)
        file.chmod(mode)
