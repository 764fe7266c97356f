"""anabranch edge: bundles, devices, gateways. Only `export` imports torch."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from anabranch.cli import edge_device, edge_export, edge_gateway, edge_ledger, edge_train
from anabranch.cli.edge_trust import Home_, Trust
from anabranch.cli.output import Json, emit, table


class Precision(StrEnum):
    """The models of a release or a bundle."""

    int8 = "int8"
    fp32 = "fp32"
    int4 = "int4"  # bundles only


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Bundles for devices: make, train, run, bring deltas home.",
)


@app.command()
def infer(
    release: Annotated[Path, typer.Argument(help="A bundle, or the release/ folder of a run.")],
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts to classify; without any, lines of stdin.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels shown per text.")] = 1,
    precision: Annotated[Precision, typer.Option(help="Which of its models.")] = Precision.int8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    home: Home_ = None,
    trust: Trust = None,
    released: Annotated[
        bool, typer.Option("--released", help="Not this device's own adapter (bundles only).")
    ] = False,
    as_json: Json = False,
) -> int:
    """Classify texts with the model of a release or a bundle; every file is verified first.

    A bundle answers with this device's own adapter, if there is one (edge train).
    """
    texts = text or [line.strip() for line in sys.stdin if line.strip()]
    whose = {}
    if edge_train.is_bundle(release):
        adapter, answers = edge_train.ranked(
            release,
            texts,
            home=home,
            trust=trust,
            released=released,
            precision=precision.value,
            threads=threads,
            top=top,
        )
        whose = {"adapter": adapter}
    else:
        from anabranch.edge.runtime.classify import Model

        if precision is Precision.int4:
            raise typer.BadParameter("a release has int8 and fp32 models; bundles have int4 too")
        name: Literal["int8", "fp32"] = "int8" if precision is Precision.int8 else "fp32"
        model = Model.open(release, precision=name, threads=threads)
        answers = model.ranked(texts, top=top)
    ranked = list(zip(texts, answers, strict=True))
    results = [
        {"text": one, "labels": [{"label": name, "probability": p} for name, p in labels]}
        for one, labels in ranked
    ]
    rows = [[name, f"{p:.2f}", one] for one, labels in ranked for name, p in labels]
    emit({"results": results, **whose}, table(["label", "p", "text"], rows), as_json=as_json)
    return 0


app.command()(edge_export.keygen)
app.command()(edge_export.export)
app.command()(edge_export.verify)
app.command()(edge_export.pack)
app.command()(edge_export.unpack)
app.command()(edge_export.bench)
app.command()(edge_train.train)
app.command()(edge_train.quantize)
app.command()(edge_ledger.ledger)
app.command()(edge_device.enroll)
app.command()(edge_device.pull)
app.command()(edge_device.sync)
app.command()(edge_device.status)
app.add_typer(edge_gateway.app, name="gateway")
