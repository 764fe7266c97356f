"""anabranch demo and anabranch simulate: whole federations on this machine."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.output import Json, Progress, emit, table


class Device(StrEnum):
    """Where models run."""

    cpu = "cpu"
    cuda = "cuda"


class Engine(StrEnum):
    """What a simulation runs on."""

    sequential = "sequential"
    flower = "flower"


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
    as_json: Json = False,
) -> int:
    """Four hospitals learn clinical coding, with DP; minutes."""
    from anabranch.simulations.demo.run import EXAMPLES, run_demo
    from anabranch.simulations.demo.table import facts_of, rows_of

    with Progress() as progress:
        texts = text or list(EXAMPLES)
        summary, coded = run_demo(
            texts,
            output or _folder("demo"),
            seed=seed,
            threads=threads,
            device=device.value,
            progress=progress,
            quick=quick,
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


def simulate(
    experiment: Annotated[Path, typer.Argument(help="experiment.toml")],
    output: Output = None,
    engine: Annotated[Engine | None, typer.Option(help="Instead of the experiment's own.")] = None,
    device: Annotated[Device | None, typer.Option(help="Instead of the experiment's own.")] = None,
    as_json: Json = False,
) -> int:
    """Run a federation on this machine from an experiment file."""
    from anabranch.simulations.simulate import simulate as run

    with Progress() as progress:
        summary = run(
            experiment,
            output or _folder(experiment.stem),
            engine=None if engine is None else engine.value,
            device=None if device is None else device.value,
            on_event=lambda kind, **fields: _show(progress, kind, fields),
        )
    emit(summary, _text(summary), as_json=as_json)
    return 0


def _folder(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _show(progress: Progress, kind: str, fields: dict[str, Any]) -> None:
    if kind == "run_started":
        progress.stage("rounds", fields["rounds"])
    elif kind == "round_evaluated":
        progress.advance()


def _text(summary: dict[str, Any]) -> str:
    rows = [
        [
            name,
            summary["num_examples"][name],
            summary["failures"][name],
            f"{summary['epsilon'][name]:.2f}" if name in summary["epsilon"] else "—",
        ]
        for name in summary["num_examples"]
    ]
    lines = [table(["site", "records", "failures", "epsilon"], rows), ""] if rows else []
    lines += [f"accuracy {name}: {value:.4f}" for name, value in summary["accuracy"].items()]
    up, down = summary["bytes_up"], summary["bytes_down"]  # None: would tell who took part
    moved = "" if up is None else f"{up:,} bytes up, {down:,} down; "
    lines.append(
        f"{summary['rounds']} rounds, best {summary['best_round']}; {moved}"
        f"{summary['seconds']:.1f} s; peak memory {summary['peak_rss_bytes'] / 2**20:.0f} MiB"
    )
    if summary["release_refused"]:
        lines.append(f"no release: {summary['release_refused']}")
    lines.append(f"run folder: {summary['folder']}")
    return "\n".join(lines)
