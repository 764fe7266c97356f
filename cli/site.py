"""anabranch site: what the data engineer of a site types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.output import Json, emit

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Take part with your records.")


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="CSV, TSV, JSONL, Parquet, or a folder of images.")],
    run: Annotated[Path, typer.Option("--run", help="The run.toml the coordinator gave you.")],
    show_values: Annotated[
        bool, typer.Option("--show-values", help="Print the offending cells, too.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Check records against a run's data contract. Nothing is sent, nothing is trained."""
    from anabranch.client.check import check_data

    report = check_data(data, run, show_values=show_values)
    emit(report.as_dict(), report.text(), as_json=as_json)
    return 0 if report.ok else 1
