"""peers.json: by which key this site knows each other one; among whom its update may be summed.

    roster   names and Ed25519 keys, whose digest a run's author has signed (Proposal.roster)
    pin      a name and the key that it had first, in one federation; another key is refused

A coordinator that lies can leave sites out of a sum, and no more: it can add none to a roster that
an author signed, and swap no key. An author who signs a roster with sites that are none, or with
another key for a site, meets the owner who approves the run, and the pins of those before.

Names that are new here are pinned when a run that was approved with them is summed first, unless
cohort.new_peers = "refuse". Whatever is refused changes nothing; the audit log has each pin before
it counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from anabranch.client.agent.identity import Coordinator, Identity
from anabranch.client.policy.approvals import Approvals
from anabranch.client.policy.journal import Audit
from anabranch.client.policy.policy_file import PRIVATE, Policy, read_policy, read_private
from anabranch.client.policy.rules import NotAllowed
from anabranch.protocols.errors import PolicyError, ProtocolError
from anabranch.protocols.identity.peer import fingerprint, public_hex
from anabranch.protocols.identity.proposal import Hex, Short, Signed
from anabranch.protocols.secagg.member import Limits
from anabranch.protocols.secagg.terms import Peer, Roster
from anabranch.protocols.tables import Name
from anabranch.storage.audit_log import AuditLog
from anabranch.storage.files import locked, write_atomic

FILE = "peers.json"
MAX_BYTES = 16 << 20  # of the file: tens of thousands of peers
LISTED = 3  # names in a sentence
LOGGED = 256  # peers in a line of the audit log

Verdict = Literal["this site", "this site, with ANOTHER KEY", "pinned", "new", "ANOTHER KEY"]


class Pin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A site, and the key that it is known by here."""

    federation: Hex  # fingerprint of its authority
    name: Name
    key: Hex  # Ed25519 public key
    since: float  # seconds since 1970, UTC
    run: Short | None = None  # whose roster had it first; None: the owner gave it


Pins = dict[str, Pin]  # name -> pin, of one federation


@dataclass(frozen=True)
class Peers:
    """The pins of the joined site in `folder`, of the federation that it is in now.

    Every method raises PolicyError for a file that cannot be trusted, and ConfigError if the site
    has not joined.
    """

    folder: Path

    @property
    def path(self) -> Path:
        """Return where they are."""
        return self.folder / FILE

    def pins(self) -> Pins:
        """Return the pins, by name."""
        return _of(self._all(), self._coordinator.authority)

    def add(self, name: str, key: str, *, now: float, record: Callable[[Pin], object]) -> Pin:
        """Pin a key that the owner was given by other means; `record` has it before it counts.

        Raises PolicyError if the name, or the key under another name, is pinned already.
        """
        try:
            pin = msgspec.convert(
                {"federation": self._coordinator.authority, "name": name, "key": key, "since": now},
                Pin,
            )
        except msgspec.ValidationError as error:
            raise PolicyError(
                f"{name[:64]}: expected a site's name and its public key, 64 hex digits ({error})"
            ) from None
        with self._changing() as (pins, more):
            _require_unpinned(pins, pin.name, pin.key)
            record(pin)
            more.append(pin)
        return pin

    def forget(self, name: str, *, record: Callable[[Pin], object]) -> Pin:
        """Forget a pin; the next approved roster that has the name pins it anew."""
        with locked(self.path):
            everything, own = self._all(), self._coordinator.authority
            pin = _of(everything, own).get(name)
            if pin is None:
                raise PolicyError(
                    f"{name[:64]}: no such peer is pinned; `anabranch site peers` lists them"
                )
            record(pin)
            self._write([one for one in everything if one != pin])
        return pin

    def take(
        self, roster: Roster, signed: Signed, *, now: float, record: Callable[[list[Pin]], object]
    ) -> list[Pin]:
        """Pin who is new on a roster, all or nobody; return them. Raises NotAllowed for a swap."""
        own = self._coordinator
        with self._changing() as (pins, more):
            new = [peer for peer in _others(roster, own.site) if peer.name not in pins]
            _require_as_pinned(pins, roster, own.site)
            for peer in new:
                _require_unpinned(pins, peer.name, peer.key)
            run = signed.proposal.run
            found = [
                Pin(federation=own.authority, name=one.name, key=one.key, since=now, run=run)
                for one in new
            ]
            if found:
                record(found)
            more += found
        return found

    @property
    def _coordinator(self) -> Coordinator:
        return Identity(self.folder).coordinator

    def _all(self) -> list[Pin]:
        if not self.path.exists():
            return []
        try:
            return msgspec.json.decode(read_private(self.path, MAX_BYTES), type=list[Pin])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PolicyError(
                f"{FILE}: {error}; until it is mended, or removed and every key compared anew, no "
                "secure sum is taken part in"
            ) from None

    @contextmanager
    def _changing(self) -> Iterator[tuple[Pins, list[Pin]]]:
        """Yield the pins, and a list of those to be added when the block ends."""
        with locked(self.path):
            everything, more = self._all(), list[Pin]()
            yield _of(everything, self._coordinator.authority), more
            if more:
                self._write([*everything, *more])

    def _write(self, pins: list[Pin]) -> None:
        data = msgspec.json.encode(pins)
        if len(data) > MAX_BYTES:
            raise PolicyError(f"{FILE}: would be larger than {MAX_BYTES} bytes")
        write_atomic(self.path, data, PRIVATE)


