"""What a site must offer to be reached through Flower (flower.py), and what it may offer beside."""

from __future__ import annotations

from collections.abc import Sized
from typing import Protocol, runtime_checkable

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.messages import Assignment, Evaluated, Trained
from anabranch.protocols.secagg.floors import NO_LIMITS as NO_LIMITS
from anabranch.protocols.secagg.member import Answer, Limits
from anabranch.protocols.secagg.messages import Request
from anabranch.protocols.secagg.terms import Roster


class SiteLike(Protocol):
    """What a site must offer to be reached through Flower."""

    @property
    def name(self) -> str:
        """Its name in this run."""

    @property
    def max_rank(self) -> int | None:
        """The highest LoRA rank it trains; None: any."""

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        """Raise PolicyError if this run may not ask anything here; called before `sizes`."""

    def sizes(self, config: RunConfig) -> tuple[Sized, Sized]:
        """Return (training, held-out) records to be counted, or raise DataError."""

    def train(self, assignment: Assignment, adapter: Adapter) -> tuple[Trained, bytes]:
        """Return what it learned from `adapter`, the delta as one frame."""

    def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
        """Return metrics of `adapter` on held-out records."""


@runtime_checkable
class Rostered(Protocol):
    """A site whose owner is shown among whom a run would sum its updates."""

    def show_roster(self, roster: Roster) -> None:
        """Keep a roster for the question that follows it (`admit`)."""


@runtime_checkable
class SummingSite(SiteLike, Protocol):
    """A site that can be a member of secure sums."""

    def peer_key(self, run: str, config: RunConfig) -> str | None:
        """Return its Ed25519 public key in this run, hex; None: it takes part in no sum."""

    def secure(
        self, assignment: Assignment, request: Request, limits: Limits = NO_LIMITS
    ) -> Answer:
        """Answer one stage of a sum of the deltas of `assignment`, which it has trained.

        `limits` are its owner's. Raises ProtocolError for whatever does not fit, PolicyError
        below the limits, DataError for a delta that does not fit the sum's range.
        """
