"""A site joins a federation: one invitation, keys made here, and a folder that is ready to serve.

    look      folder, data and device are there; else nothing is sent, the invitation stays good
    pin       find the authority whose SHA-256 the invitation names, in what the server shows
    keys      P-256, and Ed25519 for other sites, made here; on the disk before they are sent for,
              so that a lost answer can be had again with the same invitation, by these keys alone
    join      over TLS that trusts it alone: secret and certificate request ─► certificate
    write     site.toml, policy.toml, contract.toml, identity/; coordinator.json is last
    preflight checks that can be had again at any time (`anabranch site preflight`)

Whatever stops it before coordinator.json is written leaves a folder in which the next join simply
goes on: what is there of this list is written anew, but for the key, a policy.toml, and what
site.toml says beyond this command's options. The secret is in memory and on that one connection,
nowhere else.
"""

from __future__ import annotations

import stat
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509

from anabranch.client.agent.door import CLOSED, CutOff, Refused, join_door, pinned
from anabranch.client.agent.identity import (
    PRIVATE_FOLDER,
    Coordinator,
    Identity,
    joined,
    peer_key,
    remove_identity,
    require_ours,
    unfinished_key,
    write_identity,
    write_key,
)
from anabranch.client.agent.preflight import CONTRACT, Preflight, preflight
from anabranch.client.policy import policy_file
from anabranch.client.policy.code import version
from anabranch.client.site_file import SiteFile, read_site
from anabranch.protocols.errors import ConfigError, ProtocolError, RunError
from anabranch.protocols.identity import authority
from anabranch.protocols.identity.invitation import PREFIX, Invitation
from anabranch.protocols.identity.join import Joined
from anabranch.protocols.identity.peer import public_hex
from anabranch.protocols.tables import Device
from anabranch.storage.audit_log import AuditLog
from anabranch.storage.files import sweep, write_atomic

# A door opens for strangers a moment after an invitation: so long it is knocked at, and so often at
# least, for one answer of a busy machine may take as long.
KNOCK_S, KNOCKS, KNOCK_PAUSE_S = 3.0, 4, 0.25
MAX_INVITATION = 4096  # characters of a file or of standard input
DEFAULT_FOLDER = Path("site")


@dataclass(frozen=True, kw_only=True)
class JoinReport:
    """What a join did, and whether the site is ready. Holds no secret."""

    folder: Path
    site: str
    federation: str
    address: str
    authority: str  # fingerprint
    authors: tuple[str, ...]
    data: Path
    expires: float  # of the certificate, seconds since 1970
    made: tuple[str, ...]  # files of this join, relative to the folder
    preflight: Preflight
    seconds: float  # all of it

    @property
    def ready(self) -> bool:
        """Whether the site can serve now."""
        return self.preflight.ready

    def as_dict(self) -> dict[str, Any]:
        """Return it for --json."""
        return {
            "folder": str(self.folder),
            "site": self.site,
            "federation": self.federation,
            "coordinator": self.address,
            "authority": self.authority,
            "authors": list(self.authors),
            "data": str(self.data),
            "certificate_until": datetime.fromtimestamp(self.expires, UTC).isoformat(),
            "made": list(self.made),
            "seconds": round(self.seconds, 3),
            **self.preflight.as_dict(),
        }


def read_invitation(text: str, stdin: Callable[[], str] | None = None) -> Invitation:
    """Return the invitation given as itself, as @FILE or a file's path, or on standard input (-).

    Only the last three keep the secret out of the process list and the shell's history. Raises
    ConfigError or MalformedMessage; neither repeats what was given.
    """
    text = text.strip()
    if text.startswith(PREFIX):
        return Invitation.parse(text)
    if text == "-":
        return Invitation.parse((_stdin if stdin is None else stdin)()[:MAX_INVITATION])
    path = Path(text.removeprefix("@")).expanduser()
    try:
        with path.open() as file:
            return Invitation.parse(file.read(MAX_INVITATION))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if text.startswith("@") and isinstance(error, OSError):  # its name may be the secret
            raise ConfigError(
                f"invitation: the file after @ cannot be read: {error.strerror}"
            ) from None
        raise ConfigError(
            f"invitation: neither a string that begins with {PREFIX} nor a file that can be read; "
            "give the string, @FILE, or - to read it from standard input"
        ) from None


