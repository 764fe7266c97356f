"""How every verb is told its folder: --folder, an environment variable, or the default."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

SITE = Path("site")  # what `anabranch site join` makes unless it is told otherwise
FEDERATION = Path(".")

SiteFolder = Annotated[
    Path,
    typer.Option("--folder", "-f", envvar="ANABRANCH_SITE", help="The site's folder."),
]
FederationFolder = Annotated[
    Path,
    typer.Option("--folder", "-f", envvar="ANABRANCH_COORDINATOR", help="The federation's folder."),
]


def option(folder: Path) -> str:
    """Return ` --folder FOLDER` as a command that is printed needs it; "" for the default."""
    return "" if folder == SITE else f" --folder {shlex.quote(str(folder))}"
