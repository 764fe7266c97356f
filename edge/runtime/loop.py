"""The agent's actions and its loop (agent.py decides, this does).

One process per device's folder. A task that cannot be done (bundle refused, budget spent, data
that do not fit) is given back with the reason and forgotten; the network being away is no reason
to give anything back.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import agent, task
from anabranch.edge.runtime import sync as calls
from anabranch.edge.runtime.alone import only_one
from anabranch.edge.runtime.backoff import MAX_WINDOW_S, Backoff, Window
from anabranch.edge.runtime.conditions import (
    Sensors,
    Unmet,
    only_network,
    unmet,
    without_network,
)
from anabranch.edge.runtime.device_file import Conditions, read_device
from anabranch.edge.runtime.download import (
    fetch_bundle,
    fetch_frame,
    installed,
    open_installed,
    prune,
)
from anabranch.edge.runtime.engine import EngineName
from anabranch.edge.runtime.enrol import renew
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.peer import announced
from anabranch.edge.runtime.secure_task import require_allowed
from anabranch.edge.runtime.spool import Entry, Spool
from anabranch.edge.runtime.steps import Interrupted
from anabranch.edge.runtime.summing import Sum
from anabranch.edge.runtime.transport import (
    Gateway,
    GatewayRefused,
    GatewayUnavailable,
    NotAdmitted,
)
from anabranch.protocols.errors import AnabranchError, BundleError, DeviceError

WATCH_S = 5.0  # between two looks at the conditions while training


_NO_DATA = Unmet("data", "no records were given (--data), so nothing is trained")


@dataclass
class Agent:
    """The agent of one device. `say` gets a sentence for everything that happened.

    `conditions` None: they are not looked at. Times and sleeping are arguments for tests.
    """

    home: Home
    gateway: Gateway
    data: Path | None  # the device's records; None: no training, what waits is sent
    conditions: Conditions | None
    sensors: Sensors
    say: Callable[[str], None] = lambda text: None
    engine: EngineName = "joint"
    threads: int = 1
    backoff: Backoff = field(default_factory=Backoff)
    rng: random.Random = field(default_factory=random.Random)
    now: Callable[[], float] = time.time
    sleep: Callable[[float], object] = time.sleep

    def __post_init__(self) -> None:
        self.spool = Spool(self.home.spool)
        self._sum: Sum | None = None  # under way

    def run(self, *, once: bool, train: bool = True) -> None:
        """Work until there is nothing to do now (`once`), or for ever.

        Without `train` it ends where a task could be trained. `once` asks the gateway even before
        its window, and raises what went wrong: the caller wants to know. For ever, what goes wrong
        is said, and tried again later, a full disk as well. Training that was interrupted for lost
        conditions goes on when they hold again, or with the next call.

        Raises DeviceError if another process works for this folder.
        """
        begun = False
        with only_one(self.home):
            while True:
                try:
                    if not begun:
                        self._begin(once=once)
                        begun = True
                    if self._step(once=once, train=train):
                        return
                except OSError as error:  # nothing can be remembered either
                    failure = DeviceError(f"{self.home.folder}: {error.strerror or error}")
                    self.say(agent.plain(str(failure)))
                    if once:
                        raise failure from None
                    self.sleep(agent.POLL_S)

    def _begin(self, *, once: bool) -> None:
        for name in self.spool.recover():
            self.say(f"removed {name} from the spool: damaged")
        if once:
            memory = agent.read_memory(self.home)
            self._remember(msgspec.structs.replace(memory, call_unix=0.0, ask_unix=0.0))

    def _step(self, *, once: bool, train: bool) -> bool:
        """Decide and do; return whether to end."""
        action = agent.decide(self.facts())
        if isinstance(action, agent.Train | agent.Join) and not train:
            return True
        if isinstance(action, agent.Wait):
            if once and (self._sum is None or only_network(self.unmet())):
                self.say(f"waiting: {'; '.join(action.reasons)}")
                return True
            self.sleep(action.seconds)
            return False
        try:
            self.do(action)
        except Interrupted:
            self._note("training interrupted: conditions were lost; it goes on later")
            return once
        except AnabranchError as error:
            self._failed(error)
            if once:
                raise
        return False

    def facts(self) -> agent.Facts:
        """Return what is true now: disk, clock and sensors."""
        begun = task.remembered(self.home)
        doing = begun and agent.Doing(
            task=begun.id, deadline_unix=begun.deadline_unix, ready=installed(begun, self.home)
        )
        return agent.Facts(
            now_unix=self.now(),
            unmet=self.unmet(),
            entries=tuple(self.spool.entries()),
            doing=doing or None,
            memory=agent.read_memory(self.home),
        )

    def unmet(self) -> tuple[Unmet, ...]:
        """Return the conditions that do not hold now."""
        found = () if self.conditions is None else unmet(self.conditions, self.sensors.read())
        return found if self.data is not None else (*found, _NO_DATA)

    def do(self, action: agent.Action) -> None:
        """Take one action."""
        begun = task.remembered(self.home)
        if isinstance(action, agent.Drop):
            self.spool.remove(action.entry.task)
            self._sum = None
            self._note(f"delta of task {action.entry.task} dropped: its deadline has passed")
        elif isinstance(action, agent.Send):
            self._send(action)
        elif isinstance(action, agent.Ask):
            self._ask()
        elif begun is None:
            return
        elif isinstance(action, agent.Finish):
            task.forget(self.home, begun)
        elif isinstance(action, agent.Expire):
            task.forget(self.home, begun)
            self._note(f"task {begun.id} forgotten: its deadline has passed")
        else:
            with self._given_back(begun):
                if isinstance(action, agent.Join):
                    self._join(begun, action.entry)
                elif isinstance(action, agent.Pull):
                    self._pull(begun)
                else:
                    self._train(begun)

    def _ask(self) -> None:
        if renew(self.home, self.gateway):
            self.gateway.reconnect(self.home)
            self._note("certificate renewed")
        told = calls.capabilities(
            self.home, 0 if self.data is None else calls.count_records(self.data)
        )
        got = calls.check_in(self.gateway, told, peer=announced(self.home))
        self._told(told.examples)
        if isinstance(got, Window):
            self._reached(got)
            self._note("checked in: no task now")
            return
        self._reached(None)
        longest = int(self.now() + MAX_WINDOW_S)
        got.deadline_unix = min(got.deadline_unix, longest)  # no gateway keeps a device for longer
        try:
            task.checked(got)
            require_allowed(got, read_device(self.home.folder).secure_aggregation, self.home)
        except AnabranchError as error:
            self._give_back(got, error)
            raise
        task.remember(self.home, got)
        self._note(f"task {got.id}: round {got.round} with bundle {got.bundle}")

    def _pull(self, begun: edge_pb2.Task) -> None:
        folder = fetch_bundle(self.gateway, begun, self.home)
        fetch_frame(self.gateway, begun.adapter, self.home)
        self._reached(None)
        freed = prune(self.home, keep=[begun.adapter.sha256.hex()])
        self._note(f"task {begun.id}: {folder.name} of {begun.bundle} is here, {freed} bytes freed")

    def _train(self, begun: edge_pb2.Task) -> None:
        if self.data is None:
            return
        work = task.checked(begun)
        folder = self.home.bundle(begun.bundle, begun.bundle_version)
        try:
            bundle = open_installed(folder, self.home)
        except BundleError:
            shutil.rmtree(folder, ignore_errors=True)  # damaged here: the next one is downloaded
            raise
        frame = fetch_frame(self.gateway, begun.adapter, self.home)
        entry = task.perform(
            work,
            bundle,
            frame,
            self.data,
            self.home,
            spool=self.spool,
            engine=self.engine,
            threads=self.threads,
            should_stop=self._watch(begun.deadline_unix),
        )
        self._note(f"task {begun.id}: trained {entry.steps} steps on {entry.examples} records")

    def _send(self, action: agent.Send) -> None:
        entry = action.entry
        try:
            self._tell(entry)
            verdict = calls.send(self.gateway, self.spool, entry)
        except GatewayRefused as error:
            verdict = calls.Verdict(accepted=False, reason=str(error), window=None)
        self.spool.remove(entry.task)
        self._reached(verdict.window)
        word = "accepted" if verdict.accepted else f"refused: {verdict.reason}"
        self._note(f"delta of task {entry.task} {word}")

    def _join(self, begun: edge_pb2.Task, entry: Entry) -> None:
        """Take the next step of a secure sum. The task goes first: else it would train again."""
        if self._sum is None or self._sum.task.id != begun.id:
            self._tell(entry)
            self._sum = Sum(self.home, begun, entry, self.spool)
            self._note(f"task {begun.id}: ready for the secure sum of round {begun.round}")
        try:
            outcome = self._sum.step(self.gateway)
        except GatewayRefused as error:
            outcome = calls.Verdict(accepted=False, reason=str(error), window=None)
        if isinstance(outcome, Window):
            memory = agent.read_memory(self.home)
            self._remember(agent.called_again(memory, self.now(), outcome, self.rng))
            return
        self._sum = None
        task.forget(self.home, begun)
        self.spool.remove(entry.task)
        self._reached(outcome.window)
        word = "is in the sum" if outcome.accepted else f"is in no sum: {outcome.reason}"
        self._note(f"delta of task {entry.task} {word}")

    def _tell(self, entry: Entry) -> None:
        """Check in once more if there are more records than then: as many as told are counted.

        A task of another round that comes back is not lost: the gateway offers it again.
        """
        if entry.examples > agent.read_memory(self.home).told:
            told = calls.capabilities(self.home, entry.examples)
            calls.check_in(self.gateway, told, resume=entry.task)
            self._told(entry.examples)

    def _told(self, examples: int) -> None:
        memory = agent.read_memory(self.home)
        self._remember(msgspec.structs.replace(memory, told=examples))

    def _watch(self, deadline_unix: float) -> Callable[[], bool]:
        """Return what training asks before every micro-batch; it looks every WATCH_S seconds."""
        looked = self.now()

        def should_stop() -> bool:
            nonlocal looked
            now = self.now()
            if 0 <= now - looked < WATCH_S:  # a clock that was set back is no reason not to look
                return False
            looked = now
            return looked > deadline_unix or bool(without_network(self.unmet()))

        return should_stop

    @contextmanager
    def _given_back(self, begun: edge_pb2.Task) -> Iterator[None]:
        """Give the task back if it cannot be done; the network is no reason to."""
        try:
            yield
        except (GatewayUnavailable, NotAdmitted, Interrupted):
            raise
        except AnabranchError as error:
            self._give_back(begun, error)
            raise

    def _give_back(self, begun: edge_pb2.Task, error: AnabranchError) -> None:
        self._sum = None
        task.forget(self.home, begun)
        self.spool.remove(begun.id)
        try:
            self._reached(calls.abort(self.gateway, begun.id, type(error).__name__))
        except DeviceError as unreachable:
            self.say(agent.plain(f"task {begun.id} is not given back: {unreachable}"))

    def _reached(self, window: Window | None) -> None:
        memory = agent.read_memory(self.home)
        self._remember(agent.reached(memory, self.now(), window, self.rng))

    def _failed(self, error: AnabranchError) -> None:
        memory = agent.failed(agent.read_memory(self.home), self.now(), self.backoff, self.rng)
        self._remember(agent.noted(memory, str(error)))
        self.say(agent.plain(str(error)))

    def _note(self, text: str) -> None:
        self._remember(agent.noted(agent.read_memory(self.home), text))
        self.say(agent.plain(text))

    def _remember(self, memory: agent.Memory) -> None:
        agent.write_memory(self.home, memory)
