"""anabranch audit: test what a private run claims."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.output import Json, Progress, emit


def audit(
    run: Annotated[
        Path, typer.Argument(help="Folder of a finished run, or one with its run.toml.")
    ],
    site: Annotated[
        list[str] | None, typer.Option("--site", help="This site alone; may be repeated.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Your own records: a site audits itself.")
    ] = None,
    non_members: Annotated[
        Path | None, typer.Option("--non-members", help="Records the run was not trained on.")
    ] = None,
    canaries: Annotated[int, typer.Option(min=1, help="Canaries per site.")] = 400,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Fixes coins and directions, not the noise.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Attack a run's own training; exit code 1 if a test refutes what the run claims."""
    import msgspec

    from anabranch.client.audit.report import text
    from anabranch.server.audit import audit as run_audit

    with Progress() as progress:
        progress.stage("replays", 0)
        report = run_audit(
            run,
            sites=site or (),
            canaries=canaries,
            seed=seed,
            data=data,
            non_members=non_members,
            on_replay=progress.advance,
        )
    emit(msgspec.to_builtins(report), text(report), as_json=as_json)
    return 0 if report.passed else 1
