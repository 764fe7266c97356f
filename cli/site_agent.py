"""anabranch site join, preflight, serve, status, leave: a site as part of a federation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from anabranch.cli.folders import SITE, SiteFolder, option
from anabranch.cli.logs import Heads, LogFile, LogKey, verify_log
from anabranch.cli.output import Json, emit

if TYPE_CHECKING:
    from anabranch.client.agent.join import JoinReport
    from anabranch.client.agent.preflight import Preflight

log = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The audit log.")
LOG = "%(asctime)s %(levelname)s %(message)s"
DeviceName = Literal["cpu", "cuda"]


def join(
    invitation: Annotated[
        str,
        typer.Argument(
            help="The invitation: @FILE or a file, - for standard input, or the string itself, "
            "which then shows in the shell's history."
        ),
    ],
    data: Annotated[
        Path, typer.Option("--data", help="Your records: CSV, TSV, JSONL, Parquet, or a folder.")
    ],
    folder: SiteFolder = SITE,
    device: Annotated[
        DeviceName | None, typer.Option("--device", help="Where to train; cpu unless said.")
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", min=1, help="Highest LoRA rank trained here.")
    ] = None,
    serve_on: Annotated[
        bool, typer.Option("--serve", help="Go on to serve at once if the site is ready.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Join a federation. Makes keys, gets a certificate, checks records and machine."""
    from anabranch.client.agent.join import join_site, read_invitation

    report = join_site(read_invitation(invitation), data, folder, device=device, max_rank=max_rank)
    emit(report.as_dict(), joined_text(report), as_json=as_json)
    if not report.ready:
        return 1
    if serve_on:
        _serve(folder)
    return 0


def preflight(folder: SiteFolder = SITE, as_json: Json = False) -> int:
    """Check whether the site is ready. Trains one batch, keeps nothing of it."""
    from anabranch.client.agent.preflight import preflight as look

    found = look(folder)
    emit(found.as_dict(), preflight_text(found, folder), as_json=as_json)
    return 0 if found.ready else 1


def serve(
    folder: SiteFolder = SITE,
    print_unit: Annotated[
        bool, typer.Option("--print-unit", help="Print a systemd user unit instead.")
    ] = False,
) -> int:
    """Take part: wait for runs and train when asked, until stopped."""
    if print_unit:
        typer.echo(_unit(folder), nl=False)
        return 0
    _serve(folder)
    return 0


def status(
    folder: SiteFolder = SITE,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it anew every second, until Ctrl-C.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Show what the agent does now, and what waits for you. Asks nobody."""
    from anabranch.client.agent.overview import overview

    if watch:
        from rich.live import Live
        from rich.text import Text

        with Live(Text(""), auto_refresh=False) as live:
            while True:
                live.update(Text(overview(folder).text()), refresh=True)
                time.sleep(1.0)
    found = overview(folder)
    emit(found.as_dict(), found.text(), as_json=as_json)
    return 0 if found.running else 1


def leave(
    folder: SiteFolder = SITE,
    reason: Annotated[
        str, typer.Option("--reason", help="A sentence for the coordinator's operator.")
    ] = "",
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not tell the coordinator.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Leave the federation. Destroys key and certificate, keeps ledger, audit log and policy."""
    from anabranch.client.agent.leaving import leave as go

    left = go(folder, reason, offline=offline)
    text = f"{left.sentence}\n{folder}: ledger, audit log, policy and site.toml are kept"
    emit(left.as_dict(), text, as_json=as_json)
    return 0


@log.command()
def verify(
    file: LogFile = None,
    key: LogKey = None,
    contains: Heads = None,
    folder: SiteFolder = SITE,
    as_json: Json = False,
) -> int:
    """Verify every line of the audit log: hashes, signatures, witnesses. Needs no network."""
    return verify_log(folder / "audit.jsonl" if file is None else file, key, contains, as_json)


def joined_text(report: JoinReport) -> str:
    """Return a join for people."""
    until = time.strftime("%Y-%m-%d", time.gmtime(report.expires))
    return "\n".join(
        [
            f"joined {report.federation} as {report.site}, in {report.seconds:.1f} s",
            f"  coordinator  {report.address}",
            f"  fingerprint  {report.authority}",
            f"  authors      {', '.join(report.authors) or 'none yet'}",
            f"  certificate  until {until}, renewed by itself; its key was made here and stays",
            f"  folder       {report.folder}: {', '.join(report.made)}",
            f"  records      {report.data}",
            "",
            preflight_text(report.preflight, report.folder),
        ]
    )


def preflight_text(found: Preflight, folder: Path) -> str:
    """Return a preflight for people: a line for each check, and what to do."""
    lines = []
    for check in found.checks:
        lines.append(f"  {'ok' if check.ok else 'NO':4}{check.name:13}{check.value}")
        if check.sentence:
            lines += [f"{'':19}{line}" for line in check.sentence.splitlines()]
    if found.seconds_per_round is not None and found.prepare_s is not None:
        lines.append(
            f"about {found.seconds_per_round:.2g} s per round, and {found.prepare_s:.2g} s once "
            "per run"
        )
    if found.ready:
        lines.append(f"ready: start with `anabranch site serve{option(folder)}`")
    else:
        names = ", ".join(check.name for check in found.checks if not check.ok)
        lines.append(
            f"not ready ({names}): mend that, then `anabranch site preflight{option(folder)}`"
        )
    return "\n".join(lines)


def _serve(folder: Path) -> None:
    import logging

    from anabranch.client.agent.agent import serve as run

    logging.basicConfig(level=logging.INFO, format=LOG, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    run(folder)


def _unit(folder: Path) -> str:
    from anabranch.client.agent.identity import Identity
    from anabranch.client.agent.unit import unit
    from anabranch.client.policy.policy_file import read_policy
    from anabranch.storage.witness import state_folder

    identity, limits = Identity(folder), read_policy(folder).limits
    state = state_folder().parent
    state.mkdir(parents=True, exist_ok=True, mode=0o700)  # the unit could not make it
    return unit(
        folder,
        name=identity.name,
        federation=identity.federation,
        writable=[state],
        memory_mb=limits.memory_mb,
        cores=limits.cores,
    )
