"""The process of a site: `anabranch site serve`.

    keeper thread   says that the site is here and what it does; renews the certificate;
                    writes state.json; drops the secrets of secure sums that are over
    main thread     a message ─► fetch ─► policy and work (client/policy, client/site.py) ─► answer

It runs what is installed here and nothing else: the hash of the app that a message's run names
must be that of this software, and no byte of an app is fetched. What fails goes to the log of
this process; to the coordinator goes a reason and a safe sentence (client/flower.py).

Nothing ends it but its owner: a coordinator that cannot be reached, refuses, or speaks nonsense
is asked again, after a pause that grows to PAUSE_S, and state.json says why and since when.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TypeVar

from flwr.app import Context, Message, RecordDict

from anabranch.client.agent.door import Door, renew_if_needed
from anabranch.client.agent.door import Refused as TurnedAway
from anabranch.client.agent.identity import PRIVATE_FOLDER, Identity
from anabranch.client.agent.preflight import preflight
from anabranch.client.agent.status import agent_state, write_state
from anabranch.client.agent.work import Doing, Told
from anabranch.client.answers import OTHERS
from anabranch.client.fleet import BEAT_S, Announced, Fleet, Over, Refused, Unreachable
from anabranch.client.flower import client_app, pack_refused
from anabranch.client.policy.code import app_hash, code_digest, version
from anabranch.client.policy.guard import GuardedSite
from anabranch.client.policy.policy_file import read_policy
from anabranch.client.policy.rules import NotAllowed
from anabranch.client.question import FOLDER
from anabranch.client.site import Site
from anabranch.client.sums.participant import PARTICIPANTS
from anabranch.protocols import messages
from anabranch.protocols.errors import AnabranchError, PolicyError, RunError
from anabranch.storage.audit_log import AuditLog
from anabranch.storage.dumps import forbid_dumps
from anabranch.storage.files import locked, sweep, write_atomic

REPORT_S = 2.0  # between two reports, at most; a change is told at once
BUSY_S, IDLE_S = 0.1, 1.0  # between two looks for a message: just after work, and later
QUIET_S = 3.0  # without a message, before the preflight is made
PAUSE_S = 15.0  # between two attempts, at most
RENEW_S = 20.0  # between two renewals of the certificate, at least
SKEW_S = 60.0  # a clock that is further off is named as the reason
OWN_TROUBLE = "trouble on the site's own machine: there, `anabranch site status` says which"
NODE = "identity/node"  # Flower's id of this site's node

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Agent:
    """One site's process. `stop` ends it between two steps of work."""

    folder: Path
    stop: threading.Event = field(default_factory=threading.Event)
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self.identity = Identity(self.folder)
        self.audit = AuditLog(
            self.folder / "audit.jsonl",
            self.folder / "audit.key",
            f"site {self.identity.name} of {self.identity.federation}",
        )
        self.doing = Doing(version(), self.clock)
        self.guarded = GuardedSite(
            self.folder, Site(self.folder, watch=self._watch), audit=self.audit, clock=self.clock
        )
        self.told = Told(self.guarded, self.doing)
        self.app = client_app(lambda context: self.told)
        self._link = "not connected yet"  # why the coordinator is not reached; "": it is
        self._fleet: Fleet | None = None
        self._pause = 0.0
        self._checked = False  # whether the preflight has been made
        self._pieces: dict[str, bytes] = {}  # of a message that is not whole yet
        self._renewed = float("-inf")  # of the monotonic clock

    def serve(self) -> None:
        """Work until `stop` is set."""
        sweep(self.folder)
        for name in (FOLDER, *OTHERS):  # what was learned from records is for the owner alone
            for folder in (*reversed(Path(name).parents[:-1]), Path(name)):
                (self.folder / folder).mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
                (self.folder / folder).chmod(PRIVATE_FOLDER)
        keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        keeper.start()
        written = False
        while not self.stop.is_set():
            try:
                if not written:
                    self.audit.append("agent-started", version=version(), code=code_digest())
                    written = True
                self._attend()
            except (AnabranchError, OSError) as error:  # OSError: a full disk
                self._lost(error)
        keeper.join(timeout=5.0)
        self.audit.append("agent-stopped")

    def _watch(self, activity: str, step: int, steps: int) -> None:
        self.doing.watch(activity, step, steps)  # type: ignore[arg-type]
        if self.stop.is_set():
            raise RunError("the agent is being stopped; the round goes on when it is back")

    def _attend(self) -> None:
        """Connect, and attend to messages until the connection is lost."""
        certificate = self.identity.certificate()
        fleet = Fleet(self.identity.address, self.identity.context(), self.identity.key())
        try:
            self._connect(fleet)
            self._fleet, self._link, self._pause = fleet, "", 0.0
            self.told.rest()
            log.info("connected to %s as node %s", self.identity.address, fleet.node)
            quiet = time.monotonic()
            while not self.stop.is_set():
                if (announced := fleet.receive()) is not None:
                    self._handle(fleet, announced)
                    self.told.rest()
                    quiet = time.monotonic()
                    continue
                if self.identity.certificate() != certificate:
                    return  # renewed: the next connection shows the new one
                self.told.rest()
                waited = time.monotonic() - quiet
                if waited > QUIET_S and not self._checked:
                    self._preflight()
                self.stop.wait(min(IDLE_S, BUSY_S + waited / 10))
        finally:
            self._fleet = None
            fleet.close()

    def _preflight(self) -> None:
        """Check the site while there is nothing else to do, and tell the coordinator."""
        self._checked = True
        found = preflight(self.folder, clock=self.clock)
        self.doing.set(
            ready=found.ready, checks=found.told, seconds_per_round=found.seconds_per_round
        )
        for check in found.checks:
            if not check.ok:
                log.warning("preflight: %s: %s", check.name, check.sentence)

    def _connect(self, fleet: Fleet) -> None:
        file = self.folder / NODE
        text = file.read_text(errors="replace") if file.exists() else ""
        known = int(text) if text.isdecimal() else 0  # else it is told anew
        if known:
            try:
                fleet.connect(known)
                return
            except Refused:
                file.unlink()  # of an earlier registration
                raise
        write_atomic(file, str(fleet.connect()).encode(), 0o600)

    def _handle(self, fleet: Fleet, announced: Announced) -> None:
        """Fetch one message, work on it, and send the answer."""
        began = time.monotonic()
        self.doing.set("receiving", message=announced.id, run="", round=0)
        try:
            message = self._message(fleet, announced)
            if message is None:
                return
            reply = self.app(message, _context(fleet, announced))
            if self.stop.is_set():
                return  # not an answer; the coordinator asks again
            self._answer(fleet, reply, time.monotonic() - began)
        except Over as error:
            self._link = ""  # it was the coordinator who said so
            log.info("message %s: %s", announced.id[:12], error)

    def _message(self, fleet: Fleet, announced: Announced) -> Message | None:
        """Return the message if it is for this software and the policy can be read; else refuse."""
        wants, ours = fleet.app(announced.run), app_hash(code_digest())
        try:
            if wants == ours:
                limit = read_policy(self.folder).limits.message_bytes
                return self._fetch(fleet, announced, limit)
            text = (
                f"the run is for other software (app {wants[:12]}…) than this site has (app "
                f"{ours[:12]}…, anabranch {version()}): install the version that it was proposed "
                "for, or have it proposed again; nothing was run"
            )
        except PolicyError as error:
            text = str(error)
        self.guarded.journal.refusal(str(announced.run), None, NotAllowed("code", text))
        refused = messages.Refused(site=self.identity.name, reason="policy", message=text)
        reply = Message(pack_refused(refused), reply_to=fleet.bare(announced))
        self._answer(fleet, reply, 0.0)
        return None

    def _fetch(self, fleet: Fleet, announced: Announced, limit: int) -> Message:
        """Fetch a message piece by piece."""
        heard = self._moved("receiving")
        return self._patiently(lambda: fleet.fetch(announced, limit, heard, self._pieces))

    def _answer(self, fleet: Fleet, reply: Message, seconds: float) -> None:
        """Send an answer. One with a delta is stored, too: it can be asked for again."""
        self.doing.set("uploading")
        self._patiently(lambda: fleet.answer(reply, seconds, self._moved("uploading")))

    def _patiently(self, call: Callable[[], T]) -> T:
        """Return what a call returns; while the coordinator is away, try again."""
        pause = 0.5
        while True:
            try:
                got = call()
            except Unreachable as error:
                self.doing.set(reason=str(error))
                self._link = str(error)
                if self.stop.wait(pause):
                    raise
                pause = min(2 * pause, PAUSE_S)
            else:
                self._link = ""
                return got

    def _moved(self, activity: str) -> Callable[[int, int], None]:
        def heard(done: int, total: int) -> None:
            self.doing.set(activity, step=done, steps=total)  # type: ignore[arg-type]
            if self.stop.is_set():
                raise Over("the agent is being stopped")

        return heard

    def _lost(self, error: Exception) -> None:
        """Say why there is no connection, and wait a little longer each time."""
        self._pause = min(max(0.5, 2 * self._pause), PAUSE_S)
        self._link = str(error)
        ours = isinstance(error, (Unreachable, Refused, Over))  # said by client/fleet.py: no paths
        self.doing.set("starting", reason=str(error) if ours else OWN_TROUBLE, message="")
        log.warning("%s; trying again in %.1f s", error, self._pause)
        self.stop.wait(self._pause)

    def _keep(self) -> None:
        """The keeper thread: every failure is said in state.json and tried again."""
        door: Door | None = None
        beaten = 0.0
        while not self.stop.is_set():
            self.doing.changed.clear()
            why = self._link
            try:
                door = door or Door(self.identity)
                heard = door.report(self.doing.outward)
                if abs(heard.time - self.clock()) > SKEW_S:
                    why = _skew(heard.time - self.clock())
                if self._renews(door, heard.renew):
                    self.audit.append("certificate-renewed", until=self.identity.expires)
                fleet = self._fleet
                if fleet is not None and time.monotonic() - beaten >= BEAT_S:
                    fleet.beat()
                    beaten = time.monotonic()
            except (AnabranchError, OSError) as error:
                telling = isinstance(error, TurnedAway)  # more than that there is no connection
                why = str(error) if telling else why or str(error)
                if door is not None:
                    door.close()
                door = None
            self._write(why)
            PARTICIPANTS.expire()
            self.doing.changed.wait(REPORT_S)
            self.stop.wait(0.1)  # at most ten reports a second
        if door is not None:
            door.close()
        self._write("stopped by its owner")

    def _renews(self, door: Door, asked: bool) -> bool:
        """Renew the certificate if that is due; whatever a coordinator says, not all the time."""
        now = time.monotonic()
        if now - self._renewed < RENEW_S:
            return False
        renewed = renew_if_needed(self.identity, door, self.clock(), asked)
        self._renewed = now if renewed else self._renewed
        return renewed

    def _write(self, why: str) -> None:
        state = agent_state(self.doing.report, connected=not why, at=self.clock(), link=why)
        try:
            write_state(self.folder, state)
        except OSError as error:
            log.error("state.json: %s", error)


def _context(fleet: Fleet, announced: Announced) -> Context:
    return Context(
        run_id=announced.run,
        node_id=fleet.node,
        node_config={},
        state=RecordDict(),
        run_config={},
    )


def _skew(seconds: float) -> str:
    side = "behind" if seconds > 0 else "ahead of"
    return (
        f"this machine's clock is {abs(seconds):.0f} s {side} the coordinator's: set it "
        "(timedatectl set-ntp true); until then certificates and calls may be refused"
    )


def serve(folder: Path) -> None:
    """Serve the site in `folder` until SIGINT or SIGTERM. One agent serves a folder at a time."""
    forbid_dumps()
    agent = Agent(folder)

    def end(number: int, frame: FrameType | None) -> None:
        agent.stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    busy = f"{folder}: another agent serves this site; `anabranch site status` shows what it does"
    with locked(folder / "agent", busy=busy):
        agent.serve()
