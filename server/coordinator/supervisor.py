"""`anabranch coordinator serve`: the processes of a coordinator, each started again if it ends.

    superlink   Flower's SuperLink on its socket
    door        the public port
    page        the read-only page
    run <id>    one for each run that is wanted and not over

The state is on disk, so that any of them, and this process too, may be killed at any time: what is
started again goes on. A process that keeps ending is started after a pause that doubles up to
PAUSE_S, a run's that has merged a round since at once; one that ends `runs.restarts` times without
a round between has failed.
Output of each goes to logs/<name>.log, at most two files of LOG_BYTES.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from anabranch.protocols.errors import AnabranchError
from anabranch.server import tracking
from anabranch.server.coordinator.child import FAILED, FINISHED, STOPPED
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.settings import split_address
from anabranch.server.coordinator.state import RunEntry
from anabranch.server.superlink import SuperLink, environment

TICK_S = 0.1
RECONCILE_S, BACKUP_S = 3.0, 3600.0
STEADY_S = 10.0  # after so long a process counts as well
SHORTEST_PAUSE_S, PAUSE_S = 0.2, 30.0
END_S = 10.0  # to end by themselves
LOG_BYTES = 5 << 20
PACKAGE = "anabranch.server.coordinator"

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Child:
    """One process, and when it is to be started again."""

    name: str
    command: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    due: float = 0.0
    pause: float = 0.0

    def start(self, now: float) -> None:
        """Start it; it ends with this process, however this process ends."""
        self.log.parent.mkdir(mode=0o700, exist_ok=True)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | environment(),
                start_new_session=True,
            )
        self.started = now

    def ended(self, now: float) -> int | None:
        """Return its exit code once it has ended, and plan the next start."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None
        again = min(2 * self.pause or SHORTEST_PAUSE_S, PAUSE_S)
        self.pause = 0.0 if now - self.started > STEADY_S else again
        self.due = now + self.pause
        return code

    def got_on(self) -> None:
        """Start it again soon: it has done something since it was started."""
        self.due, self.pause = self.due - self.pause, 0.0

    def end(self) -> None:
        """Tell it to end."""
        if self.process is not None:
            self.process.terminate()


