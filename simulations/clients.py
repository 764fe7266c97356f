"""Who may take part in a simulated run: client i by its place in the order of names.

Every engine asks the same question, `site(i)`, in whichever process it trains in. So what is
given to an engine can be pickled, and makes what it needs where it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from anabranch.client.app import open_site
from anabranch.client.flower import SiteLike
from anabranch.protocols.errors import ConfigError


class Clients(Protocol):
    """All clients of a run, in ascending order of their names."""

    @property
    def names(self) -> Sequence[str]:
        """Their names."""

    def site(self, index: int) -> SiteLike:
        """Return a client; it may be made for the call, and is not kept by the engine."""

    def weight(self, index: int) -> float:
        """Return how much work a client is, in any unit: its records, where they are known."""


class FolderClients:
    """Sites with a folder each (client/site.py)."""

    def __init__(
        self, sites: Mapping[str, Path], open_site: Callable[[Path], SiteLike] = open_site
    ) -> None:
        """`open_site` must be importable by name for engines that train in other processes."""
        if not sites:
            raise ConfigError("expected at least one site, got none")
        self.names = sorted(sites)
        self._folders = [sites[name] for name in self.names]
        self._open = open_site

    def site(self, index: int) -> SiteLike:
        """Return the site in folder `index`."""
        return self._open(self._folders[index])

    def weight(self, index: int) -> float:
        """Return 1: how many records are in a folder is not known without reading it."""
        return 1.0