def require_roster(
    folder: Path,
    signed: Signed | None,
    roster: Roster,
    *,
    audit: Audit | None = None,
    clock: Callable[[], float] = time.time,
) -> None:
    """Raise NotAllowed, and change nothing, unless this site may be summed with who is on `roster`.

    The roster must be the one that the author of an approved run has signed, this site must be on
    it with its own key, and no pinned name may have another key. Names that are new are pinned.
    `audit` None: the audit log of the site in `folder`.
    """
    policy = read_policy(folder)
    signed = _require_signed(folder, policy, signed, roster)
    identity = Identity(folder)
    _require_own(roster, identity)
    peers = Peers(folder)
    pins = peers.pins()
    _require_as_pinned(pins, roster, identity.name)
    new = [peer.name for peer in _others(roster, identity.name) if peer.name not in pins]
    if not new:
        return
    if policy.cohort.new_peers == "refuse":
        raise NotAllowed(
            "roster",
            f'{_names(new)}: on the roster and not known here, and cohort.new_peers is "refuse": '
            "the owner of this site compares keys, then `anabranch site peers add NAME KEY`",
        )
    log = audit_log(folder) if audit is None else audit

    def record(found: list[Pin]) -> None:
        for at in range(0, len(found), LOGGED):
            keys = {pin.name: pin.key for pin in found[at : at + LOGGED]}
            log.append("peer-pinned", run=signed.proposal.run, roster=roster.digest, peers=keys)

    peers.take(roster, signed, now=clock(), record=record)


def limits_for(policy: Policy) -> Limits:
    """Return what a site's policy asks of every secure sum."""
    wanted = policy.cohort
    return Limits(
        minimum=max(2, wanted.minimum), threshold=wanted.threshold, colluding=wanted.colluding
    )


def audit_log(folder: Path) -> AuditLog:
    """Return the audit log of the joined site in `folder`."""
    identity = Identity(folder)
    who = f"site {identity.name} of {identity.federation}"
    return AuditLog(folder / "audit.jsonl", folder / "audit.key", who)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One peer of a roster, as the owner is shown it."""

    name: str
    key: str
    verdict: Verdict
    pin: Pin | None

    @property
    def fingerprint(self) -> str:
        """Return what owners compare."""
        return fingerprint(self.key)


def seen(folder: Path, roster: Roster) -> list[Seen]:
    """Return every peer of a roster, held against this site's key and pins. Changes nothing."""
    identity, pins = Identity(folder), Peers(folder).pins()
    own = public_hex(identity.peer_key())

    def verdict(peer: Peer) -> Verdict:
        if peer.name == identity.name:
            return "this site" if peer.key == own else "this site, with ANOTHER KEY"
        pin = pins.get(peer.name)
        if pin is None:
            return "new"
        return "pinned" if pin.key == peer.key else "ANOTHER KEY"

    return [
        Seen(name=one.name, key=one.key, verdict=verdict(one), pin=pins.get(one.name))
        for one in roster.peers
    ]


def _require_signed(folder: Path, policy: Policy, signed: Signed | None, roster: Roster) -> Signed:
    """Return the proposal if an author of this site signed this roster, and the run may be."""
    if signed is None:
        raise NotAllowed("unsigned", "the roster: no signed proposal came with it")
    proposal = signed.proposal
    if policy.authors.get(proposal.author) != signed.key:
        raise NotAllowed(
            "author",
            f"the roster: not signed by an author whom this site knows ({proposal.author})",
        )
    try:
        signed.verified()
    except ProtocolError as error:
        raise NotAllowed("author", str(error)) from None
    if proposal.roster != roster.digest:
        raise NotAllowed(
            "roster",
            f"run {proposal.run}: the roster that came ({roster.digest[:12]}) is not the one that "
            f"{proposal.author} signed ({(proposal.roster or 'none')[:12]}); nothing is sent",
        )
    entry = Approvals(folder).entries().get(proposal.digest)
    if entry is None or entry.state not in ("approved", "by rule"):
        raise NotAllowed(
            "pending",
            f"waiting for the owner: `anabranch site policy approve {proposal.digest[:12]}`",
        )
    return signed


def _require_own(roster: Roster, identity: Identity) -> None:
    key = roster.keys.get(identity.name)
    if key is None:
        raise NotAllowed(
            "roster",
            f"site {identity.name} is not on the run's roster: it joined, or announced its key, "
            "after the run was proposed. It takes no part in this run: propose the run again",
        )
    if key != public_hex(identity.peer_key()):
        raise NotAllowed(
            "roster",
            f"the roster has another key for site {identity.name} than the one it holds: tell the "
            "run's author. If the key was made anew here, propose the run again",
        )


def _require_as_pinned(pins: Mapping[str, Pin], roster: Roster, own: str) -> None:
    for peer in _others(roster, own):
        pin = pins.get(peer.name)
        if pin is not None and pin.key != peer.key:
            raise NotAllowed(
                "roster",
                f"site {peer.name}'s key is another than the one pinned on {day(pin.since)}: ask "
                f"its owner, then `anabranch site peers forget {peer.name}`",
            )


def _require_unpinned(pins: Mapping[str, Pin], name: str, key: str) -> None:
    if name in pins:
        raise NotAllowed(
            "roster",
            f"site {name} is pinned since {day(pins[name].since)}; to give it another key, first "
            f"`anabranch site peers forget {name}`",
        )
    other = next((pin for pin in pins.values() if pin.key == key), None)
    if other is not None:
        raise NotAllowed(
            "roster",
            f"site {name} has the key that is pinned for {other.name}: ask both owners, then "
            f"`anabranch site peers forget {other.name}`",
        )


def _others(roster: Roster, own: str) -> list[Peer]:
    return [peer for peer in roster.peers if peer.name != own]


def _of(pins: list[Pin], federation: str) -> Pins:
    return {pin.name: pin for pin in pins if pin.federation == federation}


def _names(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def day(time_s: float) -> str:
    """Return a time as a date, UTC."""
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d}"
