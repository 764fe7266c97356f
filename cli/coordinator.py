"""anabranch coordinator: what the operator of a federation types."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli.output import Json, emit, table

if TYPE_CHECKING:
    from anabranch.server.coordinator.folder import Federation
    from anabranch.server.coordinator.state import RunEntry

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Run a federation: sites, runs, releases."
)
log = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The audit log.")
app.add_typer(log, name="log")

Folder = Annotated[Path, typer.Option("--folder", "-f", help="The federation's folder.")]
HERE = Path(".")
WATCH_S = 2.0
Run = Annotated[str, typer.Argument(help="Its id as `runs` lists it, or its name: the newest.")]
Author = Annotated[str, typer.Option("--author", help="Who signs it: a key in authors/.")]
OPERATOR = "operator"  # the author that `init` makes


def _open(folder: Path) -> Federation:
    from anabranch.server.coordinator.folder import Federation

    return Federation(folder)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A folder that does not exist yet, or is empty.")],
    name: Annotated[str, typer.Option("--name", help="Of the federation.")],
    host: Annotated[
        list[str],
        typer.Option("--host", help="Name or address in its certificate; sites call the first."),
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The one public port.")] = 8443,
    contract: Annotated[
        Path | None, typer.Option("--contract", help="A run.toml: sites check their records.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Make a federation's folder: settings, authority, keys, empty state."""
    from anabranch.server.coordinator.folder import Federation

    made = Federation.create(folder, name, host, port, contract)
    authority = made.authority().fingerprint
    text = (
        f"{folder}: federation {name} at {made.settings.address}, authority {authority[:16]}…\n"
        "next: invite a site, then serve"
    )
    result = {"folder": str(folder), "name": name, "address": made.settings.address}
    emit(result | {"authority": authority}, text, as_json=as_json)
    return 0


@app.command()
def invite(
    site: Annotated[str, typer.Argument(help="The name it is to have.")],
    hours: Annotated[float, typer.Option(help="How long it can be used.")] = 24.0,
    file: Annotated[
        Path | None, typer.Option("--file", help="Write it here instead; F.svg: as a QR code.")
    ] = None,
    qr: Annotated[bool, typer.Option("--qr", help="Print it as a QR code, too.")] = False,
    folder: Folder = HERE,
    as_json: Json = False,
) -> int:
    """Print an invitation: one site, once. Treat it as a password; it is shown only now."""
    from anabranch.server.coordinator import enrolment, invitation_files

    federation = _open(folder)
    if file is not None:
        invitation_files.require_free(file)
    invitation = enrolment.invite(federation, site, time.time(), hours).text()
    result: dict[str, object] = {"site": site, "hours": hours}
    if file is not None:
        invitation_files.write(file, invitation)
        emit(result | {"file": str(file)}, f"{file}: invitation of {site}", as_json=as_json)
        return 0
    text = f"{invitation_files.blocks(invitation)}\n{invitation}" if qr else invitation
    emit(result | {"invitation": invitation}, text, as_json=as_json)
    return 0


@app.command()
def serve(
    folder: Folder = HERE,
    print_unit: Annotated[
        bool, typer.Option("--print-unit", help="Print a systemd unit that does this; no more.")
    ] = False,
) -> int:
    """Serve sites and runs until SIGINT or SIGTERM; every process is started again if it ends."""
    import logging

    if print_unit:
        from anabranch.server.coordinator.unit import unit_of

        typer.echo(unit_of(_open(folder)), nl=False)
        return 0
    from anabranch.server.coordinator import supervisor

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    supervisor.serve(folder)
    return 0


@app.command()
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
    folder: Folder = HERE,
    as_json: Json = False,
) -> int:
    """Propose a run to the sites, signed by its author. With records of yours it is released."""
    from anabranch.server.coordinator import proposing

    federation = _open(folder)
    entry = proposing.propose(
        federation, run_toml, time.time(), author=author, validation=validation, test=test
    )
    return _proposed(federation, entry, follow=follow, as_json=as_json)


@app.command()
def resume(
    run: Run,
    config: Annotated[
        Path | None, typer.Option("--config", help="A changed run.toml: a new run goes on.")
    ] = None,
    author: Author = OPERATOR,
    follow: Annotated[bool, typer.Option("--follow", help="Wait until it is over.")] = False,
    folder: Folder = HERE,
    as_json: Json = False,
) -> int:
    """Go on with a run that was stopped or failed; with --config as a new one, approved anew."""
    from anabranch.server.coordinator import proposing

    federation = _open(folder)
    if config is None:
        entry = proposing.resume(federation, run)
    else:
        entry = proposing.resume_with(federation, run, config, time.time(), author=author)
    return _proposed(federation, entry, follow=follow, as_json=as_json)


@app.command()
def stop(run: Run, folder: Folder = HERE, as_json: Json = False) -> int:
    """Let a run stop between two messages; what was merged is kept."""
    from anabranch.server.coordinator import proposing

    entry = proposing.stop(_open(folder), run)
    emit({"run": entry.run, "desired": entry.desired}, f"{entry.run}: to stop", as_json=as_json)
    return 0


