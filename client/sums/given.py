"""Where it is written down to which sum the update of each round of a run was given.

A real site's notes outlive its process (participant.py says why): a JSON object {round: instance}
for each run. Attempts that were charged (noised.py) are noted in the same form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from anabranch.protocols.errors import RunError
from anabranch.storage.files import sync_folder, write_atomic

FOLDER = "secure"  # in the folder of a site or gateway


class Given(Protocol):
    """Where it is written down to which sum the update of each round of a run was given."""

    def read(self) -> dict[int, str]:
        """Return round -> Terms.instance. Raises RunError if that cannot be read."""

    def write(self, given: dict[int, str]) -> None:
        """Keep it; it is durable when this returns. Raises RunError if it cannot be."""


@dataclass(eq=False)
class InMemory:
    """Of a simulated site."""

    given: dict[int, str] = field(default_factory=dict)

    def read(self) -> dict[int, str]:
        """Return round -> Terms.instance."""
        return dict(self.given)

    def write(self, given: dict[int, str]) -> None:
        """Keep it."""
        self.given = dict(given)


@dataclass(frozen=True)
class InFile:
    """Of a real site: a JSON object in its folder, for its owner alone."""

    path: Path

    def read(self) -> dict[int, str]:
        """Return round -> Terms.instance. Raises RunError if the file cannot be read."""
        if not self.path.exists():
            return {}
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=dict[int, str])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error  # without the folder
            raise RunError(
                f"{self._name} in the site's folder says which rounds were given "
                f"to a sum, and cannot be read ({why}). Restore it; without it nothing is given"
            ) from None

    def write(self, given: dict[int, str]) -> None:
        """Keep it; it is on the disk when this returns. Raises RunError if it cannot be written."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(self.path, msgspec.json.encode(dict(sorted(given.items()))), 0o600)
            for folder in self.path.parents[1:3]:  # in which the first round makes folders
                sync_folder(folder)
        except OSError as error:
            raise RunError(
                f"the site cannot write down to which sum its update goes ({error.strerror}), and "
                "gives it to none without that: make room there"
            ) from error

    @property
    def _name(self) -> str:
        return f"{FOLDER}/{self.path.parent.name}/{self.path.name}"
