"""The process of one run: its rounds over the SuperLink, from wherever they were left.

    python -m anabranch.server.coordinator.running FOLDER RUN

    open the run's folder ─► load its progress ─► attach to the SuperLink ─► rounds ─► conclude
                                   ▲                     │
                                   └── the SuperLink went: wait for it, attach again

It may be killed at any time and started again: what was merged is on disk (progress_file.py), what
was under way is asked again, and a conclusion that was not finished is made again. While the
SuperLink is away it waits where it is, for AWAY_S; while the disk is full, for ROOM_S
(watching.py).

    exit code   0  finished
                3  stopped, by its operator (RunEntry.desired) or with the coordinator (SIGTERM)
                4  failed for good: RunEntry.detail says why; it is not to be started again
                5, or any other: start it again
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import msgspec
from flwr.serverapp import Grid

from anabranch.client.data.records import Records, load_records
from anabranch.client.policy.code import app_bundle
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.errors import AnabranchError, ConfigError, RunError
from anabranch.protocols.identity.proposal import Signed, require_fits
from anabranch.protocols.spec import require_same_spec
from anabranch.server.client_privacy import plan_of
from anabranch.server.coordinator.child import (
    AGAIN,
    FAILED,
    FINISHED,
    STOPPED,
    end_with_parent,
)
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.progress_file import ProgressFolder
from anabranch.server.coordinator.proposing import last_checkpoint, roster_of
from anabranch.server.coordinator.state import RunEntry
from anabranch.server.coordinator.watching import (
    AttachedGrid,
    Away,
    Outside,
    Patience,
    Stop,
    Watching,
)
from anabranch.server.evaluation import evaluator, require_shared_model
from anabranch.server.outcome import Finished, conclude
from anabranch.server.progress import Progress
from anabranch.server.result import Result
from anabranch.server.rounds import RoundEngine
from anabranch.server.store import RunFolder
from anabranch.server.superlink import SuperLink, SuperLinkGone

AWAY_S = 600.0  # how long a process waits for the SuperLink
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 1.0  # between two looks
SITES_LISTED = 100  # in one line of the audit log

log = logging.getLogger(__name__)


def main(folder: Path, run: str) -> int:
    """Run the process; return its exit code."""
    end_with_parent()
    signals: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: signals.append(number))
    federation = Federation(folder)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    link = SuperLink(federation.socket_folder() / "superlink")
    app = app_of(federation, run)

    def attach(stale: int | None) -> AbstractContextManager[AttachedGrid]:
        return link.attach(app, stale=stale)

    return carry_out(federation, run, Outside(attach=attach, ended=lambda: bool(signals)))


def app_of(federation: Federation, run: str) -> bytes:
    """Return the app bundle that names the software a run was proposed for.

    It is not what is installed here: sites have approved the run for theirs, and a coordinator of
    a newer version goes on with it.
    """
    entry = federation.state.run(run)
    if entry is None:
        return b""  # and nothing will be carried out
    proposal = msgspec.json.decode(entry.signed, type=Signed).proposal
    return app_bundle(proposal.code, proposal.version)


def carry_out(federation: Federation, run: str, outside: Outside) -> int:
    """Carry a run on to its end, if nothing stops it; return the exit code."""
    entry = federation.state.run(run)
    if entry is None:
        return FAILED
    if entry.state in ("finished", "failed"):
        return FINISHED if entry.state == "finished" else FAILED
    process = _Process(federation, entry, outside)
    try:
        return process.carry_out()
    except Stop as stop:
        return process.stopped(stop)
    except (Away, OSError) as error:
        return process.again(str(error))


class _Process:
    """One life of the process of one run."""

    def __init__(self, federation: Federation, entry: RunEntry, outside: Outside) -> None:
        self._federation, self._state = federation, federation.state
        self._entry, self._run, self._outside = entry, entry.run, outside
        later_s = federation.settings.runs.approve_s
        self._watching = Watching(
            self._state, self._run, clock=outside.clock, now=outside.now, later_s=later_s
        )
        self._patience = Patience(self._watching, outside)
        self._folder: RunFolder | None = None
        self._flower_run = entry.flower_run
        self._rounds = (0, 0)  # merged, planned

    def carry_out(self) -> int:
        """Carry the run on to its end, or write down why it failed. Raises Stop and Away."""
        try:
            self._carry_out()
        except AnabranchError as error:
            return self._failed(error)
        return FINISHED

    def _carry_out(self) -> None:
        entry = self._entry
        self._patience.require_wanted()
        self._set(state="starting", detail="")
        config = parse(entry.toml.encode(), source=f"run {self._run}")
        signed = msgspec.json.decode(entry.signed, type=Signed)
        require_fits(signed.proposal, self._run, config)
        paths = {"validation": entry.validation, "test": entry.test}
        require_shared_model(config, **paths)
        plan_of(config)
        own = {name: _records(path, config) for name, path in paths.items()}
        path = self._federation.run_folder(self._run)
        folder = self._folder = self._patience.kept(
            lambda: RunFolder.open(path, entry.toml.encode())
        )
        kept = ProgressFolder(
            path / "progress", private=config.client_privacy is not None, event=self._event
        )
        progress = self._loaded(kept, config, folder)
        self._rounds = (0 if progress is None else progress.round, config.federation.rounds)
        self._begin(signed, progress)
        result = self._trained(config, signed, kept, own["validation"])
        self._conclude(config, folder, result, own)

    # -- rounds ----------------------------------------------------------------------------------

    def _trained(
        self,
        config: RunConfig,
        signed: Signed,
        kept: ProgressFolder,
        own: Records | None,
    ) -> Result:
        """Return the result of all rounds, however often the SuperLink goes."""
        first: Adapter | None = None
        since: float | None = None  # the SuperLink is away
        pause = SHORTEST_PAUSE_S
        while True:
            progress = kept.load()
            if progress is None and first is None:
                first = self._first(config)
            start = first if progress is None else progress.adapter
            assert start is not None
            try:
                with self._outside.attach(self._flower_run) as grid:
                    since, pause = None, SHORTEST_PAUSE_S
                    self._attached(grid.flower_run)
                    return self._engine(cast(Grid, grid), config, signed, kept, own).run(
                        start, progress
                    )
            except SuperLinkGone as error:
                if since is None:
                    since = self._outside.clock()
                    self._event("superlink_gone", message=str(error))
                then = f"the SuperLink was away for {AWAY_S:g} s; see superlink.log"
                self._patience.wait("the SuperLink is back", since, since + AWAY_S, pause, then)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _engine(
        self,
        grid: Grid,
        config: RunConfig,
        signed: Signed,
        kept: ProgressFolder,
        own: Records | None,
    ) -> RoundEngine:
        folder, outside = self._folder, self._outside
        assert folder is not None

        def checkpoint(number: int, adapter: Adapter) -> None:
            self._patience.kept(lambda: folder.checkpoint(number, adapter))

        def keep(progress: Progress) -> None:
            self._patience.kept(lambda: kept.save(progress))
            self._rounds = (progress.round, config.federation.rounds)
            self._set(detail=self._place())

        return RoundEngine(
            grid,
            config,
            run=self._run,
            evaluate=None if own is None else evaluator(config, own),
            checkpoint=checkpoint,
            progress=keep,
            event=self._event,
            clock=outside.clock,
            sleep=self._patience.sleep,
            poll_s=outside.poll_s,
            connect_s=self._federation.settings.runs.connect_s,
            signed=signed,
            desk=self._watching.desk(),
            peers=roster_of(self._federation, self._run, signed.proposal),
        )

    def _loaded(
        self, kept: ProgressFolder, config: RunConfig, folder: RunFolder
    ) -> Progress | None:
        """Return the last progress; RunError if a noisy mean left that it does not know of."""
        progress = kept.load()
        known, announced = 0 if progress is None else progress.round, folder.announced()
        if config.client_privacy is not None and known < announced:
            raise RunError(
                f"{kept.path}: what was kept ends with round {known}, and round {announced} was "
                "announced: its noisy mean is made once. Restore the folder from a backup, or plan "
                "a new run"
            )
        return progress

    def _first(self, config: RunConfig) -> Adapter:
        """Return the adapter of round 0: the base model's, or the last of the run before."""
        first = self._outside.first(config)
        if self._entry.continues is None:
            return first
        file = last_checkpoint(self._federation.run_folder(self._entry.continues))
        if file is None:
            raise RunError(
                f"run {self._entry.continues}: its checkpoints are gone, and this run goes on from "
                "them: restore its folder, or propose this one anew"
            )
        adapter = wire.decode_adapter(file.read_bytes())
        require_same_spec(first.spec, adapter.spec)
        return adapter

    def _attached(self, flower_run: int) -> None:
        self._flower_run = flower_run
        self._set(state="running", flower_run=flower_run, detail=self._place())
        self._event("attached", flower_run=str(flower_run))

    def _begin(self, signed: Signed, progress: Progress | None) -> None:
        proposal = signed.proposal
        fields = {"run": self._run, "author": proposal.author, "proposal": proposal.digest}
        if progress is None and self._entry.flower_run is None:
            self._event("run_started", run=self._run, config=proposal.config)
            self._audit("run-started", **fields)
        else:
            self._event("run_resumed", run=self._run, round=self._rounds[0])
            self._audit("run-resumed", round=self._rounds[0], **fields)

    # -- the end ---------------------------------------------------------------------------------

    def _conclude(
        self, config: RunConfig, folder: RunFolder, result: Result, own: dict[str, Records | None]
    ) -> None:
        """Write report, release and summary, if they are not there whole, and say so."""
        self._watching.over()
        if not (folder.path / "summary.json").exists():
            shutil.rmtree(folder.path / "release", ignore_errors=True)  # of a killed conclusion
            finished = Finished(run=self._run, config=config, folder=folder, result=result)
            conclude(finished, **own, seconds=result.seconds)  # type: ignore[arg-type]
        spent = {
            name: {"rounds": row.rounds, "epsilon": row.epsilon, "ledger": row.ledger}
            for name, row in list(result.sites.items())[:SITES_LISTED]
        }
        self._audit("run-finished", run=self._run, rounds=len(result.history), sites=spent)
        self._set(state="finished", detail=f"{len(result.history)} rounds")

    def stopped(self, stop: Stop) -> int:
        """Write down that the run stopped where it is."""
        self._watching.over()
        detail = f"stopped {stop}, {self._place()}"
        state = "stopped" if stop.wished else "queued"
        self._state.set_run(self._run, state=state, detail=detail)
        if self._folder is not None:
            self._folder.event("run_stopped", message=detail)
        self._federation.audit.append("run-stopped", run=self._run, reason=detail)
        return STOPPED

    def _failed(self, error: AnabranchError) -> int:
        """Write down that the run has failed for good."""
        self._watching.over()
        self._event("run_failed", error=type(error).__name__, message=str(error))
        self._audit("run-failed", run=self._run, reason=str(error)[:2000])
        self._set(state="failed", detail=str(error))
        return FAILED

    def again(self, reason: str) -> int:
        """Let the supervisor start the process again."""
        self._watching.over()
        try:
            self._state.set_run(self._run, detail=f"to be started again: {reason}")
        except RunError as error:
            log.warning("run %s: %s", self._run, error)
        return AGAIN

    # -- books -----------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> None:
        if self._folder is None:
            return
        folder = self._folder
        self._patience.kept(lambda: folder.event(kind, **fields))
        if kind == "node_refused":
            said = {"reason": fields["reason"], "message": fields["message"][:500]}
            self._audit("site-refused", run=self._run, node=str(fields["node"]), **said)

    def _audit(self, kind: str, **fields: Any) -> None:
        self._patience.kept(lambda: self._federation.audit.append(kind, **fields))

    def _set(self, **changes: Any) -> None:
        self._patience.kept(lambda: self._state.set_run(self._run, **changes))

    def _place(self) -> str:
        merged, planned = self._rounds
        return f"{merged} of {planned} rounds merged"


def _records(path: str | None, config: RunConfig) -> Records | None:
    if path is None:
        return None
    if not Path(path).exists():
        raise ConfigError(f"{path}: the coordinator's records are not there; put the file back")
    return load_records(Path(path), config)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), sys.argv[2])
    sys.stderr.flush()
    os._exit(code)  # Flower's threads may be in a call to a SuperLink that is away
