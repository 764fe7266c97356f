"""A coordinator that dies in a round, and another process that goes on with what was kept.

    RoundEngine.run ─► dies where the plan says ─► `seconds` pass ─► a new RoundEngine.run(kept)

What is kept is the last Progress (server/progress.py), in memory; the clients and what is under
way between them and the coordinator live on. The new process knows nothing of the letters that
the old one sent: their answers are never fetched. Each restart of a plan happens once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from anabranch.protocols.adapter import Adapter
from anabranch.server.progress import Progress
from anabranch.server.result import Result
from anabranch.server.rounds import RoundEngine
from anabranch.simulations.faults.plan import Restart

Hook = Callable[..., None]


class CoordinatorDied(Exception):
    """The coordinator's process ends here."""

    def __init__(self, fault: Restart) -> None:
        super().__init__(f"round {fault.round}: the coordinator dies at {fault.at}")
        self.fault = fault


def run_restarting(
    make: Callable[..., RoundEngine],
    adapter: Adapter,
    restarts: Iterable[Restart],
    hooks: Mapping[str, Any],
    wait: Callable[[float], None],
) -> Result:
    """Return the result of a run whose coordinator dies as `restarts` say.

    `make` makes a round engine with other hooks (checkpoint, progress, event) than those in
    `hooks`; `wait` lets so many seconds pass. Raises what RoundEngine.run raises.
    """
    left, kept = list(restarts), None
    while True:
        watch = _Watch(left, kept, hooks)
        engine = make(checkpoint=watch.checkpoint, progress=watch.progress, event=watch.event)
        try:
            return engine.run(adapter, kept)
        except CoordinatorDied as death:
            kept = watch.kept
            left.remove(death.fault)
            wait(death.fault.seconds)


def waiting(clock: Callable[[], float], sleep: Callable[[float], None]) -> Callable[[float], None]:
    """Return a wait in virtual time, whatever happens meanwhile."""

    def wait(seconds: float) -> None:
        end = clock() + seconds
        while clock() < end:
            sleep(end - clock())

    return wait


class _Watch:
    """The hooks of one life of the coordinator."""

    def __init__(
        self, left: Iterable[Restart], kept: Progress | None, hooks: Mapping[str, Any]
    ) -> None:
        self.kept = kept
        self._left, self._hooks = tuple(left), hooks
        self._round = 0 if kept is None else kept.round  # the last one that was merged
        self._answers = 0  # to "train", since then

    def event(self, kind: str, **fields: Any) -> None:
        self._tell("event", kind, **fields)
        if kind == "site_trained":
            self._answers += 1
        if kind in ("site_trained", "round_started"):
            self._die(self._round + 1, "training", self._answers)

    def checkpoint(self, number: int, adapter: Adapter) -> None:
        self._die(number, "before-checkpoint")
        self._tell("checkpoint", number, adapter)
        self._die(number, "after-checkpoint")

    def progress(self, progress: Progress) -> None:
        if not progress.evaluated:
            self._die(progress.round, "merging")
        self.kept, self._round, self._answers = progress, progress.round, 0
        self._tell("progress", progress)
        if progress.evaluated:
            self._die(progress.round, "after-round")

    def _tell(self, hook: str, *args: Any, **fields: Any) -> None:
        if hook in self._hooks:
            self._hooks[hook](*args, **fields)

    def _die(self, number: int, at: str, answers: int = 0) -> None:
        """Die if the plan says so; `answers` matters in training alone."""
        for fault in self._left:
            now = at != "training" or fault.answers == answers
            if now and (fault.round, fault.at) == (number, at):
                raise CoordinatorDied(fault)