def join_site(
    invitation: Invitation,
    data: Path,
    folder: Path = DEFAULT_FOLDER,
    *,
    device: Device | None = None,
    max_rank: int | None = None,
    clock: Callable[[], float] = time.time,
) -> JoinReport:
    """Join with an invitation; return what was made and what the preflight found.

    Raises ConfigError before anything is sent (a site is there already, no such data, no such
    device), RunError if the coordinator is not reached, ProtocolError if it is another one or
    refuses. None of them leaves anything that a second try would stumble over.
    """
    started = time.perf_counter()
    _require_possible(folder, data, device)
    key, root, answer = _ask(invitation, folder)
    certificate = authority.read_certificate(answer.certificate.encode(), "the site's certificate")
    require_ours(certificate, key, root, answer.federation, answer.site)
    _require_same_authority(answer, invitation)
    coordinator = Coordinator(
        site=answer.site,
        federation=answer.federation,
        address=invitation.address,
        authority=invitation.authority,
        authors=answer.authors,
        app=answer.app,
        version=answer.version,
        joined=clock(),
    )
    made = _write(
        folder, answer, coordinator, _site_file(folder, answer.site, data, device, max_rank)
    )
    audit_log(folder, answer.site, answer.federation).append(
        "joined",
        coordinator=invitation.address,
        authority=invitation.authority,
        authors=sorted(answer.authors),
        key=authority.key_digest(key.public_key()),
        peer=public_hex(peer_key(folder)),
    )
    write_identity(folder, key, certificate, root, coordinator)
    return JoinReport(
        folder=folder,
        site=answer.site,
        federation=answer.federation,
        address=invitation.address,
        authority=invitation.authority,
        authors=tuple(sorted(answer.authors)),
        data=data.resolve(),
        expires=Identity(folder).expires,
        made=(*made, "identity/"),
        preflight=preflight(folder, clock=clock),
        seconds=time.perf_counter() - started,
    )


def _ask(invitation: Invitation, folder: Path) -> tuple[authority.Key, x509.Certificate, Joined]:
    """Return the site's key, the authority, and the coordinator's answer.

    The key is on the disk before it is sent for: if the answer is lost, the same key asks again,
    and only it can. A key that is refused is removed; if it was of an earlier attempt, a new one
    is tried.
    """
    root = pinned(invitation)
    until = time.monotonic() + KNOCK_S
    old, knocks = unfinished_key(folder), 0
    while True:
        knocks += 1
        key = old or authority.new_key()
        write_key(folder, key)
        request, peer = authority.certificate_request(key), peer_key(folder)
        try:
            return key, root, join_door(invitation, request, version(), root, peer)
        except CutOff:
            if knocks < KNOCKS or time.monotonic() < until:
                time.sleep(KNOCK_PAUSE_S)
                continue
            raise RunError(
                f"coordinator {invitation.address} ended the connection without an answer: it is "
                "being started again, or no invitation is open there, because this one was used, "
                "was withdrawn or has expired. Try again in a minute, then ask for another one"
            ) from None
        except Refused as error:
            if error.code == CLOSED and (knocks < KNOCKS or time.monotonic() < until):
                time.sleep(KNOCK_PAUSE_S)
                continue
            remove_identity(folder)
            if old is not None:
                old = None
                continue
            raise Refused(
                error.code,
                f"{error}. Nothing was written here. An invitation is good once and for a short "
                "time: ask the coordinator's operator for another one (`anabranch coordinator "
                "invite`)",
            ) from None


