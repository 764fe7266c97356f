"""Witnesses of a ledger: small files that say how far it had come.

    <ledger>.head                                        beside the ledger
    $XDG_STATE_HOME/anabranch/ledgers/<ledger id>.head   in the user's state folder; the variable
                                                         is ~/.local/state unless set

A chain vouches for its beginning and its middle, but not for its end: events that were cut off,
and a ledger that was exchanged for an older copy, look whole. A witness knows the head and where
the ledger was, so both are noticed, as is a ledger that was deleted or exchanged for another.

A witness is written after the commit it speaks of. It may lag behind, never run ahead: what is
in it is a beginning of the chain, or somebody changed one of the two.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from anabranch.protocols.chain import Witness
from anabranch.protocols.errors import PrivacyError
from anabranch.storage.chain import Beginning, Spending, State
from anabranch.storage.files import sync_folder, write_atomic


def state_folder(otherwise: str = "") -> Path:
    """Return the folder of this user's witnesses; raise PrivacyError if there can be none.

    `otherwise` ends the message: what can be done but to set XDG_STATE_HOME.
    """
    base = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(base):  # the XDG specification has relative paths ignored
        return Path(base) / "anabranch" / "ledgers"
    try:
        return Path.home() / ".local" / "state" / "anabranch" / "ledgers"
    except RuntimeError:
        raise PrivacyError(
            "this user has no home folder for the ledger's second witness: set XDG_STATE_HOME to "
            f"a folder that stays{otherwise}"
        ) from None


@dataclass(frozen=True)
class Witnesses:
    """Where the witnesses of the ledger at `ledger` lie; `state` None: beside it alone."""

    ledger: Path
    state: Path | None
    adopt: str  # the command that accepts a loss, for messages

    @property
    def beside(self) -> Path:
        """Return the file beside the ledger."""
        return self.ledger.with_suffix(".head")

    def read(self, ledger_id: str | None) -> dict[Path, Witness]:
        """Return what is witnessed of this ledger, or of another one at its path, by file.

        `ledger_id` None: there is no ledger. Raises PrivacyError for a file that is no witness.
        """
        found: dict[Path, Witness] = {}
        if self.beside.exists():
            found[self.beside] = _read(self.beside)
        if self.state is not None and self.state.is_dir():
            here = self.path()
            for file in sorted(self.state.glob("*.head")):
                witness = _read(file)
                if witness.path == here or witness.ledger == ledger_id:
                    found[file] = witness
        return found

    def write(self, state: State[Beginning, Spending]) -> None:
        """Make every witness say how far the ledger is. Raises OSError."""
        witness = Witness(
            ledger=state.opened.ledger, path=self.path(), count=state.count, head=state.head
        )
        data = msgspec.json.encode(witness) + b"\n"
        for file in self.files(state):
            write_atomic(file, data)

    def forget(self, found: Iterable[Path], state: State[Beginning, Spending]) -> None:
        """Remove the witnesses among `found` that are not of the ledger in this state."""
        for file in set(found) - set(self.files(state)):
            file.unlink(missing_ok=True)
            sync_folder(file.parent)

    def files(self, state: State[Beginning, Spending]) -> list[Path]:
        """Return the files that a ledger in this state has."""
        if self.state is None:
            return [self.beside]
        return [self.beside, self.state / f"{state.opened.ledger}.head"]

    def path(self) -> str:
        """Return the ledger's path as a witness has it."""
        return str(self.ledger.resolve())

    def require(self, state: State[Beginning, Spending], found: dict[Path, Witness]) -> bool:
        """Raise PrivacyError unless every witness saw a beginning of the chain.

        Returns whether all of them are there and up to date. One that is missing is accepted if
        another one is there, or if the ledger is too young
        to have had any.
        """
        for file, witness in found.items():
            wrong = witness.contradiction(state.opened.ledger, state.heads)
            if wrong is not None:
                raise PrivacyError(
                    f"{self.ledger}: {wrong.format(seen=file)}. Private training stops; restore "
                    "the newest ledger from a backup. If it is lost for good, accept the present "
                    f"one, which records the loss: {self.adopt}"
                )
        if not found and state.witnessed:
            raise PrivacyError(
                f"{self.ledger}: the witnesses of this privacy ledger are gone, so nothing says "
                f"that it is the newest copy. Expected {self.beside}. Private training stops; "
                f"restore it from a backup, or, sure that no event is missing, accept the ledger "
                f"as it is: {self.adopt}"
            )
        current = [w for w in found.values() if w.head == state.head and w.path == self.path()]
        return len(current) == len(self.files(state))

    def require_none(self, found: dict[Path, Witness]) -> None:
        """Raise PrivacyError if there is a witness of a ledger that is not there."""
        for file, witness in found.items():
            raise PrivacyError(
                f"{self.ledger}: the privacy ledger is missing, but {file} says that it had "
                f"{witness.count} events. Private training stops: a new ledger would forget what "
                "was spent. Restore the ledger from a backup; if it is lost for good, begin a new "
                f"one that records the loss: {self.adopt}"
            )


def _read(file: Path) -> Witness:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Witness)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PrivacyError(
            f"{file}: this witness of a privacy ledger cannot be read ({error}). Private training "
            "stops; restore it from a backup. If no backup has it, remove the file: the other "
            "witness, if there is one, still counts"
        ) from None
