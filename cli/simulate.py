"""anabranch simulate: an experiment, its sweep or its study, and comparisons of what came out.

`anabranch simulate experiment.toml` is short for `anabranch simulate run experiment.toml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from anabranch.cli.output import Json, Progress, emit, table
from anabranch.cli.runs import Device, Output, run_folder

DEFAULT = "run"


class Engine(StrEnum):
    """What a simulation runs on."""

    sequential = "sequential"
    cohort = "cohort"
    ray = "ray"
    flower = "flower"


class RunByDefault(TyperGroup):
    """A group whose first argument may be an experiment instead of a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put "run" before what is no command."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    help="Run federations on this machine: anabranch simulate experiment.toml",
)

Experiment_ = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="experiment.toml")]
Engine_ = Annotated[Engine | None, typer.Option(help="Instead of the experiment's own.")]
Device_ = Annotated[Device | None, typer.Option(help="Instead of the experiment's own.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Clients, or shards of a cohort, that train at a time.")
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Instead of the seed of the experiment, or of its sweep.")
]


@app.command(DEFAULT)
def run(
    experiment: Experiment_,
    output: Output = None,
    engine: Engine_ = None,
    device: Device_ = None,
    workers: Workers = None,
    seed: Seed = None,
    faults: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="Replay the faults of this plan.")
    ] = None,
    show_population: Annotated[
        bool,
        typer.Option(
            "--show-population", help="Draw the population (--output FILE.html), run nothing."
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Run an experiment, or its sweep: a sweep that was stopped goes on in its --output."""
    given = _given(engine, device, workers, seed) | {"faults": faults}
    if show_population:
        return _show_population(experiment, output, seed, as_json)
    from anabranch.simulations.experiment import has_sweep

    if has_sweep(experiment):
        if given.pop("faults") is not None:
            raise typer.BadParameter("--faults replays one run: this experiment has a [sweep]")
        return _sweep(experiment, output, given, as_json)
    from anabranch.simulations.simulate import simulate

    with Progress() as progress:
        summary = simulate(
            experiment,
            output or run_folder(experiment.stem),
            on_event=lambda kind, **fields: _show(progress, kind, fields),
            **given,
        )
    emit(summary, summary_text(summary), as_json=as_json)
    return 0


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders, or sweeps'.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write curves, and all rounds as CSV and Parquet."),
    ] = None,
    target: Annotated[
        list[float] | None,
        typer.Option(min=0, max=1, help="An accuracy: when was it reached? May be repeated."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Lay finished runs beside each other; runs that differ in their seed alone are one row."""
    from anabranch.simulations.experiments import compare_page
    from anabranch.simulations.experiments.compare import compare as compare_

    compared, numbers = compare_(runs, output=output, targets=target or ())
    lines = [table(compare_page.COLUMNS, compare_page.final_table(compared))]
    if compared.targets:
        rows = compare_page.target_table(compared)
        lines += ["", table(compare_page.TARGET_COLUMNS, rows)]
    lines += [f"not finished: {one}" for one in compared.missing]
    lines += [f"written: {path}" for path in numbers["files"]]
    emit(numbers, "\n".join(lines), as_json=as_json)
    return 0


@app.command()
def tune(
    experiment: Experiment_,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the study; default runs/<name>-tune.")
    ] = None,
    engine: Engine_ = None,
    device: Device_ = None,
    workers: Workers = None,
    seed: Seed = None,
    as_json: Json = False,
) -> int:
    """Search settings on validation records ([tune]); a study that was stopped goes on."""
    from anabranch.simulations.experiments.tuning import tune as tune_

    folder = output or Path("runs") / f"{experiment.stem}-tune"
    with Progress() as progress:

        def told(done: int, total: int, value: float | None, state: str) -> None:
            if not progress.staged:
                progress.stage("trials", total)
            if state != "failed":
                progress.advance()

        study = tune_(experiment, folder, on_trial=told, **_given(engine, device, workers, seed))
    emit(study, _study_text(study), as_json=as_json)
    return 0


def summary_text(summary: Mapping[str, Any]) -> str:
    """Return a run's summary for a person."""
    rows = [
        [
            name,
            "not shown" if (count := summary["num_examples"][name]) is None else count,
            summary["failures"][name],
            f"{summary['epsilon'][name]:.2f}" if name in summary["epsilon"] else "—",
        ]
        for name in summary["num_examples"]
    ]
    lines = [table(["site", "records", "failures", "epsilon"], rows), ""] if rows else []
    lines += [f"accuracy {name}: {value:.4f}" for name, value in summary["accuracy"].items()]
    for one in summary["time_to_accuracy"]:
        at = "never" if one["round"] is None else f"round {one['round']}, {one['seconds']:,.1f} s"
        lines.append(f"accuracy {one['accuracy']:g} reached: {at}")
    if (people := summary["population"]) is not None:
        lines.append(
            f"{people['trained']:,} of {people['clients']:,} clients trained {people['deltas']:,} "
            f"deltas; {people['failures']:,} failures, {people['late']:,} late"
        )
    if summary["time"] == "virtual":
        lines.append(f"virtual time: {summary['run_seconds']:,.1f} s")
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


def _sweep(experiment: Path, output: Path | None, given: dict[str, Any], as_json: bool) -> int:
    from anabranch.simulations.experiments.sweep import Entry, run_sweep

    with Progress() as progress:

        def told(entry: Entry, place: int, total: int) -> None:
            if not progress.staged:
                progress.stage("runs", total)
            progress.advance()

        outcome = run_sweep(
            experiment, output or Path("runs") / f"{experiment.stem}-sweep", on_run=told, **given
        )
    rows = [[one["folder"], one["seed"], one["state"]] for one in outcome["runs"]]
    lines = [table(["run", "seed", "state"], rows), ""]
    lines += [f"{one['folder']}: {one['error']}" for one in outcome["runs"] if one["error"]]
    lines.append(
        f"{outcome['finished']} of {len(rows)} runs finished, {outcome['skipped']} of them before; "
        f"{outcome['failed']} failed"
    )
    lines.append(f"compare: anabranch simulate compare {outcome['folder']}")
    emit(outcome, "\n".join(lines), as_json=as_json)
    return 1 if outcome["failed"] else 0


def _study_text(study: Mapping[str, Any]) -> str:
    best = study["best"]
    rows = [
        [
            one["trial"],
            one["state"],
            "—" if one["value"] is None else f"{one['value']:.4f}",
            one["rounds"],
        ]
        for one in study["trials"]
    ]
    settings = [f"{name} = {value}" for name, value in best["settings"].items()]
    return "\n".join(
        [
            table(["trial", "state", study["metric"], "rounds"], rows),
            "",
            f"best: trial {best['trial']}, {study['metric']} {best['value']:.4f} on validation",
            *settings,
            f"written: {study['folder']}/best.toml, {study['folder']}/run.toml",
        ]
    )


def _given(
    engine: Engine | None, device: Device | None, workers: int | None, seed: int | None
) -> dict[str, Any]:
    return {
        "engine": None if engine is None else engine.value,
        "device": None if device is None else device.value,
        "workers": workers,
        "seed": seed,
    }


def _show(progress: Progress, kind: str, fields: Mapping[str, Any]) -> None:
    if kind == "run_started":
        progress.stage("rounds", fields["rounds"])
    elif kind == "round_evaluated":
        progress.advance()


def _show_population(experiment: Path, output: Path | None, seed: int | None, as_json: bool) -> int:
    from anabranch.simulations.experiments.population_run import show

    shown = show(experiment, seed=seed, page=output)
    page = "" if shown["page"] is None else f"\nwritten: {shown['page']}"
    emit(shown, shown["text"] + page, as_json=as_json)
    return 0
