"""anabranch edge enroll, pull, sync, status: a device and its gateway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anabranch.cli.edge_trust import Home_
from anabranch.cli.output import Json, emit

if TYPE_CHECKING:
    from anabranch.edge.runtime.home import Home
    from anabranch.edge.runtime.loop import Agent

Data = Annotated[
    Path | None,
    typer.Option("--data", help="The device's records: .jsonl or .csv (texts), .npz (others)."),
]
Ignore = Annotated[
    bool, typer.Option("--ignore-conditions", help="Do not look at battery, network, time, …")
]


def enroll(
    token: Annotated[str, typer.Argument(help="HOST:PORT/FINGERPRINT/SECRET, from the gateway.")],
    home: Home_ = None,
    authority: Annotated[
        Path | None, typer.Option("--ca", help="The gateway's ca.pem, if it was given as a file.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Enrol anew, as another device.")] = False,
    as_json: Json = False,
) -> int:
    """Enrol this device with a gateway. The private key is made here and stays here."""
    from anabranch.edge.runtime.alone import only_one
    from anabranch.edge.runtime.enrol import Invitation, enrol, read_authority

    place = _home(home)
    pem = None if authority is None else read_authority(authority)
    with only_one(place):
        done = enrol(place, Invitation.parse(token), authority=pem, force=force)
    result = {"device": done.device, "gateway": done.address, "home": str(place.folder)}
    emit(result, f"enrolled as {done.device} with {done.address}", as_json=as_json)
    return 0


def pull(
    data: Data = None,
    home: Home_ = None,
    ignore_conditions: Ignore = False,
    as_json: Json = False,
) -> int:
    """Ask for a task and download what it needs; nothing is trained."""
    with _agent(home, data, ignore_conditions) as agent:
        agent.run(once=True, train=False)
    emit(*_status(_home(home)), as_json=as_json)
    return 0


def sync(
    data: Data = None,
    home: Home_ = None,
    once: Annotated[
        bool, typer.Option("--once", help="End when there is nothing to do now.")
    ] = False,
    ignore_conditions: Ignore = False,
    engine: Annotated[str, typer.Option(help="joint or ort-training.")] = "joint",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    as_json: Json = False,
) -> int:
    """Work for the gateway: ask, download, train on --data, send. What waits is sent first.

    Without --data nothing is trained. A kill at any moment costs some steps and nothing else.
    """
    if engine not in ("joint", "ort-training"):
        raise typer.BadParameter(f"expected joint or ort-training, got {engine}")
    chosen: Literal["joint", "ort-training"] = "joint" if engine == "joint" else "ort-training"
    with _agent(home, data, ignore_conditions) as agent:
        agent.engine, agent.threads = chosen, threads
        agent.run(once=once)
    emit(*_status(_home(home)), as_json=as_json)
    return 0


def status(home: Home_ = None, as_json: Json = False) -> int:
    """Show what this device is enrolled as, what it has, and what waits. Nothing is sent."""
    emit(*_status(_home(home)), as_json=as_json)
    return 0


def _home(home: Path | None) -> Home:
    from anabranch.edge.runtime.home import Home

    return Home.default() if home is None else Home(home)


@contextmanager
def _agent(home: Path | None, data: Path | None, ignore: bool) -> Iterator[Agent]:
    from anabranch.edge.runtime.device_file import read_device
    from anabranch.edge.runtime.loop import Agent
    from anabranch.edge.runtime.sensors import SystemSensors
    from anabranch.edge.runtime.transport import connect
    from anabranch.storage.dumps import forbid_dumps

    forbid_dumps()
    place = _home(home)
    conditions = None if ignore else read_device(place.folder).conditions
    with connect(place) as gateway:
        yield Agent(
            home=place,
            gateway=gateway,
            data=data,
            conditions=conditions,
            sensors=SystemSensors(),
            say=lambda text: typer.echo(text, err=True),
        )


def _status(place: Home) -> tuple[dict[str, Any], str]:
    """Return what `status` shows, as data and as text."""
    from cryptography import x509

    from anabranch.edge.runtime import task
    from anabranch.edge.runtime.agent import read_memory
    from anabranch.edge.runtime.conditions import unmet
    from anabranch.edge.runtime.device_file import read_device
    from anabranch.edge.runtime.enrol import read_enrolled
    from anabranch.edge.runtime.sensors import SystemSensors
    from anabranch.edge.runtime.spool import Spool

    enrolled, memory, begun = read_enrolled(place), read_memory(place), task.remembered(place)
    certificate = x509.load_pem_x509_certificate(place.certificate.read_bytes())
    reasons = unmet(read_device(place.folder).conditions, SystemSensors().read())
    found: dict[str, Any] = {
        "device": enrolled.device,
        "gateway": enrolled.address,
        "peer_key": _peer_key(place),
        "certificate_until": certificate.not_valid_after_utc.isoformat(timespec="seconds"),
        "bundles": sorted(
            f"{path.parent.name} {path.name}" for path in place.folder.glob("bundles/*/[0-9]*")
        ),
        "task": None if begun is None else begun.id,
        "waiting": [
            {"task": one.task, "bytes": one.size, "until": _time(one.deadline_unix)}
            for one in Spool(place.spool).entries()
        ],
        "unmet": [str(one) for one in reasons],
        "failures": memory.failures,
        "next_check_in": _time(max(memory.call_unix, memory.ask_unix)) or None,
        "last": memory.last,
    }
    lines = [f"{name:<18} {_shown(value)}" for name, value in found.items()]
    return found, "\n".join(lines)


def _peer_key(place: Home) -> str | None:
    """Return what people compare of the key that signs in secure sums."""
    from anabranch.edge.runtime.peer import peer_key
    from anabranch.protocols.identity.peer import fingerprint, public_hex

    return fingerprint(public_hex(peer_key(place))) if place.peer_key.exists() else None


def _time(unix: float) -> str:
    last = 253_402_300_799  # of the year 9999
    return (
        datetime.fromtimestamp(min(unix, last), UTC).isoformat(timespec="seconds") if unix else ""
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        rows = [
            f"{one['task']} ({one['bytes']} bytes)" if isinstance(one, dict) else one
            for one in value
        ]
        return "; ".join(rows) or "none"
    return "none" if value is None or value == "" else str(value)
