"""Who a site is to its coordinator: identity/ in the site's folder.

    peer.key          Ed25519, 32 bytes in hex, mode 0600, never sent: other sites know this one by
                      it in secure sums
    site.key          P-256, made here, mode 0600, never sent; also the key of Flower's node
    site.pem          its certificate; renewed in place, the key stays
    ca.pem            the federation's authority: the only one that is trusted
    coordinator.json  name, federation, address, authors; written last: a site is joined if it is
                      there, so what was interrupted before leaves a site that is not

TLS 1.3 (RFC 8446) with a client certificate, and the coordinator's host must be in its own.
"""

from __future__ import annotations

import secrets
import ssl
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.protocols.errors import ConfigError, MalformedMessage, ProtocolError
from anabranch.protocols.identity import authority
from anabranch.protocols.identity.proposal import Hex, Short
from anabranch.protocols.tables import Name
from anabranch.storage.files import locked, open_to_others, write_atomic

FOLDER = "identity"
KEY, CERTIFICATE, ROOT, COORDINATOR = "site.key", "site.pem", "ca.pem", "coordinator.json"
PEER = "peer.key"
NODE = "node"  # the agent's: Flower's id of this site's node
PRIVATE, PRIVATE_FOLDER = 0o600, 0o700


class Coordinator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """coordinator.json: what the coordinator said when the site joined."""

    site: Name
    federation: Name
    address: str  # host:port
    authority: Hex  # fingerprint of ca.pem
    authors: dict[Name, Hex]  # who may propose runs: name -> Ed25519 public key
    app: Hex  # hash of the Flower app that messages name
    version: Short  # of anabranch at the coordinator
    joined: float  # seconds since 1970, UTC, by this machine's clock
    contract: str = ""  # the run.toml that came with the invitation; "": none


class Identity:
    """The identity of a joined site. Raises ConfigError if it has not joined, or it is broken.

    Certificate and key are read at every use, so a renewal counts at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / FOLDER
        self.coordinator = _coordinator(self.home / COORDINATOR, folder)

    @property
    def name(self) -> str:
        """Return the site's name, which the coordinator gave."""
        return self.coordinator.site

    @property
    def federation(self) -> str:
        """Return the federation's name."""
        return self.coordinator.federation

    @property
    def address(self) -> str:
        """Return where the coordinator listens: host:port."""
        return self.coordinator.address

    @property
    def authors(self) -> dict[str, str]:
        """Return who may propose runs: name -> Ed25519 public key, hex."""
        return self.coordinator.authors

    @property
    def app(self) -> str:
        """Return the hash of the Flower app that messages name."""
        return self.coordinator.app

    @property
    def key_file(self) -> Path:
        """Return site.key; raise ConfigError if anyone but its owner may read or change it."""
        path = self.home / KEY
        try:
            mode = open_to_others(path)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; leave and join again") from None
        if mode:
            raise ConfigError(
                f"{path}: mode {mode}, but a private key is for its owner alone: "
                f"chmod 600 {path}. If others use this machine, leave and join again"
            )
        return path

    @property
    def certificate_file(self) -> Path:
        """Return site.pem."""
        return self.home / CERTIFICATE

    def key(self) -> authority.Key:
        """Return the private key."""
        return authority.read_private_key(self.key_file.read_bytes(), str(self.home / KEY))

    def peer_key(self) -> Ed25519PrivateKey:
        """Return the key that other sites know this one by; a site without one makes it now.

        Raises ConfigError for a file that holds no key, or that anyone but its owner may read.
        """
        return peer_key(self.folder)

    def certificate(self) -> x509.Certificate:
        """Return the site's certificate."""
        return _certificate(self.certificate_file)

    def root(self) -> x509.Certificate:
        """Return the federation's authority; raise ConfigError if it is not the one joined."""
        root = _certificate(self.home / ROOT)
        if authority.fingerprint(root) != self.coordinator.authority:
            raise ConfigError(
                f"{self.home / ROOT}: not the authority that this site joined; leave and join again"
            )
        return root

    @property
    def expires(self) -> float:
        """Return the end of the certificate, seconds since 1970, UTC."""
        return self.certificate().not_valid_after_utc.timestamp()

    def needs_renewal(self, now: float) -> bool:
        """Whether less than a third of the certificate's time is left."""
        return authority.to_be_renewed(self.certificate(), datetime.fromtimestamp(now, UTC))

    def context(self) -> ssl.SSLContext:
        """Return TLS 1.3 with the site's certificate, which trusts this authority alone.

        The server's host must be in its certificate. Made anew after a renewal.
        """
        context = trusting(self.root())
        try:
            context.load_cert_chain(self.certificate_file, self.key_file)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"{self.home}: {KEY} and {CERTIFICATE} cannot be used together ({error}); leave "
                "and join again"
            ) from None
        return context

    def replace_certificate(self, pem: bytes) -> None:
        """Take a new certificate for the same key: checked, then swapped in one rename.

        Raises ProtocolError, with the old one in place, unless the authority signed it for this
        key, this federation and this site, and it ends no earlier than the present one.
        """
        new = authority.read_certificate(pem, "the new certificate")
        require_ours(new, self.key(), self.root(), self.federation, self.name)
        old = self.certificate()
        if new.not_valid_after_utc < old.not_valid_after_utc:
            raise ProtocolError(
                f"the new certificate ends {new.not_valid_after_utc:%Y-%m-%d}, before the present "
                f"one ({old.not_valid_after_utc:%Y-%m-%d}); it was not taken"
            )
        write_atomic(self.certificate_file, authority.certificate_pem(new))