def audit_log(folder: Path, site: str, federation: str) -> AuditLog:
    """Return the site's audit log."""
    return AuditLog(folder / "audit.jsonl", folder / "audit.key", f"site {site} of {federation}")


def _require_possible(folder: Path, data: Path, device: Device | None) -> None:
    """Raise ConfigError for what would fail after the invitation was used up."""
    if joined(folder):
        there = Identity(folder)
        raise ConfigError(
            f"{folder}: this is site {there.name!r} of {there.federation!r} already, and stays as "
            "it is. Give another --folder, or leave first: `anabranch site leave`"
        )
    if not data.exists():
        raise ConfigError(f"{data}: no such file or folder; nothing was sent. Give your records")
    if (folder / "site.toml").exists():
        read_site(folder)
    if device is not None:
        from anabranch.client.models import require_device

        require_device(device)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
        with tempfile.TemporaryFile(dir=folder):
            pass
        sweep(folder)
        sweep(folder / "identity")
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}); nothing was sent"
        ) from None
    if stat.S_IMODE(folder.stat().st_mode) & 0o022:
        raise ConfigError(
            f"{folder}: others may write there; nothing was sent. `chmod go-w {folder}`, or give "
            "another --folder"
        )


def _require_same_authority(answer: Joined, invitation: Invitation) -> None:
    own = authority.read_certificate(answer.authority.encode(), "the coordinator's authority")
    if authority.fingerprint(own) != invitation.authority:
        raise ProtocolError(
            "the coordinator's answer names another authority than the invitation; nothing was "
            "written. Ask its operator for a new invitation"
        )


def _site_file(
    folder: Path, name: str, data: Path, device: Device | None, max_rank: int | None
) -> SiteFile:
    """Return site.toml: what is there stays, but for the name, the data and given options."""
    where = data.resolve()
    inside = where.is_relative_to(folder.resolve())
    path = str(where.relative_to(folder.resolve()) if inside else where)
    if (folder / "site.toml").exists():
        file = msgspec.structs.replace(read_site(folder), name=name, data=path)
    else:
        file = SiteFile(name=name, data=path)
    if device is not None:
        file = msgspec.structs.replace(file, device=device)
    if max_rank is not None:
        file = msgspec.structs.replace(file, max_rank=max_rank)
    return file


def _write(
    folder: Path, answer: Joined, coordinator: Coordinator, file: SiteFile
) -> tuple[str, ...]:
    """Write all but the identity; return the names of what was written."""
    made = []
    if not (folder / "site.toml").exists() or read_site(folder) != file:
        write_atomic(folder / "site.toml", site_toml(file))
        made.append("site.toml")
    if not (folder / policy_file.FILE).exists():
        text = policy_file.default_policy(
            {coordinator.federation: coordinator.authority}, coordinator.authors
        )
        write_atomic(folder / policy_file.FILE, text.encode(), policy_file.PRIVATE)
        made.append(policy_file.FILE)
    (folder / CONTRACT).unlink(missing_ok=True)  # of another federation
    if answer.contract:
        write_atomic(folder / CONTRACT, answer.contract.encode())
        made.append(CONTRACT)
    return tuple(made)


def site_toml(file: SiteFile) -> bytes:
    """Return site.toml with what differs from the defaults."""
    values = {
        name: value
        for name, value in msgspec.structs.asdict(file).items()
        if value is not None and value != getattr(_DEFAULTS, name)
    }
    return _HEAD + msgspec.toml.encode(values)


_DEFAULTS = SiteFile(name="0", data="\0")
_HEAD = b"""\
# What the owner of this site decides, and no coordinator can: docs/joining.md.
# device = "cuda", max_rank = 4, and a [budget] over all runs (epsilon, delta) may stand here.
"""


def _stdin() -> str:
    return sys.stdin.read(MAX_INVITATION)
