"""anabranch demo: four hospitals on this machine; and options that simulations share."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.output import Json, Progress, emit, table


class Device(StrEnum):
    """Where models run."""

    cpu = "cpu"
    cuda = "cuda"


Output = Annotated[
    Path | None, typer.Option("--output", help="Run folder; default runs/<name>-<time>.")
]


def demo(
    text: Annotated[
        list[str] | None, typer.Argument(help="Diagnoses to code at the end; default: examples.")
    ] = None,
    output: Output = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides records, adapters, shuffling.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    device: Annotated[Device, typer.Option(help="Where models are trained.")] = Device.cpu,
    quick: Annotated[
        bool, typer.Option("--quick", help="A quarter of the records, three rounds.")
    ] = False,
    secure: Annotated[
        bool, typer.Option("--secure", help="Under secure aggregation; compared with without.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Four hospitals learn clinical coding, with DP; minutes."""
    from anabranch.simulations.demo.run import EXAMPLES, run_demo
    from anabranch.simulations.demo.table import facts_of, rows_of

    with Progress() as progress:
        texts = text or list(EXAMPLES)
        summary, coded = run_demo(
            texts,
            output or run_folder("demo"),
            seed=seed,
            threads=threads,
            device=device.value,
            progress=progress,
            quick=quick,
            secure=secure,
        )
    lines = [table(["", "accuracy %", "macro-F1 %"], rows_of(summary)), "", *facts_of(summary)]
    lines += ["", "The int8 model, without torch, codes:"]
    rows = [[text, label, f"{p:.2f}"] for text, (label, p) in zip(texts, coded, strict=True)]
    lines.append(table(["text", "chapter", "p"], rows))
    folder = summary["folder"]
    lines.append(
        f"\nReport: {folder}/report.html\n"
        f'Yours:  anabranch edge infer {folder}/release "your diagnosis"'
    )
    emit(summary, "\n".join(lines), as_json=as_json)
    return 0


def run_folder(name: str) -> Path:
    """Return the default folder of a run that begins now."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
