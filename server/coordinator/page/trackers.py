"""Follows every run for TensorBoard and MLflow, beside the page and out of the runs' way.

A tracking server that is away or refuses delays nothing: what was not written is tried again, and
the page says so meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from msgspec.structs import replace

from anabranch.protocols.errors import AnabranchError
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.page.shown import Alert, View
from anabranch.server.coordinator.page.view import Facts, Watcher
from anabranch.server.tracking import Tracker, require

EVERY_S = 5.0

log = logging.getLogger(__name__)


class Trackers:
    """The writers of all runs of a federation."""

    def __init__(self, federation: Federation, now: Callable[[], float] = time.time) -> None:
        self._federation, self._now = federation, now
        self._watcher = Watcher(federation)
        self._trackers: dict[str, Tracker] = {}
        self.problem = ""  # why not everything has been written

    @property
    def wanted(self) -> bool:
        """Whether coordinator.toml asks for any."""
        settings = self._federation.settings.tracking
        return settings.tensorboard or settings.mlflow is not None

    def look(self) -> None:
        """Write what is over and was not written; `problem` says what could not be."""
        try:
            require(self._federation.settings.tracking)
            self._write(self._watcher.facts(self._now()))
        except AnabranchError as error:
            if str(error) != self.problem:
                log.warning("tracking: %s", error)
            self.problem = str(error)
        else:
            self.problem = ""

    def _write(self, facts: Facts) -> None:
        listed = {one.entry.run for one in facts.runs}
        for gone in self._trackers.keys() - listed:
            self._trackers.pop(gone).close()
        for one in facts.runs:
            entry, settings = one.entry, self._federation.settings.tracking
            folder = self._federation.run_folder(entry.run)
            if not folder.is_dir():
                continue
            if entry.run not in self._trackers:
                self._trackers[entry.run] = Tracker(settings, folder, entry.run, entry.name)
            self._trackers[entry.run].catch_up(one.log, one.config, entry.state)

    def alerted(self, view: View) -> View:
        """Return the view with what went wrong here."""
        if not self.problem:
            return view
        alert = Alert(kind="tracking", level="problem", about="coordinator", text=self.problem)
        return replace(view, alerts=(*view.alerts, alert))

    def follow(self, stop: threading.Event) -> None:
        """Look every EVERY_S until `stop` is set."""
        while not stop.is_set():
            self.look()
            stop.wait(EVERY_S)
