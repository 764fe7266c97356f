"""anabranch edge: what runs on a device. Nothing here imports torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.output import Json, emit, table

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Run models on a device.")


@app.command()
def infer(
    release: Annotated[Path, typer.Argument(help="The release/ folder of a run.")],
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts to classify; without any, lines of stdin.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels shown per text.")] = 1,
    model: Annotated[str, typer.Option(help="int8 or fp32.")] = "int8",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    as_json: Json = False,
) -> int:
    """Classify texts with a release's ONNX model; every file is verified first."""
    from anabranch.edge.runtime.classify import open_release

    texts = text or [line.strip() for line in sys.stdin if line.strip()]
    classifier = open_release(release, model=model, threads=threads)
    results = [
        {"text": one, "labels": [{"label": name, "probability": p} for name, p in ranked[:top]]}
        for one, ranked in zip(texts, classifier.classify(texts), strict=True)
    ]
    rows = [
        [label["label"], f"{label['probability']:.2f}", result["text"]]
        for result in results
        for label in result["labels"]
    ]
    emit({"results": results}, table(["label", "p", "text"], rows), as_json=as_json)
    return 0
