"""anabranch edge: what runs on a device. Nothing here imports torch."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.output import Json, emit, table


class Precision(StrEnum):
    """The models of a release."""

    int8 = "int8"
    fp32 = "fp32"


app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Run models on a device.")


@app.command()
def infer(
    release: Annotated[Path, typer.Argument(help="The release/ folder of a run.")],
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts to classify; without any, lines of stdin.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels shown per text.")] = 1,
    precision: Annotated[Precision, typer.Option(help="Which of the release's models.")] = (
        Precision.int8
    ),
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    as_json: Json = False,
) -> int:
    """Classify texts with a release's ONNX model; every file is verified first."""
    from anabranch.edge.runtime.classify import Model

    texts = text or [line.strip() for line in sys.stdin if line.strip()]
    model = Model.open(release, precision=precision.value, threads=threads)
    ranked = list(zip(texts, model.ranked(texts, top=top), strict=True))
    results = [
        {"text": one, "labels": [{"label": name, "probability": p} for name, p in labels]}
        for one, labels in ranked
    ]
    rows = [[name, f"{p:.2f}", one] for one, labels in ranked for name, p in labels]
    emit({"results": results}, table(["label", "p", "text"], rows), as_json=as_json)
    return 0
