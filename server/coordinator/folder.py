"""A federation's folder at its coordinator: one object from which every process reads it.

    coordinator.toml                  the operator's decisions (settings.py)
    contract.toml                     optional: a run.toml that sites check their records against
    authority/                        ca.key ca.pem server.key server.pem
    authors/<name>.key                who may propose runs: Ed25519 seed, hex
    state.sqlite  state.sqlite.bak    roster, invitations, runs (state.py); a copy of it
    superlink/state.db                Flower's own
    audit.jsonl  audit.key            the audit log
    page.token                        opens the page
    runs/<run id>/                    each run's folder (server/store.py)

The folder has mode 0700, every secret 0600; a secret that others can read is refused, not used.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.policy.code import app_hash, code_digest, version
from anabranch.protocols.config import parse
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.identity.authority import (
    Authority,
    Time,
    certificate_pem,
    general_name,
    key_pem,
    new_authority,
    new_key,
    read_certificate,
    read_private_key,
    to_be_renewed,
)
from anabranch.protocols.identity.join import MAX_CONTRACT
from anabranch.server.coordinator.serving import holding, served
from anabranch.server.coordinator.settings import (
    SETTINGS_FILE,
    Settings,
    parse_settings,
    read_settings,
    settings_text,
)
from anabranch.server.coordinator.state import State
from anabranch.storage.audit_log import AuditLog
from anabranch.storage.files import locked, open_to_others, staged, write_atomic

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SOCKET_PATH = 90  # bytes of a socket's path at most; Linux takes 107, others 103
SOCKET_NAME = 24  # bytes of a socket's name in `socket_folder`


class Federation:
    """The federation in `folder`. Raises ConfigError if it is none, naming what is wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.settings: Settings = read_settings(self.folder)

    @classmethod
    def create(
        cls, folder: Path, name: str, hosts: Sequence[str], port: int, contract: Path | None = None
    ) -> Federation:
        """Make the folder of a new federation, whole or not at all.

        Raises ConfigError for a name, host or contract that is wrong, and for a folder that has
        something in it: a second authority would lock out every site of the first.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder}: a federation needs a folder of its own and this one is not empty"
            )
        text = settings_text(name, list(hosts), port)
        settings = parse_settings(text, SETTINGS_FILE)
        agreed = None if contract is None else _contract(contract)
        with staged(folder) as making:
            _fill(making, settings, text, agreed)
        os.chmod(folder, 0o700)
        made = cls(folder)
        made.audit.append(
            "federation-made", federation=name, authority=made.authority().fingerprint
        )
        made.backup()
        return made

    # -- files -----------------------------------------------------------------------------------

    @cached_property
    def state(self) -> State:
        """The state, opened once for this object."""
        return State(self.state_file)

    @cached_property
    def audit(self) -> AuditLog:
        """The audit log."""
        who = f"coordinator {self.settings.name}"
        return AuditLog(self.folder / "audit.jsonl", self.folder / "audit.key", who)

    @property
    def state_file(self) -> Path:
        """The database of `state`."""
        return self.folder / "state.sqlite"

    @property
    def backup_file(self) -> Path:
        """The last copy of the state."""
        return self.folder / "state.sqlite.bak"

    @property
    def superlink_database(self) -> Path:
        """The database of Flower's SuperLink."""
        return self.folder / "superlink" / "state.db"

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return self.folder / "runs"

    def run_folder(self, run: str) -> Path:
        """Return the folder of one run; ConfigError for an id that is none."""
        if run != Path(run).name or run in ("", ".", ".."):
            raise ConfigError(f"run {run!r}: expected an id as `anabranch coordinator runs` lists")
        return self.runs / run

    def socket_folder(self) -> Path:
        """Return a folder for Unix sockets that only this user can enter; made if it is missing.

        It lies in the federation's folder or, where that path is too long for a socket, in the
        system's folder for temporary files. Raises ConfigError if somebody else owns it.
        """
        digest = hashlib.sha256(os.fsencode(self.folder.resolve())).hexdigest()[:16]
        name = f"anabranch-{os.getuid()}-{digest}"
        places = (self.folder / "sockets", Path(tempfile.gettempdir()) / name, Path("/tmp") / name)
        short = SOCKET_PATH - SOCKET_NAME - 1
        folder = next(one for one in places if len(os.fsencode(one)) <= short)
        folder.mkdir(mode=0o700, exist_ok=True)
        there = folder.lstat()
        if folder.is_symlink() or there.st_uid != os.getuid():
            raise ConfigError(f"{folder}: not a folder of this user; remove it")
        folder.chmod(0o700)
        return folder

    # -- secrets ---------------------------------------------------------------------------------

    def authority(self) -> Authority:
        """Return the federation's authority, with its key."""
        home = self.folder / "authority"
        key = read_private_key(secret(home / "ca.key"), str(home / "ca.key"))
        return Authority(self.settings.name, key, self.root())

    def root(self) -> x509.Certificate:
        """Return the authority's certificate."""
        return read_certificate(self.authority_file.read_bytes(), str(self.authority_file))

    @property
    def authority_file(self) -> Path:
        """The authority's certificate, PEM."""
        return self.folder / "authority" / "ca.pem"

    def server_credentials(self, now: Time | None = None) -> tuple[Path, Path]:
        """Return (key file, certificate file) of the public port.

        The certificate is made anew, for the same key, if its time is nearly over or its hosts are
        not those of coordinator.toml. Raises ConfigError for a host that the authority may not
        sign for: it was made for the hosts given to `init`, and sites trust it for no others.
        """
        now = now or datetime.now(UTC)
        home = self.folder / "authority"
        key_file, file = home / "server.key", home / "server.pem"
        with locked(file):
            key = read_private_key(secret(key_file), str(key_file))
            if not file.exists() or self._stale(file, key.public_key(), now):
                authority, hosts = self.authority(), self.settings.hosts
                _require_permitted(authority.certificate, hosts)
                made = authority.server(key.public_key(), hosts, now, self.settings.server_days)
                write_atomic(file, certificate_pem(made))
        return key_file, file

    def _stale(self, file: Path, key: object, now: Time) -> bool:
        there = read_certificate(file.read_bytes(), str(file))
        names = there.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = [general_name(host) for host in self.settings.hosts]
        return to_be_renewed(there, now) or list(names) != hosts or there.public_key() != key

    def author(self, name: str) -> Ed25519PrivateKey:
        """Return an author's key; ConfigError if there is no such author."""
        file = self.folder / "authors" / f"{name}.key"
        if NAME.fullmatch(name) is None or not file.exists():
            raise ConfigError(
                f"author {name!r}: expected one of {', '.join(self._authors())}, each a key in "
                f"{file.parent}"
            )
        try:
            return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret(file).decode()))
        except ValueError:
            raise ConfigError(f"{file}: expected an Ed25519 key, 64 hex digits") from None

    def authors(self) -> dict[str, str]:
        """Return who may propose runs: name -> Ed25519 public key, hex."""
        return {
            name: self.author(name).public_key().public_bytes_raw().hex()
            for name in self._authors()
        }

    def _authors(self) -> list[str]:
        return sorted(file.stem for file in (self.folder / "authors").glob("*.key"))

    def page_token(self) -> str:
        """Return the secret that opens the page."""
        return secret(self.folder / "page.token").decode()

    def contract(self) -> str:
        """Return the run.toml that comes with a join; "" without one."""
        file = self.folder / "contract.toml"
        return _contract(file) if file.exists() else ""

    # -- software --------------------------------------------------------------------------------

    @property
    def code(self) -> str:
        """The digest of the software that sites are to run, hex."""
        return code_digest()

    @property
    def app(self) -> str:
        """The hash of the Flower app that messages name, hex."""
        return app_hash(self.code)

    @property
    def version(self) -> str:
        """The version of anabranch that is installed here."""
        return version()

    # -- one coordinator, and its copies ---------------------------------------------------------

    def serving(self) -> AbstractContextManager[None]:
        """Hold the folder for the one supervisor; RunError if another process holds it."""
        return holding(self.folder)

    def is_served(self) -> bool:
        """Whether a supervisor holds the folder now."""
        return served(self.folder)

    def backup(self) -> Path:
        """Copy the state beside it, whole or not at all; return the copy."""
        self.state.backup(self.backup_file)
        return self.backup_file


