"""anabranch coordinator run, resume, stop, runs, export: what the operator does with runs."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli.folders import FEDERATION, FederationFolder
from anabranch.cli.output import Json, emit, table

if TYPE_CHECKING:
    from anabranch.server.coordinator.folder import Federation
    from anabranch.server.coordinator.state import RunEntry

Run = Annotated[str, typer.Argument(help="Its id as `runs` lists it, or its name: the newest.")]
Author = Annotated[str, typer.Option("--author", help="Who signs it: a key in authors/.")]
OPERATOR = "operator"  # the author that `init` makes


def opened(folder: Path) -> Federation:
    """Return the federation in a folder."""
    from anabranch.server.coordinator.folder import Federation

    return Federation(folder)


def run(
    run_toml: Annotated[Path, typer.Argument(help="What all parties are to agree on.")],
    author: Author = OPERATOR,
    validation: Annotated[
        Path | None, typer.Option(help="Records of yours that choose the best round.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Records of yours, touched once, at the end.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait until it is over.")] = False,
    folder: FederationFolder = FEDERATION,
    as_json: Json = False,
) -> int:
    """Propose a signed run to the sites. With records of yours it is released."""
    from anabranch.server.coordinator import proposing

    federation = opened(folder)
    entry = proposing.propose(
        federation, run_toml, time.time(), author=author, validation=validation, test=test
    )
    return _proposed(federation, entry, follow=follow, as_json=as_json)


def resume(
    run: Run,
    config: Annotated[
        Path | None, typer.Option("--config", help="A changed run.toml: a new run goes on.")
    ] = None,
    author: Author = OPERATOR,
    follow: Annotated[bool, typer.Option("--follow", help="Wait until it is over.")] = False,
    folder: FederationFolder = FEDERATION,
    as_json: Json = False,
) -> int:
    """Go on with a stopped or failed run. With --config as a new one, approved anew."""
    from anabranch.server.coordinator import proposing

    federation = opened(folder)
    if config is None:
        entry = proposing.resume(federation, run)
    else:
        entry = proposing.resume_with(federation, run, config, time.time(), author=author)
    return _proposed(federation, entry, follow=follow, as_json=as_json)


def stop(run: Run, folder: FederationFolder = FEDERATION, as_json: Json = False) -> int:
    """Stop a run between two messages. What was merged is kept."""
    from anabranch.server.coordinator import proposing

    entry = proposing.stop(opened(folder), run)
    emit({"run": entry.run, "desired": entry.desired}, f"{entry.run}: to stop", as_json=as_json)
    return 0


def runs(folder: FederationFolder = FEDERATION, as_json: Json = False) -> int:
    """List the runs, the oldest first."""
    found = opened(folder).state.runs()
    rows = [
        [one.run, one.state, one.desired, when(one.created), one.restarts, plain(one.detail)]
        for one in found
    ]
    header = ["run", "state", "wanted", "proposed", "restarts", "detail"]
    result = {"runs": [_run(one) for one in found]}
    emit(result, table(header, rows), as_json=as_json)
    return 0


def export(
    run: Run,
    target: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    folder: FederationFolder = FEDERATION,
    as_json: Json = False,
) -> int:
    """Copy what may be taken away of a run. Adapters, report, release, lines of the log."""
    from anabranch.server.coordinator.exporting import export as export_run

    files = export_run(opened(folder), run, target)
    emit({"folder": str(target), "files": files}, f"{target}: {len(files)} files", as_json=as_json)
    return 0


def _proposed(federation: Federation, entry: RunEntry, *, follow: bool, as_json: bool) -> int:
    """Print what was queued; with `follow`, what becomes of it until it is over."""
    said = f"{entry.run}: {entry.state}; sites decide by their own policies"
    if not follow:
        emit(_run(entry), said, as_json=as_json)
        hint(federation)
        return 0
    typer.echo(said, err=True)
    last = ""
    while True:
        now = federation.state.run(entry.run)
        if now is None or now.state in ("stopped", "failed", "finished"):
            break
        wait = federation.state.waits().get(entry.run)
        line = now.state if wait is None else f"{now.state}, waiting: {wait.why}"
        if line != last:
            typer.echo(line, err=True)
            last = line
        time.sleep(0.5)
    entry = now or entry
    emit(_run(entry), f"{entry.run}: {entry.state}. {entry.detail}".rstrip(), as_json=as_json)
    return 1 if entry.state == "failed" else 0


def hint(federation: Federation) -> None:
    """Say on stderr that nobody serves the federation."""
    if not federation.is_served():
        typer.echo(
            f"{federation.settings.name} is not served now: `anabranch coordinator serve --folder "
            f"{federation.folder}`",
            err=True,
        )


def _run(entry: RunEntry) -> dict[str, object]:
    names = ("run", "name", "state", "desired", "detail", "created", "restarts", "continues")
    return {name: getattr(entry, name) for name in names}


def plain(text: str) -> str:
    """Return what a peer said without characters that move a terminal's cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def when(seconds: float) -> str:
    """Return a local time, to the minute."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
