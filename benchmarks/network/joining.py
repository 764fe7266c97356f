"""How a site joins: over machines of their own, the time and all that its owner has to do.

A coordinator and four sites, each in a network namespace with an address of its own; TLS and keys
as in a hospital. What is timed is the one command, from the start of its process to its end, which
is after the words "ready". It has no terminal: a question would be its end.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from anabranch.server.coordinator import enrolment
from anabranch.server.coordinator.folder import Federation
from anabranch.server.superlink import SuperLink
from benchmarks.network.federation import require_finished
from benchmarks.network.tasks import Task
from tests.faults.rig import COMMAND, Rig
from tests.network import Network, NotPermitted

JOIN_S, RUN_S = 120.0, 900.0


@dataclass(frozen=True, kw_only=True)
class Join:
    """What one site's owner did. `transfers` are files that were moved by hand."""

    site: str
    seconds: float
    commands: int = 1
    strings: int = 1  # to be copied: the invitation
    transfers: int = 0
    questions: int = 0


@contextmanager
def own_machines() -> Iterator[Network | None]:
    """Yield a network of namespaces; None where they are not permitted: loopback then."""
    try:
        with Network() as network:
            network.machine()
    except NotPermitted:
        yield None
        return
    with Network() as network:
        yield network


def measure(folder: Path, task: Task, network: Network | None) -> list[Join]:
    """Let the sites of a task join one after the other, and carry out its run."""
    rig = Rig(folder, sorted(task.records), network)
    try:
        (rig.federation / "contract.toml").write_text(task.toml)
        rig.serve()
        joins = []
        for name, records in task.records.items():
            joins.append(joined(rig, name, records))
            rig.allow(name)
            rig.start(name)
        require_finished(rig, rig.begin(task.toml), RUN_S)
        return joins
    finally:
        rig.close()


def joined(rig: Rig, name: str, records: Path) -> Join:
    """Invite a site, type its one command, and return what it took. SystemExit if it is not ready.

    The invitation is the one string; it is given in the command line, as whoever pastes it does.
    """
    secret = enrolment.invite(Federation(rig.federation), name, time.time()).text()
    rig.until(lambda: _open(rig), JOIN_S, why="the door")
    prefix = rig.machines[name].prefix if name in rig.machines else []
    words = ["site", "join", secret, "--data", str(records), "--folder", str(rig.site(name))]
    began = time.perf_counter()
    done = subprocess.run(
        [*prefix, *COMMAND, *words],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=rig.env, timeout=JOIN_S,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if done.returncode or "\nready" not in done.stdout:
        raise SystemExit(f"{name} is not ready: {done.stdout}\n{done.stderr}")
    return Join(site=name, seconds=seconds)


def _open(rig: Rig) -> bool:
    """Whether the coordinator has started."""
    federation = Federation(rig.federation)
    if not SuperLink(federation.socket_folder() / "superlink").ready():
        return False
    address = federation.settings.address
    host, _, port = address.rpartition(":")
    probe = f"import socket; socket.create_connection(({host!r}, {port}), 2).close()"
    prefix = rig.machines["coordinator"].prefix if rig.machines else []
    asked = subprocess.run([*prefix, COMMAND[0], "-S", "-c", probe], capture_output=True)
    return asked.returncode == 0