def secret(file: Path) -> bytes:
    """Return what a secret file holds, without space around it.

    Raises ConfigError if it is missing, or if anybody but its owner can read it.
    """
    try:
        if mode := open_to_others(file):
            raise ConfigError(
                f"{file}: others than its owner can read it (mode {mode}). Find out who did, then "
                "chmod 600 it"
            )
        return file.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; restore it from a backup") from None


def _fill(folder: Path, settings: Settings, text: str, contract: str | None) -> None:
    now = datetime.now(UTC)
    authority, key = new_authority(settings.name, settings.hosts, now), new_key()
    author = Ed25519PrivateKey.generate().private_bytes_raw().hex().encode()
    for name in ("authority", "authors", "superlink", "runs"):
        (folder / name).mkdir(mode=0o700)
    write_atomic(folder / "authority" / "ca.key", key_pem(authority.key), 0o600)
    write_atomic(folder / "authority" / "ca.pem", certificate_pem(authority.certificate))
    write_atomic(folder / "authority" / "server.key", key_pem(key), 0o600)
    server = authority.server(key.public_key(), settings.hosts, now, settings.server_days)
    write_atomic(folder / "authority" / "server.pem", certificate_pem(server))
    write_atomic(folder / "authors" / f"{AUTHOR}.key", author + b"\n", 0o600)
    write_atomic(folder / "page.token", secrets.token_urlsafe(32).encode() + b"\n", 0o600)
    write_atomic(folder / SETTINGS_FILE, text.encode())
    if contract is not None:
        write_atomic(folder / "contract.toml", contract.encode())
    State.create(folder / "state.sqlite").close()


AUTHOR = "operator"  # the first author, made by `init`


def _contract(file: Path) -> str:
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give the path of a run.toml") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: {error}") from None
    parse(text, source=str(file))
    if len(text) > MAX_CONTRACT:
        raise ConfigError(f"{file}: {len(text)} characters, at most {MAX_CONTRACT} are sent along")
    return text


def _require_permitted(root: x509.Certificate, hosts: Sequence[str]) -> None:
    permitted = root.extensions.get_extension_for_class(x509.NameConstraints).value
    for host in hosts:
        name = general_name(host)
        if not any(_covers(one, name) for one in permitted.permitted_subtrees or ()):
            raise ConfigError(
                f"coordinator.toml: hosts: {host!r} is not one that this federation's authority "
                "may sign for; it was made for those given to `anabranch coordinator init`. Take "
                "it out, or make a new federation"
            )


def _covers(permitted: x509.GeneralName, name: x509.GeneralName) -> bool:
    if isinstance(name, x509.IPAddress) and isinstance(permitted, x509.IPAddress):
        return name.value in permitted.value  # type: ignore[operator]
    if isinstance(name, x509.DNSName) and isinstance(permitted, x509.DNSName):
        one, within = name.value.lower(), permitted.value.lower()
        return one == within or one.endswith(f".{within}")
    return False
