"""How sites come and go: invited, joined, renewed, left, revoked. Called by door and command line.

    join    the invitation is redeemed for the request's key ─► the SuperLink registers the key as
            a node ─► the site is in the roster ─► certificate
    renew   a new certificate for the key that the connection proved
    revoke  from the next request on, the certificate is refused

A join that is cut off leaves no site, and the same key may come again with the same invitation; so
it may if the answer was lost. If the SuperLink refuses, the invitation is as it was before. Times
are arguments: seconds since 1970, UTC. No secret is in a log, an error or a file.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from anabranch.protocols.errors import ConfigError, ProtocolError
from anabranch.protocols.identity import authority
from anabranch.protocols.identity.invitation import Invitation, new_secret, secret_hash
from anabranch.protocols.identity.join import (
    Heard,
    Hello,
    Join,
    Joined,
    Leave,
    Renew,
    Renewed,
    Report,
)
from anabranch.protocols.identity.peer import require_possessed
from anabranch.protocols.tables import Name
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.state import SiteEntry

Register = Callable[[bytes], int]  # public key (PEM) -> node; a key that is known: the same node
Unregister = Callable[[int], None]  # one that is not there is no error
DAY_S = 86400.0
MAX_HOURS = 24.0 * 30  # of an invitation


def invite(federation: Federation, site: str, now: float, hours: float = 24.0) -> Invitation:
    """Return a new invitation for one site; only its hash is kept, so it is printed once.

    An earlier one for the same name that was not used is withdrawn. Raises ConfigError for a name
    that is none or belongs to an active site, for hours outside (0, MAX_HOURS], and if
    limits.max_sites is reached.
    """
    try:
        msgspec.convert(site, Name)
    except msgspec.ValidationError as error:
        raise ConfigError(f"site {site!r}: {error}; small letters, digits, '.', '-', '_'") from None
    if not 0 < hours <= MAX_HOURS:
        raise ConfigError(f"hours: expected more than 0 and at most {MAX_HOURS:g}, got {hours:g}")
    state, most = federation.state, federation.settings.limits.max_sites
    active = {one.name for one in state.sites() if one.status == "active"}
    if site in active:
        raise ConfigError(
            f"site {site}: is in already; to let it in anew, `anabranch coordinator revoke {site}`"
        )
    invited = {one.site for one in state.open_invitations(now) if one.used is None}
    if len(active | invited | {site}) > most:
        raise ConfigError(
            f"limits.max_sites = {most} in coordinator.toml is reached: {len(active)} sites are "
            f"in, {len(invited - active)} invited"
        )
    secret = new_secret()
    expires = now + hours * 3600
    state.invite(site, secret_hash(secret), expires, now)
    federation.audit.append("invited", site=site, expires=expires)
    return Invitation(
        address=federation.settings.address,
        authority=authority.fingerprint(federation.root()),
        secret=secret,
    )


def hello(federation: Federation, now: float) -> Hello:
    """Return who answers here."""
    return Hello(federation=federation.settings.name, version=federation.version, time=now)


def join(federation: Federation, asked: Join, now: float, register: Register) -> Joined:
    """Take in the site that holds an invitation; return its certificate.

    Of many that come with one invitation, one key gets in. Raises ProtocolError for an invitation
    that is unknown, used or expired (one text for all), for a key that was in the roster before,
    for the name of an active site, and for a peer key that is another site's or that the request
    does not prove; MalformedMessage for a request that is none; and what
    `register` raises: then no site was added, and the invitation is not used up.
    """
    state = federation.state
    key = authority.request_key(asked.request.encode())
    peer = _peer_key(federation, asked)
    digest, hashed = authority.key_digest(key), secret_hash(asked.secret)
    name = state.redeem(hashed, now, digest)
    try:
        there = state.site(name)
        if there is None or (there.key, there.status) != (digest, "active"):
            _require_new(state.knows_key(digest), name)
        pem = public_pem(key)
        certificate = _certificate(federation, key, name, now)
        node = register(pem)
        serial = str(certificate.serial_number)
        federation.audit.append(
            "joined", site=name, key=digest, serial=serial, node=str(node), peer=peer
        )
        state.add_site(
            SiteEntry(
                name=name,
                key=digest,
                public_key=pem.decode(),
                node=node,
                joined=now,
                expires=certificate.not_valid_after_utc.timestamp(),
                serial=serial,
                version=asked.version,
                peer_key=peer,
            )
        )
    except BaseException:
        state.free(hashed, digest)
        raise
    federation.backup()
    return Joined(
        site=name,
        federation=federation.settings.name,
        certificate=authority.certificate_pem(certificate).decode(),
        authority=authority.certificate_pem(federation.root()).decode(),
        authors=federation.authors(),
        version=federation.version,
        app=federation.app,
        time=now,
        contract=federation.contract(),
    )


def renew(federation: Federation, site: SiteEntry, asked: Renew, now: float) -> Renewed:
    """Return a new certificate for the key that the connection proved, and no other.

    A peer key that comes along is taken over: sites that joined before there were any announce
    theirs like this. Raises ProtocolError for another key, for a site that is not active, and for
    a peer key that is another site's or that the request does not prove.
    """
    key = authority.request_key(asked.request.encode())
    if authority.key_digest(key) != site.key:
        raise ProtocolError(
            f"site {site.name}: a certificate is renewed for the same key; for a new key, leave "
            "and join again"
        )
    there = federation.state.site(site.name)
    if there is None or (there.key, there.status) != (site.key, "active"):
        raise ProtocolError(f"site {site.name}: not active any more; join again")
    peer = _peer_key(federation, asked)
    if peer is not None and peer != there.peer_key:
        federation.state.set_site(site.name, peer_key=peer)
        federation.audit.append("peer-key", site=site.name, peer=peer, before=there.peer_key)
        federation.backup()
    certificate = _certificate(federation, key, site.name, now)
    serial = str(certificate.serial_number)
    expires = certificate.not_valid_after_utc.timestamp()
    federation.state.set_site(site.name, expires=expires, serial=serial)
    federation.audit.append("renewed", site=site.name, serial=serial, expires=expires)
    return Renewed(certificate=authority.certificate_pem(certificate).decode())


def report(federation: Federation, site: SiteEntry, said: Report, now: float) -> Heard:
    """Keep what a site says; tell it if its certificate is to be renewed.

    It is, too, if the site has announced no peer key, and its release has one to announce.
    """
    federation.state.report(site.name, said, now)
    if said.version and said.version != site.version:
        federation.state.set_site(site.name, version=said.version)
    share = (site.expires - now) / (federation.settings.site_days * DAY_S)
    silent = site.peer_key is None and said.version == federation.version
    return Heard(time=now, renew=silent or share < authority.RENEW_SHARE)


def leave(
    federation: Federation, site: SiteEntry, asked: Leave, now: float, unregister: Unregister
) -> Heard:
    """Remove a site by its own wish; its key never comes in again."""
    federation.state.set_site(site.name, status="left", reason=asked.reason)
    federation.backup()
    federation.audit.append("left", site=site.name, key=site.key, reason=asked.reason)
    if site.node is not None:
        unregister(site.node)
    return Heard(time=now)


def revoke(federation: Federation, name: str, reason: str = "") -> SiteEntry:
    """Shut a site out: from the next request on, its certificate is refused.

    Invitations to its name that were not used are withdrawn. Raises ConfigError if there is no
    such active site.
    """
    there = federation.state.site(name)
    if there is None or there.status != "active":
        state = "there is none of this name" if there is None else f"{there.status} already"
        raise ConfigError(f"site {name}: {state}; `anabranch coordinator sites` lists them")
    entry = federation.state.set_site(name, status="revoked", reason=reason[:500])
    federation.backup()
    federation.audit.append("revoked", site=name, key=entry.key, reason=entry.reason)
    return entry


def public_pem(key: authority.PublicKey) -> bytes:
    """Return a public key as PEM (SubjectPublicKeyInfo), as Flower names a node by it."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _require_new(known: str | None, name: str) -> None:
    if known is not None:
        raise ProtocolError(f"site {name}: this key was in the roster before; make a new one")


def _peer_key(federation: Federation, asked: Join | Renew) -> str | None:
    """Return the peer key that was announced, hex; ProtocolError if its holder did not ask."""
    if asked.peer is None:
        return None
    root = authority.fingerprint(federation.root())
    return require_possessed(asked.peer, asked.request.encode(), root)


def _certificate(
    federation: Federation, key: authority.PublicKey, name: str, now: float
) -> x509.Certificate:
    time, days = datetime.fromtimestamp(now, UTC), federation.settings.site_days
    return federation.authority().site(key, name, time, days)
