"""A guarded site with all its parts at hand: files, clocks, log and the site behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from anabranch.client.flower import reason_of
from anabranch.client.policy.approvals import Approvals
from anabranch.client.policy.guard import GuardedSite, Watch
from anabranch.client.policy.rules import NotAllowed
from anabranch.client.policy.usage import UsageBook
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.messages import Assignment, Evaluated, Trained
from tests.client.policy.policies import (
    HERE,
    Clock,
    Notes,
    assignment_of,
    policy_of,
    private_config,
    signed_of,
    write_policy,
)
from tests.simulations.rig import ToySite, adapter

DOWN = sum(array.nbytes for array in adapter().arrays.values())


@dataclass
class Steps(ToySite):
    """A ToySite that works in steps, each of `seconds`, and tells whoever watches."""

    watch: Watch | None = None
    seconds: float = 0.0
    stopwatch: Clock = field(default_factory=lambda: Clock(0.0))
    heard: list[str] = field(default_factory=list)

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        self.heard.append("describe")

    def train(self, assignment: Assignment, before: Adapter) -> tuple[Trained, bytes]:
        self.heard.append(f"train {assignment.round}")
        for step in range(1, 4):
            self.stopwatch.now += self.seconds
            if self.watch is not None:
                self.watch("training", step, 3)
        return super().train(assignment, before)

    def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
        self.heard.append(f"evaluate {assignment.round}")
        return super().evaluate(assignment, adapter)


@dataclass
class Ward:
    """A guarded site with all its parts at hand."""

    folder: Path
    site: Steps = field(default_factory=lambda: Steps("aarhus"))
    notes: Notes = field(default_factory=Notes)
    clock: Clock = field(default_factory=Clock)
    resident: int = 0

    def __post_init__(self) -> None:
        self.config = private_config()
        self.signed = signed_of(self.config)
        self.set()
        self.begin()

    def set(self, **tables: Any) -> None:
        write_policy(self.folder, policy_of(**tables))

    def begin(self) -> None:
        """Start the site's process, or start it again."""
        self.site = Steps("aarhus", seconds=self.site.seconds, stopwatch=self.site.stopwatch)
        self.guard = GuardedSite(
            self.folder,
            self.site,
            audit=self.notes,
            clock=self.clock,
            here=HERE,
            stopwatch=self.site.stopwatch,
            memory=lambda: self.resident,
        )

    def describe(self) -> None:
        self.guard.admit("run-1", self.config, self.signed)

    def train(self, number: int = 1) -> tuple[Trained, bytes]:
        return self.guard.train(assignment_of(self.config, self.signed, number), adapter())

    def evaluate(self, number: int = 1) -> Evaluated:
        return self.guard.evaluate(assignment_of(self.config, self.signed, number), adapter())

    def approve(self) -> None:
        if not Approvals(self.folder).entries():
            Approvals(self.folder).note(
                self.signed.proposal, self.signed.key, self.config, self.clock()
            )
        Approvals(self.folder).approve(self.signed.proposal.digest, by="kim", now=self.clock())

    def used(self) -> Any:
        return UsageBook(self.folder).read("run-1")


def code_of(work: Callable[[], object]) -> str:
    with pytest.raises(NotAllowed) as error:
        work()
    assert reason_of(error.value) == "policy"
    return error.value.code
