"""anabranch site peers: the keys by which this site knows other sites, in secure sums."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli.folders import SITE, SiteFolder
from anabranch.cli.output import Json, emit, table
from anabranch.cli.site_policy import Verbs, Yes

if TYPE_CHECKING:
    from anabranch.client.policy.peers import Pin


class PeerVerbs(Verbs):
    """`peers` alone is `peers list`."""

    usual = "list"


app = typer.Typer(
    cls=PeerVerbs,
    rich_markup_mode=None,
    help="The keys of other sites, as they are pinned here. Compare them with their owners.",
)


@app.command("list")
def list_peers(folder: SiteFolder = SITE, as_json: Json = False) -> int:
    """List this site's own key and the pinned ones."""
    from anabranch.client.agent.identity import Identity
    from anabranch.client.policy.peers import Peers, day
    from anabranch.protocols.identity.peer import fingerprint, public_hex

    identity = Identity(folder)
    own = public_hex(identity.peer_key())
    pins = list(Peers(folder).pins().values())
    rows = [(identity.name, fingerprint(own), "", "this site")]
    rows += [(p.name, fingerprint(p.key), day(p.since), p.run or "its owner") for p in pins]
    values = {
        "site": {"name": identity.name, "key": own, "fingerprint": fingerprint(own)},
        "peers": [_values(pin) for pin in pins],
    }
    emit(values, table(("site", "fingerprint", "since", "from"), rows), as_json=as_json)
    return 0


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Of the site.")],
    key: Annotated[str, typer.Argument(help="Its public key, 64 hex digits, from its owner.")],
    folder: SiteFolder = SITE,
    as_json: Json = False,
) -> int:
    """Pin a key that the site's owner gave you, before any run has it."""
    from anabranch.client.policy.peers import Peers
    from anabranch.protocols.identity.peer import fingerprint

    pin = Peers(folder).add(name, key, now=time.time(), record=_logging(folder, "peer-pinned"))
    emit(_values(pin), f"{pin.name} is pinned: {fingerprint(pin.key)}", as_json=as_json)
    return 0


@app.command()
def forget(
    name: Annotated[str, typer.Argument(help="As `peers` lists it.")],
    folder: SiteFolder = SITE,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Forget a key. The next approved roster that has the name pins it anew."""
    from anabranch.client.policy.peers import Peers

    if not yes:
        typer.confirm(f"Has the owner of {name} told you of a new key?", abort=True, err=True)
    pin = Peers(folder).forget(name, record=_logging(folder, "peer-forgotten"))
    emit(_values(pin), f"{pin.name} is forgotten", as_json=as_json)
    return 0


def _values(pin: Pin) -> dict[str, object]:
    from anabranch.protocols.identity.peer import fingerprint

    return {
        "name": pin.name,
        "key": pin.key,
        "fingerprint": fingerprint(pin.key),
        "since": pin.since,
        "run": pin.run,
    }


def _logging(folder: Path, kind: str) -> Callable[[Pin], object]:
    """Return what writes the owner's wish to the site's audit log."""
    import getpass

    from anabranch.client.policy.peers import audit_log

    log, by = audit_log(folder), getpass.getuser()
    return lambda pin: log.append(kind, by=by, peers={pin.name: pin.key})
