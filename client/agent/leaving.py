"""A site leaves: the coordinator is told, the key is destroyed, the books are kept.

    removed   identity/ (key, certificate, authority, coordinator.json), state.json, answers/
    kept      site.toml, policy.toml, approvals.json, the privacy ledger, the audit log, what the
              site trained for itself

The ledger stays because privacy that was spent stays spent: who joins again from this folder goes
on where it ended. Leaving twice is leaving once. Without the coordinator (offline) it still
believes in the site until its operator revokes it; nobody has the key any more.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anabranch.client.agent.door import Door, Refused
from anabranch.client.agent.identity import Identity, joined, remove_identity
from anabranch.client.agent.join import audit_log
from anabranch.client.agent.status import FILE as STATE
from anabranch.client.agent.status import AgentState, plain, read_state, running
from anabranch.protocols.errors import AnabranchError, ConfigError, RunError

ANSWERS = "answers"
PAUSE_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Left:
    """What leaving did."""

    folder: Path
    was_joined: bool
    told: bool  # the coordinator took note, or knew already
    sentence: str

    def as_dict(self) -> dict[str, object]:
        """Return it for --json."""
        return {
            "folder": str(self.folder),
            "was_joined": self.was_joined,
            "told": self.told,
            "sentence": self.sentence,
        }


def leave(
    folder: Path,
    reason: str = "",
    *,
    offline: bool = False,
    clock: Callable[[], float] = time.time,
) -> Left:
    """Leave the federation.

    Raises ConfigError while the agent runs, and RunError if the coordinator cannot be told and
    not `offline`; then nothing was removed.
    """
    if not joined(folder):
        there = remove_identity(folder)  # of a join that was interrupted
        _clear(folder)
        said = "an unfinished identity was removed" if there else "nothing was to be done"
        return Left(folder=folder, was_joined=False, told=False, sentence=f"not joined: {said}")
    if running(_state(folder), clock()):
        raise ConfigError(
            f"{folder}: the agent is running; stop it first (`systemctl --user stop`, or Ctrl-C)"
        )
    identity = Identity(folder)
    told, sentence = (False, "the coordinator was not told; ask its operator to revoke this site")
    if not offline:
        told, sentence = _tell(folder, reason)
    audit_log(folder, identity.name, identity.federation).append(
        "left", coordinator=identity.address, told=told, reason=plain(reason)
    )
    remove_identity(folder)
    _clear(folder)
    return Left(folder=folder, was_joined=True, told=told, sentence=sentence)


def _tell(folder: Path, reason: str, tries: int = 2) -> tuple[bool, str]:
    """Return (whether the coordinator knows, a sentence). Asked twice: an answer may be lost."""
    try:
        with Door(Identity(folder)) as door:
            door.leave(reason)
    except Refused as error:  # it does not know this site any more, or never will again
        return True, f"the coordinator does not know this site any more ({error})"
    except AnabranchError as error:
        if tries > 1:
            time.sleep(PAUSE_S)
            return _tell(folder, reason, tries - 1)
        raise RunError(
            f"{error}\nnothing was removed: try again, or `anabranch site leave --offline` and "
            "tell the coordinator's operator"
        ) from None
    return True, "the coordinator took note"


def _state(folder: Path) -> AgentState | None:
    try:
        return read_state(folder)
    except ConfigError:
        return None


def _clear(folder: Path) -> None:
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder / ANSWERS, ignore_errors=True)
