"""`log verify`: the audit log of a federation, and that of a site."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.output import emit

LogFile = Annotated[Path | None, typer.Argument(help="A log; default: that of the folder.")]
LogKey = Annotated[str | None, typer.Option(help="The public key that must have signed it.")]
Heads = Annotated[list[str] | None, typer.Option("--contains", help="A head that must be in it.")]


def verify_log(file: Path, key: str | None, contains: Sequence[str] | None, as_json: bool) -> int:
    """Print what is found in a log; return 0 if it is whole."""
    from anabranch.storage.audit_log import log_report

    result, text, whole = log_report(file, key, contains or ())
    emit(result, text, as_json=as_json)
    return 0 if whole else 1
