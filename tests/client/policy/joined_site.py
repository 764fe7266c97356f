"""The folder of site `a`, which has joined, and runs of an author who names others beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.agent.identity import Identity
from anabranch.client.policy.approvals import Approvals, State
from anabranch.client.policy.peers import FILE, Peers, require_roster
from anabranch.client.policy.rules import NotAllowed
from anabranch.protocols.config import RunConfig
from anabranch.protocols.identity.peer import public_hex
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.secagg.terms import Peer, Roster
from tests.client.policy.policies import (
    ANNA,
    NOW,
    Clock,
    Notes,
    policy_of,
    private_config,
    signed_of,
    write_coordinator,
    write_policy,
)

SECURE = {"minimum": 3}
KEYS = {
    name: Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n, name in enumerate("bcdez")
}


def public(name: str) -> str:
    return public_hex(KEYS[name])


@dataclass
class Home:
    """The folder of site `a`, and runs that an author proposes to it."""

    folder: Path
    log: Notes
    config: RunConfig

    @property
    def own(self) -> str:
        return public_hex(Identity(self.folder).peer_key())

    def roster(self, *names: str, **keys: str) -> Roster:
        """Return a roster of this site and others, with their own keys or those given."""
        found = {"a": self.own} | {name: public(name) for name in names} | keys
        return Roster.of(Peer(name=name, key=key) for name, key in found.items() if key)

    def signed(self, roster: Roster, run: str = "run-1", **changes: str) -> Signed:
        return signed_of(self.config, ANNA, roster=roster.digest, run=run, **changes)

    def approve(self, signed: Signed, roster: Roster | None, state: State = "approved") -> Signed:
        approvals = Approvals(self.folder)
        approvals.note(signed.proposal, signed.key, self.config, NOW, roster=roster)
        if state == "approved":
            approvals.approve(signed.proposal.digest, by="kim", now=NOW)
        if state == "rejected":
            approvals.reject(signed.proposal.digest, by="kim", now=NOW)
        return signed

    def approved(self, roster: Roster, run: str = "run-1") -> Signed:
        return self.approve(self.signed(roster, run), roster)

    def require(self, signed: Signed | None, roster: Roster) -> None:
        require_roster(self.folder, signed, roster, audit=self.log, clock=Clock())

    def pins(self) -> dict[str, str]:
        return {name: pin.key for name, pin in Peers(self.folder).pins().items()}

    def policy(self, **tables: Any) -> None:
        write_policy(self.folder, policy_of(**tables))

    def state(self) -> tuple[bytes | None, bytes | None, int]:
        """Return all that a refusal must leave as it was."""
        files = [self.folder / name for name in (FILE, "approvals.json")]
        peers, approvals = (file.read_bytes() if file.exists() else None for file in files)
        return peers, approvals, len(self.log.lines)


def make_home(folder: Path) -> Home:
    write_coordinator(folder, "a")
    home = Home(folder, Notes(), private_config(secure_aggregation=SECURE))
    home.policy()
    return home


def refused(home: Home, signed: Signed | None, roster: Roster, code: str, match: str) -> None:
    """A roster is refused with this reason, and nothing is another than before."""
    before = home.state()
    with pytest.raises(NotAllowed, match=match) as caught:
        home.require(signed, roster)
    assert caught.value.code == code
    assert home.state() == before


class Bare:
    """A site that is asked nothing here."""

    name, max_rank = "a", None

    def admit(self, *_: Any) -> None:
        """Allow it."""

    def sizes(self, config: RunConfig) -> Any:
        return [1, 2], [1]

    def train(self, *_: Any) -> Any:
        raise AssertionError

    def evaluate(self, *_: Any) -> Any:
        raise AssertionError
