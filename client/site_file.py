"""site.toml: what the owner of a site decides, and no coordinator can.

name = "cardiology"
data = "records.csv"        relative to the site's folder
device = "cpu"
max_rank = 4                highest LoRA rank this machine trains
ledger_witness = "state"    "folder": no second witness outside the site's folder

[budget]                    what all runs together may spend
epsilon = 8.0
delta = 1e-5
over = "row"                of any one row; "site": of all events, as if all rows were in each
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from anabranch.client.ledger import Ledger, Limit
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import Count, Device, Name, Positive
from anabranch.storage.witness import state_folder

LEDGER = "ledger.sqlite"


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[budget]: (ε, δ) for all runs together."""

    epsilon: Positive
    delta: Annotated[float, msgspec.Meta(gt=0, lt=0.1)]
    over: Literal["row", "site"] = "row"

    @property
    def limit(self) -> Limit:
        """Return the budget as the ledger enforces it."""
        name = "the [budget] of site.toml"
        return Limit(epsilon=self.epsilon, delta=self.delta, over=self.over, name=name)


class SiteFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """site.toml."""

    name: Name
    data: Annotated[str, msgspec.Meta(min_length=1)]  # relative to the site's folder
    device: Device = "cpu"
    max_rank: Count | None = None  # highest LoRA rank this machine trains; None: any
    ledger_witness: Literal["state", "folder"] = "state"  # where, beside the ledger's folder
    budget: Budget | None = None  # None: only runs have budgets


def read_site(folder: Path) -> SiteFile:
    """Return the folder's site.toml; raise ConfigError naming the field that is wrong."""
    file = folder / "site.toml"
    try:
        return msgspec.toml.decode(file.read_bytes(), type=SiteFile)
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}. `anabranch site join` makes a site's folder, which holds "
            "site.toml with name and data; name it with --folder"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file}: {error}. A site's folder holds site.toml with name and data"
        ) from None


def ledger_of(folder: Path, file: SiteFile) -> Ledger:
    """Return the site's privacy ledger, which is opened for each use."""
    return Ledger(folder / LEDGER, witness_folder(file))


def witness_folder(file: SiteFile) -> Path | None:
    """Return the folder of the ledger's second witness; None: the site does without it.

    Raises PrivacyError if there can be none.
    """
    if file.ledger_witness == "folder":
        return None
    return state_folder(', or ledger_witness = "folder" in site.toml to do without it')
