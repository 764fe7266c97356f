"""A real SuperLink and its SuperNodes on loopback, for as long as a test needs them.

Every process is started in a group of its own and the whole group is ended on the way out,
whatever happened, with the ClientApp and ServerApp processes that Flower starts itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from anabranch.simulations.grid import QUIET
from tests.ports import free_port

BIN = Path(sys.executable).parent
APP = Path(__file__).resolve().parents[2] / "examples" / "flower-app"


class SuperLink:
    """`with SuperLink(folder) as link: link.node(site); link.run(…)`."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "flower-home"
        self.logs = folder / "logs"
        self.address = f"127.0.0.1:{free_port()}"
        self._groups: list[subprocess.Popen[bytes]] = []
        self._stack = ExitStack()
        self._env = {
            **os.environ,
            **QUIET,
            "FLWR_HOME": str(self.home),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> SuperLink:
        self.home.mkdir(parents=True)
        self.logs.mkdir()
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "lo"\n[superlink.lo]\naddress = "{self.address}"\n'
            "insecure = true\n"
        )
        port = self.address.split(":")[1]
        try:
            self._start("superlink", "flower-superlink", "--host", "127.0.0.1", "--port", port)
            self._wait_until_healthy()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def node(self, site: Path, kind: str = "site") -> subprocess.Popen[bytes]:
        """Start the SuperNode of a site, or of a gateway."""
        return self._start(
            site.name,
            "flower-supernode",
            *("--superlink", self.address, "--host", "127.0.0.1", "--port", str(free_port())),
            *("--node-config", f'{kind}="{site}"'),
        )

    def run(self, settings: str, *, timeout_s: float = 150) -> str:
        """Run the example app and return what `flwr run` shows until the run ends."""
        process = self.start_run(settings)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        return self.log("flwr-run")

    def start_run(self, settings: str) -> subprocess.Popen[bytes]:
        """Start the example app; the process ends with the run."""
        command = [BIN / "flwr", "run", APP, "lo", "--stream", "--run-config", settings]
        return self._popen("flwr-run", [str(part) for part in command])

    def alive(self) -> list[int]:
        """Return the process groups of this rig in which anything still runs."""
        return [p.pid for p in self._groups if group_exists(p.pid)]

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text()

    def _start(self, name: str, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        return self._popen(name, [str(BIN / program), "--insecure", *arguments])

    def _popen(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        file = self._stack.enter_context((self.logs / f"{name}.log").open("ab"))
        process = subprocess.Popen(
            command, env=self._env, stdout=file, stderr=file, start_new_session=True
        )
        self._groups.append(process)
        return process

    def _wait_until_healthy(self) -> None:
        def healthy() -> bool:
            with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"http://{self.address}/health", timeout=2).close()
                return True
            return False

        wait_for(healthy, 60)

    def _end(self) -> None:
        for process in reversed(self._groups):
            end_group(process)
        self._stack.close()


def end_group(process: subprocess.Popen[bytes], *, kindly: bool = True) -> None:
    """End a process and all that it started: kindly first, unless told not to."""
    for number in (signal.SIGTERM, signal.SIGKILL) if kindly else (signal.SIGKILL,):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)


def group_exists(group: int) -> bool:
    """Whether a process of the group is alive; one that has ended and waits for us is not."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(done: Callable[[], bool], limit_s: float) -> None:
    """Look ten times a second whether another process is as far as `done` says."""
    end, pause = time.monotonic() + limit_s, threading.Event()
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"not there after {limit_s} s")
        pause.wait(0.1)


@contextmanager
def superlink(folder: Path, sites: dict[str, Path]) -> Iterator[SuperLink]:
    """Yield a SuperLink with one SuperNode per site."""
    with SuperLink(folder) as link:
        for site in sites.values():
            link.node(site)
        yield link
