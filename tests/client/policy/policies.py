"""A site's folder with a policy, an author who signs, and messages to try on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.agent.identity import Coordinator
from anabranch.client.policy.approvals import Entry, State
from anabranch.client.policy.policy_file import FILE, Policy, default_policy, parse_policy
from anabranch.client.policy.rules import Asked, Code, Here, decide
from anabranch.client.policy.usage import Usage
from anabranch.protocols.config import RunConfig
from anabranch.protocols.identity.proposal import Proposal, Signed, contract_digest, sign
from anabranch.protocols.messages import Assignment
from anabranch.storage.files import write_atomic
from tests.simulations.rig import config as toy

AUTHORITY, CODE = "a" * 64, "c" * 64
HERE = Here(federation="heart", authority=AUTHORITY, code=CODE, version="0.1.0")
ANNA = Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
EVE = Ed25519PrivateKey.from_private_bytes(b"\2" * 32)
NOW = 1_700_000_000.0  # Tue 2023-11-14 22:13:20 UTC


def key_of(private: Ed25519PrivateKey) -> str:
    return private.public_key().public_bytes_raw().hex()


def private_config(**changes: Any) -> RunConfig:
    """Return a run that the default policy lets pass, changed by `changes`."""
    tables = msgspec.to_builtins(toy(quorum=3))
    tables["training"]["local_steps"] = 2
    tables["privacy"] = {"epsilon": 2.0, "delta": 1e-6}
    for name, value in changes.items():
        tables[name] = (tables[name] or {}) | value if isinstance(value, dict) else value
    return msgspec.convert(tables, RunConfig)


def proposal_of(config: RunConfig, **changes: str | None) -> Proposal:
    values: dict[str, Any] = {
        "federation": "heart",
        "run": "run-1",
        "author": "anna",
        "version": "0.1.0",
        "code": CODE,
        "config": config.digest(),
        "base": config.model.base,
        "contract": contract_digest(config),
    }
    return Proposal(**(values | changes))


def signed_of(
    config: RunConfig, private: Ed25519PrivateKey = ANNA, **changes: str | None
) -> Signed:
    return sign(proposal_of(config, **changes), private)


def policy_of(**tables: Any) -> Policy:
    """Return the default policy of the site, changed by `tables`."""
    text = default_policy({"heart": AUTHORITY}, {"anna": key_of(ANNA)})
    values = msgspec.to_builtins(parse_policy(text, source="default"))
    for name, value in tables.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    return parse_policy(msgspec.toml.encode(without_none(values)), source=FILE)


def without_none(value: Any) -> Any:
    """Return tables without what TOML has no word for."""
    if isinstance(value, dict):
        return {name: without_none(one) for name, one in value.items() if one is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(one) for one in value]
    return value


def write_policy(folder: Path, policy: Policy) -> None:
    values = without_none(msgspec.to_builtins(policy))
    write_atomic(folder / FILE, msgspec.toml.encode(values), 0o600)


def write_coordinator(folder: Path, site: str) -> None:
    """Make the folder of a site that has joined the federation under this name."""
    (folder / "identity").mkdir(mode=0o700, parents=True)
    folder.chmod(0o700)
    stored = Coordinator(
        site=site,
        federation="heart",
        address="localhost:8443",
        authority=AUTHORITY,
        authors={"anna": key_of(ANNA)},
        app="f" * 64,
        version="0.1.0",
        joined=NOW,
    )
    write_atomic(folder / "identity" / "coordinator.json", msgspec.json.encode(stored))


def entry_of(
    signed: Signed, config: RunConfig, state: State = "approved", by: str = "kim"
) -> Entry:
    return Entry(
        proposal=signed.proposal, key=signed.key, config=config, state=state, first_seen=NOW, by=by
    )


def asked_of(config: RunConfig | None = None, signed: Signed | None = None, **about: Any) -> Asked:
    """Return an approved run's message, changed by `about`."""
    config = private_config() if config is None else config
    signed = signed_of(config) if signed is None else signed
    values: dict[str, Any] = {
        "run": signed.proposal.run,
        "config": config,
        "signed": signed,
        "here": HERE,
        "now": NOW,
        "usage": Usage(run=signed.proposal.run),
        "round": 1,
        "trains": True,
        "entries": {signed.proposal.digest: entry_of(signed, config)},
    }
    return Asked(**(values | about))


def refusal(policy: Policy, asked: Asked) -> tuple[Code, str]:
    """Return why a message is refused, and fail if it is not."""
    found = decide(policy, asked)
    assert found is not None
    return found.code, str(found)


def assignment_of(config: RunConfig, signed: Signed | None, number: int = 1) -> Assignment:
    return Assignment(run="run-1", round=number, config=config, signed=signed)


EARLIER = private_config(seed=1)
LIKE = signed_of(EARLIER, run="earlier").proposal  # what rules are like


@dataclass
class Notes:
    """An audit log in memory."""

    lines: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    def append(self, kind: str, **fields: object) -> None:
        self.lines.append((kind, fields))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.lines]


@dataclass
class Clock:
    """A time that moves only when it is told to."""

    now: float = NOW

    def __call__(self) -> float:
        return self.now
