"""anabranch edge gateway: between devices and a coordinator."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.edge_trust import public_key
from anabranch.cli.output import Json, emit, table

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Collect deltas of devices for a coordinator."
)
Folder = Annotated[Path, typer.Argument(help="The gateway's folder.")]


@app.command()
def init(
    folder: Folder,
    name: Annotated[str, typer.Option("--name", help="What the coordinator calls it.")],
    host: Annotated[
        list[str],
        typer.Option("--host", help="Name or address in its certificate; devices call the first."),
    ],
    port: Annotated[int, typer.Option(help="Of devices with a certificate.")] = 8443,
    enroll_port: Annotated[int, typer.Option(help="Of enrolment.")] = 8444,
    bundle: Annotated[
        list[str] | None, typer.Option("--bundle", help="A bundle's folder to serve.")
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option("--key", help="Public key that signs bundles: 64 hex digits, or KEY.pub."),
    ] = None,
    cohort: Annotated[int | None, typer.Option(help="Deltas that end a round early.")] = None,
    min_cohort: Annotated[int | None, typer.Option(help="With fewer, nothing leaves.")] = None,
    as_json: Json = False,
) -> int:
    """Make a gateway's folder: configuration, certificate authority, empty state."""
    from anabranch.edge.gateway.operator import gateway_file, make_gateway

    file = gateway_file(
        name,
        host,
        port=port,
        enroll_port=enroll_port,
        bundles=[str(Path(one).resolve()) for one in bundle or []],
        bundle_keys=[public_key(text, "--key").hex() for text in key or []],
        cohort=cohort,
        min_cohort=min_cohort,
    )
    authority = make_gateway(folder, file)
    text = f"{folder}: gateway {name}, authority {authority[:16]}…; next: token, then serve"
    emit({"folder": str(folder), "name": name, "authority": authority}, text, as_json=as_json)
    return 0


@app.command()
def token(
    folder: Folder,
    hours: Annotated[float, typer.Option(help="How long it can be used.")] = 24.0,
    label: Annotated[str, typer.Option(help="A note of yours about the device.")] = "",
    count: Annotated[int, typer.Option(min=1, help="How many; one per device.")] = 1,
    as_json: Json = False,
) -> int:
    """Print a one-time invitation for `anabranch edge enroll`. Treat it as a password."""
    from anabranch.edge.gateway.operator import invite

    texts = invite(folder, hours=hours, label=label, count=count)
    emit({"tokens": texts}, "\n".join(texts), as_json=as_json)
    return 0


@app.command()
def serve(folder: Folder, as_json: Json = False) -> int:
    """Serve devices until SIGINT or SIGTERM."""
    import logging

    from anabranch.edge.gateway.server import start
    from anabranch.storage.dumps import forbid_dumps

    forbid_dumps()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with start(folder) as gateway:
        ports = {"port": gateway.port, "enroll_port": gateway.enroll_port}
        bundles = ", ".join(one.key for one in gateway.parts.shelf.bundles) or "none"
        text = (
            f"serving on port {gateway.port}, enrolment on port {gateway.enroll_port}; "
            f"bundles: {bundles}"
        )
        emit(ports, text, as_json=as_json)
        ended.wait()
    return 0


@app.command()
def status(folder: Folder, as_json: Json = False) -> int:
    """Show devices, rounds, and what privacy was spent."""
    from anabranch.edge.gateway.operator import status as status_of

    found = status_of(folder)
    rows = [
        [one["run"], one["number"], one["state"], one["tasks"], one["counted"], one["reason"]]
        for one in found["rounds"]
    ]
    head = f"{found['name']}: {found['devices']} devices, {found['called_today']} called today"
    if found["client_budget"] is not None:
        head += f"\nepsilon {found['client_epsilon']:.3f} of {found['client_budget']:g} spent"
    text = f"{head}\n{table(['run', 'round', 'state', 'tasks', 'counted', 'reason'], rows)}"
    emit(found, text, as_json=as_json)
    return 0


@app.command()
def devices(folder: Folder, as_json: Json = False) -> int:
    """List the devices."""
    from anabranch.edge.gateway.operator import devices as devices_of

    found = devices_of(folder)
    rows = [
        [one["id"], "revoked" if one["revoked"] else "enrolled", one["examples"], one["label"]]
        for one in found
    ]
    emit({"devices": found}, table(["device", "state", "records", "label"], rows), as_json=as_json)
    return 0


@app.command()
def roster(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the devices' keys here, to be signed.")
    ] = None,
    as_json: Json = False,
) -> int:
    """List the devices that may be in secure sums, and what the publisher signed of them."""
    from anabranch.edge.gateway.operator import roster as roster_of

    found = roster_of(folder, out)
    rows = [[one["device"], one["key"], one["signed"]] for one in found["devices"]]
    text = table(["device", "key", "signed"], rows)
    if out is not None:
        text += (
            f"\n{out}: {len(rows)} devices; next: `anabranch edge gateway sign-roster {out} --key "
            f"signing.key` where bundles are made, then copy it to {folder / 'roster.json'}"
        )
    emit(found, text, as_json=as_json)
    return 0


@app.command("sign-roster")
def sign_roster(
    file: Annotated[Path, typer.Argument(help="What `roster --out` wrote.")],
    key: Annotated[Path, typer.Option("--key", help="The private key that signs bundles.")],
    as_json: Json = False,
) -> int:
    """Sign a roster: these devices exist, and nobody else is in a secure sum."""
    from anabranch.edge.gateway.roster import sign_file
    from anabranch.edge.runtime.trust import load_private

    signed = sign_file(file, load_private(key))
    count, digest = len(signed.roster.peers), signed.roster.digest
    text = f"{file}: {count} devices, roster {digest[:16]}…, signed"
    emit({"file": str(file), "devices": count, "roster": digest}, text, as_json=as_json)
    return 0


@app.command()
def revoke(
    folder: Folder,
    device: Annotated[str, typer.Argument(help="Its name, as `devices` lists it.")],
    as_json: Json = False,
) -> int:
    """Refuse a device from now on, and what it sent to rounds that are open."""
    from anabranch.edge.gateway.operator import revoke as revoke_device

    revoke_device(folder, device)
    emit({"revoked": device}, f"{device}: revoked", as_json=as_json)
    return 0