@dataclass(eq=False)
class Supervisor:
    """Keeps the processes of one federation alive until `stop` is set."""

    federation: Federation
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        folder = self.federation.folder
        self.socket = self.federation.socket_folder() / "superlink"
        self.link = SuperLink(self.socket)
        here, at = str(folder), str(self.socket)
        self.children: dict[str, Child] = {}
        self._add("superlink", "superlink_server", at, str(self.federation.superlink_database))
        self._add("door", "door_server", here, at)
        self._add("page", "page.server", here)
        self._open = False  # sites can come
        self._reconciled, self._saved = 0.0, time.monotonic()  # when that was done last
        self._rounds: dict[str, int] = {}  # run -> checkpoints when its process was started last

    def serve(self) -> None:
        """Serve until `stop` is set. Raises RunError if somebody else serves this folder."""
        with self.federation.serving():
            self._prepare()
            self.federation.audit.append("serving", version=self.federation.version)
            try:
                while not self.stop.is_set():
                    try:
                        self._tick(time.monotonic())
                    except (AnabranchError, OSError) as error:  # a full disk ends nothing
                        log.error("%s; trying again in %.0f s", error, RECONCILE_S)
                        self.stop.wait(RECONCILE_S)
                    self.stop.wait(TICK_S)
            finally:
                self._end()
                self.federation.audit.append("stopped")

    def _tick(self, now: float) -> None:
        """Do what is due now."""
        self._runs()
        for child in list(self.children.values()):
            self._tend(child, now)
        if not self._open:
            self._opened()
        if now - self._reconciled > RECONCILE_S:
            self._reconciled = now
            for child in self.children.values():
                _cut(child.log)
            self._reconcile()
        if now - self._saved > BACKUP_S:
            self._saved = now
            self.federation.backup()

    def _opened(self) -> None:
        """Say so once sites can come: the door takes connections, and the SuperLink answers."""
        settings = self.federation.settings
        door = self.children["door"].process
        self._open = (
            door is not None and self.link.ready() and _listens(*split_address(settings.bind))
        )
        if self._open:
            log.info(
                "serving %s: sites come to %s, the page is at %s (`anabranch coordinator token` "
                "opens it), logs are in %s; Ctrl-C ends it",
                settings.name, settings.address, settings.page, self.federation.folder / "logs",
            )  # fmt: skip

    def _add(self, name: str, module: str, *arguments: str) -> Child:
        file = self.federation.folder / "logs" / f"{name.replace(' ', '-')}.log"
        child = Child(name, [f"{PACKAGE}.{module}", *arguments], file)
        self.children[name] = child
        return child

    def _prepare(self) -> None:
        """Check what is on disk before anything is started."""
        tracking.require(self.federation.settings.tracking)
        self.federation.state.check()
        self.federation.backup()
        self.federation.server_credentials()
        database = self.federation.superlink_database
        if database.exists() and not _whole(database):
            aside = database.with_name(f"{database.name}.damaged-{int(time.time())}")
            database.replace(aside)
            for suffix in ("-wal", "-shm"):
                database.with_name(database.name + suffix).unlink(missing_ok=True)
            log.warning("%s was damaged and is now %s; sites are asked again", database, aside.name)
            self.federation.audit.append("superlink-state-damaged", kept=aside.name)
        self.socket.unlink(missing_ok=True)

    def _runs(self) -> None:
        """Have one process for each run that is wanted and not over."""
        for entry in self.federation.state.runs():
            name = f"run {entry.run}"
            wanted = entry.desired == "running" and entry.state not in ("finished", "failed")
            if wanted and name not in self.children:
                self._add(name, "running", str(self.federation.folder), entry.run)
                log.info("run %s: starting", entry.run)

    def _tend(self, child: Child, now: float) -> None:
        """Start a child that is due; take note of one that has ended."""
        code = child.ended(now)
        if code is not None and child.name.startswith("run "):
            self._run_ended(child, code)
        elif code is not None:
            said = _last_line(child.log) if code else ""
            text = "%s ended (%s)%s; starting it again in %.1f s"
            log.warning(text, child.name, code, f": {said}" * bool(said), child.pause)
        if child.name not in self.children or child.process is not None or now < child.due:
            return
        if child.name == "superlink":
            self.socket.unlink(missing_ok=True)
        child.start(now)

    def _run_ended(self, child: Child, code: int) -> None:
        run = child.name.removeprefix("run ")
        state = self.federation.state
        entry = state.run(run)
        if entry is None or code in (FINISHED, STOPPED, FAILED):
            del self.children[child.name]
            log.info("run %s: %s", run, "over" if entry is None else entry.state)
            return
        rounds = self._count(entry)
        again = entry.restarts + 1
        if rounds != self._rounds.get(run, 0):
            again = 1
            child.got_on()
        self._rounds[run] = rounds
        most = self.federation.settings.runs.restarts
        if again > most:
            detail = f"its process ended {again} times without a round between; see {child.log}"
            state.set_run(run, state="failed", detail=detail, restarts=again)
            self.federation.audit.append("run-failed", run=run, reason=detail)
            del self.children[child.name]
            return
        state.set_run(run, restarts=again)
        log.warning("run %s: its process ended (%s); it goes on in %.1f s", run, code, child.pause)

    def _count(self, entry: RunEntry) -> int:
        return len(list((self.federation.run_folder(entry.run) / "checkpoints").glob("*.adapter")))

    def _reconcile(self) -> None:
        """Let the SuperLink know the nodes of active sites, and nobody else's."""
        if self.children["superlink"].process is None or not self.link.ready():
            return
        try:
            there = self.link.nodes()
            for site in self.federation.state.sites():
                key = site.public_key.encode()
                known = next((node for node, one in there.items() if one == key), None)
                if site.status != "active":
                    if known is not None:
                        self.link.unregister(known)
                elif known is None or known != site.node:
                    self.federation.state.set_site(site.name, node=self.link.register(key))
        except AnabranchError as error:
            log.warning("nodes: %s", error)

    def _end(self) -> None:
        """End the children, runs first; kill what does not end."""
        order = sorted(self.children.values(), key=lambda child: not child.name.startswith("run "))
        for child in order:
            child.end()
        end = time.monotonic() + END_S
        for child in order:
            if child.process is None:
                continue
            try:
                child.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            child.ended(time.monotonic())


def _listens(host: str, port: int) -> bool:
    """Whether somebody takes connections there."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def _whole(database: Path) -> bool:
    """Whether SQLite finds a database undamaged."""
    try:
        with closing(sqlite3.connect(database)) as db:
            return bool(db.execute("PRAGMA quick_check").fetchone() == ("ok",))
    except sqlite3.DatabaseError:
        return False


def _last_line(file: Path) -> str:
    """Return the end of a log, for people: at most 300 characters."""
    with file.open("rb") as log_file:
        log_file.seek(max(0, file.stat().st_size - 2000))
        lines = log_file.read().decode("utf-8", "replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _cut(file: Path) -> None:
    """Move what is in a log that has grown large aside; whoever appends to it goes on."""
    if file.exists() and file.stat().st_size > LOG_BYTES:
        shutil.copyfile(file, file.with_name(f"{file.name}.1"))
        os.truncate(file, 0)


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """Set `stop` at SIGINT and SIGTERM."""

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(folder: Path) -> None:
    """Serve the federation in `folder` until SIGINT or SIGTERM."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells every request
    supervisor = Supervisor(Federation(folder))
    with _signals(supervisor.stop):
        supervisor.serve()
