"""What a gateway's operator does: make its folder, write invitations, look, revoke."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from anabranch.edge.gateway.asking import CLIENT, RECORD, spends_of
from anabranch.edge.gateway.authority import (
    make_authority,
    new_token,
    open_authority,
    token_hash,
)
from anabranch.edge.gateway.config import (
    GATEWAY_FILE,
    GatewayFile,
    GatewayFolder,
    make_private,
)
from anabranch.edge.gateway.replies import at
from anabranch.edge.gateway.roster import read_signed, roster_of, write_roster
from anabranch.edge.gateway.store import Row, Store, make_store
from anabranch.edge.runtime.enrol import Invitation
from anabranch.protocols import rdp
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.identity import authority as identity
from anabranch.protocols.identity.peer import fingerprint as identity_of
from anabranch.storage.files import write_atomic

MAX_TOKENS = 10_000  # of one call


def make_gateway(folder: Path, file: GatewayFile) -> str:
    """Write a new gateway's folder; return the fingerprint of its authority.

    gateway.toml is written last. Raises ConfigError if there is a gateway already.
    """
    paths = GatewayFolder(folder)
    if (folder / GATEWAY_FILE).exists():
        raise ConfigError(f"{folder / GATEWAY_FILE}: exists; choose another folder")
    make_private(folder)
    make_authority(paths.authority, file.name)
    make_store(paths.state)
    write_atomic(folder / GATEWAY_FILE, msgspec.toml.encode(_given(file)))
    return fingerprint(paths)


def fingerprint(paths: GatewayFolder) -> str:
    """Return the SHA-256 of the authority's certificate (DER), hex."""
    return identity.fingerprint(open_authority(paths.authority).certificate)


def invite(folder: Path, *, hours: float = 24.0, label: str = "", count: int = 1) -> list[str]:
    """Return that many invitations (edge/runtime/enrol.py), each good for one device.

    Only the SHA-256 of a token is kept. Raises ConfigError.
    """
    if not 1 <= count <= MAX_TOKENS:
        raise ConfigError(f"count: expected 1 to {MAX_TOKENS} invitations, got {count}")
    if not 0 < hours <= 24 * 365:
        raise ConfigError(f"hours: expected more than 0, at most a year, got {hours:g}")
    paths = GatewayFolder(folder)
    file, authority = paths.read(), fingerprint(paths)
    texts, store = [], Store(paths.state)
    try:
        for _ in range(count):
            token = new_token()
            store.add_token(token_hash(token), time.time() + hours * 3600, label[:200])
            address = at(file.hosts[0], file.enroll_port)
            texts.append(Invitation(address=address, authority=authority, secret=token).text())
    finally:
        store.close()
    return texts


def devices(folder: Path) -> list[Row]:
    """Return the devices without their keys, the oldest first."""
    store = Store(GatewayFolder(folder).state)
    try:
        return [{k: v for k, v in row.items() if k != "key"} for row in store.devices()]
    finally:
        store.close()


def revoke(folder: Path, device: str) -> None:
    """Refuse a device from now on; ConfigError if there is none of this name."""
    store = Store(GatewayFolder(folder).state)
    try:
        if not store.revoke(device, time.time()):
            raise ConfigError(
                f"{device}: no such device; `anabranch edge gateway devices` lists them"
            )
    finally:
        store.close()


def roster(folder: Path, out: Path | None = None) -> dict[str, Any]:
    """Return the devices that may be in secure sums; write them to `out`, to be signed.

    Raises ConfigError for a roster.json that devices would refuse.
    """
    paths = GatewayFolder(folder)
    file, authority = paths.read(), fingerprint(paths)
    keys = [bytes.fromhex(key) for key in file.bundle_keys]
    found = read_signed(paths.roster, authority, keys)
    known = {} if found is None else found.roster.keys
    store = Store(paths.state)
    try:
        peers = store.peers()
    finally:
        store.close()
    if out is not None:
        write_roster(roster_of(peers), authority, out)
    return {
        "devices": [
            {
                "device": device,
                "key": identity_of(key.hex()),
                "signed": "yes" if known.get(device) == key.hex() else "no",
            }
            for device, key in peers.items()
        ],
        "signed": found is not None,
    }


def status(folder: Path) -> dict[str, Any]:
    """Return counts, the last rounds, and what privacy was spent."""
    paths = GatewayFolder(folder)
    file, store = paths.read(), Store(paths.state)
    try:
        known = store.devices()
        rounds = store.rows(
            "SELECT run, number, state, reason, clients, examples, opened, deadline, closed, "
            "(SELECT count(*) FROM tasks WHERE tasks.round = rounds.id) AS tasks, "
            "(SELECT count(*) FROM tasks WHERE tasks.round = rounds.id "
            "AND tasks.state = 'counted') AS counted "
            "FROM rounds ORDER BY id DESC LIMIT 20"
        )
        plan = file.client_privacy
        spent = spends_of(store, CLIENT)
        return {
            "name": file.name,
            "devices": len(known),
            "revoked": sum(row["revoked"] is not None for row in known),
            "called_today": sum((row["seen"] or 0) > time.time() - 86400 for row in known),
            "rounds": rounds,
            "private_rounds": len(spends_of(store, RECORD)),
            "client_epsilon": None if plan is None else rdp.epsilon_of(spent, plan.target_delta),
            "client_budget": None if plan is None else plan.epsilon,
        }
    finally:
        store.close()


def gateway_file(name: str, hosts: Sequence[str], **settings: Any) -> GatewayFile:
    """Return a gateway.toml's content; ConfigError naming the field that is wrong."""
    given = {key: value for key, value in settings.items() if value is not None}
    try:
        return msgspec.convert({"name": name, "hosts": list(hosts), **given}, GatewayFile)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{GATEWAY_FILE}: {error}") from None


def _given(file: GatewayFile) -> dict[str, Any]:
    """Return the content without tables and values that are not set: TOML has no null."""
    built: dict[str, Any] = msgspec.to_builtins(file)
    return _without_null(built)


def _without_null(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_null(one) if isinstance(one, dict) else one
        for key, one in value.items()
        if one is not None
    }
