"""A federation on disk with toy sites, whose run's process is called in this one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from anabranch.protocols.adapter import Adapter
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.proposing import propose
from anabranch.server.coordinator.running import carry_out
from anabranch.server.coordinator.state import SiteEntry, Wait
from anabranch.server.coordinator.watching import Outside
from anabranch.server.superlink import SuperLinkGone
from anabranch.storage.audit_log import verify
from tests.runs import table_text
from tests.server.stations import EPOCH, FIRST, Fate, Station, Stations
from tests.simulations.rig import SIZES, ToySite, VirtualTime, adapter

RUN = table_text(("local_epochs = 2", "local_epochs = 2\nholdout = 0.2"))


class Attached(Stations):
    """Stations as a Flower run of their own; `gone` says when the SuperLink is away."""

    flower_run = 0
    gone: Callable[[], bool] = staticmethod(lambda: False)

    def pull_messages(self, message_ids: Any) -> Any:
        if self.gone():
            raise SuperLinkGone("the SuperLink went: connection refused")
        return super().pull_messages(message_ids)


class Coordinator:
    """A federation on disk with toy sites, whose run's process is called in this one."""

    def __init__(
        self, folder: Path, *, toml: str = RUN, scripts: dict[str, list[Fate]] | None = None
    ) -> None:
        self.federation = Federation.create(folder / "federation", "heart", ["localhost"], 8443)
        self.time, self.attached = VirtualTime(), list[int | None]()
        toys = [ToySite(name, n) for name, n in sorted(SIZES.items())]
        self.stations = [Station(one, list((scripts or {}).get(one.name, ()))) for one in toys]
        for node, site in enumerate(toys, FIRST):
            entry = SiteEntry(
                name=site.name, key=f"{node:064x}", public_key=f"key {node}", node=node,
                joined=EPOCH, expires=EPOCH + 1e7, serial="1", version="1",
            )  # fmt: skip
            self.federation.state.add_site(entry)
        self.toml = folder / "run.toml"
        self.toml.write_text(toml)
        self.run = propose(self.federation, self.toml, EPOCH).run
        self.ended = False
        self.gone: Callable[[], bool] = lambda: False
        self.first: Callable[[Any], Adapter] = lambda config: adapter()
        self.sleeps: list[Callable[[], None]] = []

    @property
    def folder(self) -> Path:
        return self.federation.run_folder(self.run)

    @property
    def entry(self) -> Any:
        return self.federation.state.run(self.run)

    def attach(self, stale: int | None) -> AbstractContextManager[Attached]:
        @contextmanager
        def attached() -> Iterator[Attached]:
            if self.gone():
                raise SuperLinkGone("the SuperLink does not answer")
            self.attached.append(stale)
            grid = Attached(self.stations, self.time)
            grid.gone, grid.flower_run = self.gone, 70 + len(self.attached)
            yield grid

        return attached()

    def sleep(self, seconds: float) -> None:
        for hook in self.sleeps:
            hook()
        self.time.sleep(seconds)

    def life(self) -> int:
        """Call the run's process; return its exit code."""
        return carry_out(
            self.federation,
            self.run,
            Outside(
                attach=self.attach,
                ended=lambda: self.ended,
                first=self.first,
                clock=self.time.clock,
                now=lambda: EPOCH + self.time.now,
                sleep=self.sleep,
                poll_s=1.0,
            ),
        )

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def audited(self) -> list[str]:
        lines = (self.federation.folder / "audit.jsonl").read_text().splitlines()
        verify(self.federation.folder / "audit.jsonl")
        return [json.loads(line)["kind"] for line in lines]

    def waits(self) -> Wait | None:
        return self.federation.state.waits().get(self.run)

    def adapters(self) -> dict[str, bytes]:
        files = (self.folder / "checkpoints").iterdir()
        return {file.name: file.read_bytes() for file in files}