@app.command()
def runs(folder: Folder = HERE, as_json: Json = False) -> int:
    """List the runs, the oldest first."""
    found = _open(folder).state.runs()
    rows = [
        [one.run, one.state, one.desired, _when(one.created), one.restarts, _plain(one.detail)]
        for one in found
    ]
    header = ["run", "state", "wanted", "proposed", "restarts", "detail"]
    result = {"runs": [_run(one) for one in found]}
    emit(result, table(header, rows), as_json=as_json)
    return 0


@app.command()
def sites(folder: Folder = HERE, as_json: Json = False) -> int:
    """List the sites."""
    found = _open(folder).state.sites()
    rows = [
        [
            one.name,
            one.status,
            _when(one.joined),
            _when(one.expires),
            _plain(one.version),
            _plain(one.reason),
        ]
        for one in found
    ]
    header = ["site", "status", "joined", "certificate until", "version", "reason"]
    names = ("name", "status", "joined", "expires", "version", "reason", "key", "node")
    result = {"sites": [{name: getattr(one, name) for name in names} for one in found]}
    emit(result, table(header, rows), as_json=as_json)
    return 0


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="Its name, as `sites` lists it.")],
    reason: Annotated[str, typer.Option(help="Told to the site, and in the audit log.")] = "",
    folder: Folder = HERE,
    as_json: Json = False,
) -> int:
    """Shut a site out, from its next request on."""
    from anabranch.server.coordinator import enrolment

    entry = enrolment.revoke(_open(folder), site, reason)
    emit({"revoked": entry.name, "reason": entry.reason}, f"{site}: revoked", as_json=as_json)
    return 0


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Until Ctrl-C.")] = False,
    folder: Folder = HERE,
    as_json: Json = False,
) -> int:
    """Show what sites and runs do now, and what is waited for: who, until when, why."""
    import msgspec

    from anabranch.server.coordinator.page import status_text
    from anabranch.server.coordinator.page.view import Watcher

    federation = _open(folder)
    if watch and not as_json:
        status_text.watch(federation)
        return 0
    watcher = Watcher(federation)
    while True:
        view = watcher.view(time.time())
        text = status_text.text(view).rstrip("\n")
        emit(msgspec.to_builtins(view), text, as_json=as_json)
        if not watch:
            return 0
        time.sleep(WATCH_S)


@app.command()
def export(
    run: Run,
    target: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    folder: Folder = HERE,
    as_json: Json = False,
) -> int:
    """Copy what may be taken away of a run: adapters, report, release, its lines of the log."""
    from anabranch.server.coordinator.exporting import export as export_run

    files = export_run(_open(folder), run, target)
    emit({"folder": str(target), "files": files}, f"{target}: {len(files)} files", as_json=as_json)
    return 0


@app.command()
def token(folder: Folder = HERE, as_json: Json = False) -> int:
    """Print the address of the page, with the token that opens it. Treat it as a password."""
    from anabranch.server.coordinator.page.access import page_address

    federation = _open(folder)
    url = f"{page_address(federation.settings)}/?token={federation.page_token()}"
    emit({"url": url}, url, as_json=as_json)
    return 0


@app.command("restore-state")
def restore_state(folder: Folder = HERE, as_json: Json = False) -> int:
    """Put the last copy of the state in its place; the coordinator must not be serving."""
    from anabranch.server.coordinator.recovery import restore_state as restore

    aside, count = restore(_open(folder), time.time())
    text = f"state restored: {count} active sites; every invitation is withdrawn"
    if aside is not None:
        text += f"\nwhat was there is now {aside}"
    result = {"sites": count, "aside": None if aside is None else str(aside)}
    emit(result, text, as_json=as_json)
    return 0


@log.command()
def verify(
    file: Annotated[
        Path | None, typer.Argument(help="A log; default: that of the federation's folder.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="The public key that must have signed it.")
    ] = None,
    contains: Annotated[
        list[str] | None, typer.Option("--contains", help="A head that must be in it.")
    ] = None,
    folder: Folder = HERE,
    as_json: Json = False,
) -> int:
    """Verify every line of the audit log: hashes, signatures, witnesses. Needs no network."""
    from anabranch.storage.audit_log import log_report

    path = _open(folder).audit.path if file is None else file
    result, text, whole = log_report(path, key, contains or ())
    emit(result, text, as_json=as_json)
    return 0 if whole else 1


def _proposed(federation: Federation, entry: RunEntry, *, follow: bool, as_json: bool) -> int:
    """Print what was queued; with `follow`, what becomes of it until it is over."""
    said = f"{entry.run}: {entry.state}; sites decide by their own policies"
    if not follow:
        emit(_run(entry), said, as_json=as_json)
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


def _run(entry: RunEntry) -> dict[str, object]:
    names = ("run", "name", "state", "desired", "detail", "created", "restarts", "continues")
    return {name: getattr(entry, name) for name in names}


def _plain(text: str) -> str:
    """Return what a peer said without characters that move a terminal's cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