def joined(folder: Path) -> bool:
    """Whether a site has joined a federation from this folder, and not left."""
    return (folder / FOLDER / COORDINATOR).exists()


def write_key(folder: Path, key: authority.Key) -> None:
    """Write site.key, for its owner alone. The site has not joined by that."""
    home = folder / FOLDER
    home.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
    home.chmod(PRIVATE_FOLDER)
    write_atomic(home / KEY, authority.key_pem(key), PRIVATE)


def peer_key(folder: Path) -> Ed25519PrivateKey:
    """Return the key in peer.key, which is made if it is not there; ConfigError if it is unfit.

    One key, however many processes ask at once. It is on the disk when this returns.
    """
    path = folder / FOLDER / PEER
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
            with locked(path):
                if not path.exists():
                    write_atomic(path, secrets.token_hex(32).encode() + b"\n", PRIVATE)
        if mode := open_to_others(path):
            raise ConfigError(
                f"{path}: mode {mode}, but a private key is for its owner alone: chmod 600 {path}. "
                "If others use this machine, leave and join again"
            )
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text("ascii")))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; leave and join again") from None
    except ValueError:
        raise ConfigError(
            f"{path}: expected an Ed25519 key, 64 hex digits; put the file back, or leave and join "
            "again: the owners of other sites have to be told of the new key"
        ) from None


def unfinished_key(folder: Path) -> authority.Key | None:
    """Return the key of a join that was interrupted; None if there is none that can be used."""
    path = folder / FOLDER / KEY
    try:
        if joined(folder) or open_to_others(path):
            return None
        return authority.read_private_key(path.read_bytes(), KEY)
    except (OSError, MalformedMessage):
        return None


def write_identity(
    folder: Path,
    key: authority.Key,
    certificate: x509.Certificate,
    root: x509.Certificate,
    coordinator: Coordinator,
) -> None:
    """Write identity/, coordinator.json last. Until then `joined` is false."""
    home = folder / FOLDER
    write_key(folder, key)
    (home / NODE).unlink(missing_ok=True)  # of another key
    write_atomic(home / CERTIFICATE, authority.certificate_pem(certificate))
    write_atomic(home / ROOT, authority.certificate_pem(root))
    write_atomic(home / COORDINATOR, msgspec.json.encode(coordinator))


def remove_identity(folder: Path) -> bool:
    """Remove the identity, coordinator.json and the key first; return whether there was one."""
    home = folder / FOLDER
    there = False
    for name in (COORDINATOR, KEY, PEER, CERTIFICATE, ROOT, NODE, f".{PEER}.lock"):
        there |= (home / name).exists()
        (home / name).unlink(missing_ok=True)
    if home.is_dir() and not any(home.iterdir()):
        home.rmdir()
    return there


def trusting(root: x509.Certificate) -> ssl.SSLContext:
    """Return a client's TLS 1.3 that trusts `root` alone and checks the host."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=authority.certificate_pem(root).decode())
    return context


def require_ours(
    certificate: x509.Certificate,
    key: authority.Key,
    root: x509.Certificate,
    federation: str,
    name: str,
) -> None:
    """Raise ProtocolError unless `root` signed it for this key, federation and site.

    Its time is not judged here: a wrong clock is a finding of the preflight.
    """
    if certificate.public_key() != key.public_key():
        raise ProtocolError("the certificate that the coordinator issued is for another key")
    begin = certificate.not_valid_before_utc
    got = authority.site_of(certificate, root, begin)
    if got != (federation, name):
        raise ProtocolError(
            f"the certificate that the coordinator issued is for site {got[1]!r} of {got[0]!r}, "
            f"not {name!r} of {federation!r}"
        )


def _certificate(path: Path) -> x509.Certificate:
    try:
        return authority.read_certificate(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; leave and join again") from None


def _coordinator(path: Path, folder: Path) -> Coordinator:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Coordinator)
    except FileNotFoundError:
        raise ConfigError(
            f"{folder}: has not joined a federation; name the site's folder with --folder, or run "
            "`anabranch site join INVITATION --data RECORDS`"
        ) from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; leave and join again") from None
