"""anabranch coordinator: what the operator of a federation types."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli import coordinator_runs
from anabranch.cli.coordinator_runs import hint, opened, plain, when
from anabranch.cli.folders import FEDERATION, FederationFolder
from anabranch.cli.logs import Heads, LogFile, LogKey, verify_log
from anabranch.cli.output import Json, emit, table

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Run a federation: sites, runs, releases."
)
log = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The audit log.")
app.add_typer(log, name="log")

WATCH_S = 2.0


@app.command()
def init(
    name: Annotated[str, typer.Option("--name", help="Of the federation.")],
    host: Annotated[
        list[str],
        typer.Option("--host", help="Name or address in its certificate; sites call the first."),
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The one public port.")] = 8443,
    contract: Annotated[
        Path | None, typer.Option("--contract", help="A run.toml: sites check their records.")
    ] = None,
    folder: FederationFolder = FEDERATION,
    as_json: Json = False,
) -> int:
    """Make a federation's folder. In it: settings, authority, keys, empty state."""
    import msgspec

    from anabranch.protocols.errors import ConfigError
    from anabranch.protocols.tables import Name
    from anabranch.server.coordinator.folder import Federation
    from anabranch.server.coordinator.settings import Host

    for value, kind, what in [(name, Name, "--name"), *((one, Host, "--host") for one in host)]:
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError:
            words = (
                "small letters, digits, '.', '-', '_', at most 64, a letter or digit first"
                if what == "--name"
                else "a host name or an IP address; the port is --port"
            )
            raise ConfigError(f"{what} {value!r}: expected {words}") from None
    made = Federation.create(folder, name, host, port, contract)
    authority = made.authority().fingerprint
    text = (
        f"{folder}: federation {name} at {made.settings.address}, authority {authority[:16]}…\n"
        f"next: `anabranch coordinator serve --folder {folder}`, and `anabranch coordinator "
        f"invite SITE --folder {folder}`"
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
    folder: FederationFolder = FEDERATION,
    as_json: Json = False,
) -> int:
    """Invite a site, once. Prints a string: treat it as a password; it is shown only now."""
    from anabranch.server.coordinator import enrolment, invitation_files

    federation = opened(folder)
    if file is not None:
        invitation_files.require_free(file)
    invitation = enrolment.invite(federation, site, time.time(), hours).text()
    result: dict[str, object] = {"site": site, "hours": hours}
    if file is not None:
        invitation_files.write(file, invitation)
        said = f"{file}: invitation of {site}, good once, for {hours:g} h; at the site: "
        said += f"anabranch site join @{file.name} --data RECORDS"
        emit(result | {"file": str(file)}, said, as_json=as_json)
        return 0
    text = f"{invitation_files.blocks(invitation)}\n{invitation}" if qr else invitation
    emit(result | {"invitation": invitation}, text, as_json=as_json)
    return 0


@app.command()
def serve(
    folder: FederationFolder = FEDERATION,
    print_unit: Annotated[
        bool, typer.Option("--print-unit", help="Print a systemd unit that does this; no more.")
    ] = False,
) -> int:
    """Serve sites and runs. Until SIGINT or SIGTERM; what ends by itself is started again."""
    import logging

    if print_unit:
        from anabranch.server.coordinator.unit import unit_of

        typer.echo(unit_of(opened(folder)), nl=False)
        return 0
    from anabranch.server.coordinator import supervisor

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    supervisor.serve(folder)
    return 0


for verb in (
    coordinator_runs.run,
    coordinator_runs.resume,
    coordinator_runs.stop,
    coordinator_runs.runs,
    coordinator_runs.export,
):
    app.command()(verb)


@app.command()
def sites(folder: FederationFolder = FEDERATION, as_json: Json = False) -> int:
    """List the sites. With the fingerprints of their peer keys, for owners to compare."""
    from anabranch.protocols.identity.peer import fingerprint

    found = opened(folder).state.sites()
    rows = [
        [
            one.name,
            one.status,
            when(one.joined),
            when(one.expires),
            plain(one.version),
            "none yet" if one.peer_key is None else fingerprint(one.peer_key),
            plain(one.reason),
        ]
        for one in found
    ]
    header = ["site", "status", "joined", "certificate until", "version", "peer key", "reason"]
    names = ("name", "status", "joined", "expires", "version", "reason", "key", "node", "peer_key")
    result = {"sites": [{name: getattr(one, name) for name in names} for one in found]}
    emit(result, table(header, rows), as_json=as_json)
    return 0


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="Its name, as `sites` lists it.")],
    reason: Annotated[str, typer.Option(help="Told to the site, and in the audit log.")] = "",
    folder: FederationFolder = FEDERATION,
    as_json: Json = False,
) -> int:
    """Shut a site out. From its next request on."""
    from anabranch.server.coordinator import enrolment

    entry = enrolment.revoke(opened(folder), site, reason)
    emit({"revoked": entry.name, "reason": entry.reason}, f"{site}: revoked", as_json=as_json)
    return 0


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Until Ctrl-C.")] = False,
    folder: FederationFolder = FEDERATION,
    as_json: Json = False,
) -> int:
    """Show what sites and runs do now. And what is waited for: who, until when, why."""
    import msgspec

    from anabranch.server.coordinator.page import status_text
    from anabranch.server.coordinator.page.view import Watcher

    federation = opened(folder)
    if watch and not as_json:
        status_text.watch(federation)
        return 0
    watcher = Watcher(federation)
    while True:
        view = watcher.view(time.time())
        text = status_text.text(view).rstrip("\n")
        emit(msgspec.to_builtins(view), text, as_json=as_json)
        if not watch:
            hint(federation)
            return 0
        time.sleep(WATCH_S)


@app.command()
def token(folder: FederationFolder = FEDERATION, as_json: Json = False) -> int:
    """Print the page's address, with its token. Treat it as a password."""
    from anabranch.server.coordinator.page.access import page_address

    federation = opened(folder)
    url = f"{page_address(federation.settings)}/?token={federation.page_token()}"
    emit({"url": url}, url, as_json=as_json)
    return 0


@app.command("restore-state")
def restore_state(folder: FederationFolder = FEDERATION, as_json: Json = False) -> int:
    """Put the last copy of the state back. The coordinator must not be serving."""
    from anabranch.server.coordinator.recovery import restore_state as restore

    aside, count = restore(opened(folder), time.time())
    text = f"state restored: {count} active sites; every invitation is withdrawn"
    if aside is not None:
        text += f"\nwhat was there is now {aside}"
    result = {"sites": count, "aside": None if aside is None else str(aside)}
    emit(result, text, as_json=as_json)
    return 0


@log.command()
def verify(
    file: LogFile = None,
    key: LogKey = None,
    contains: Heads = None,
    folder: FederationFolder = FEDERATION,
    as_json: Json = False,
) -> int:
    """Verify every line of the audit log: hashes, signatures, witnesses. Needs no network."""
    return verify_log(opened(folder).audit.path if file is None else file, key, contains, as_json)
