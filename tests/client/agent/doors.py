"""A coordinator's door in a thread: real TLS, the real authority, and answers that tests choose."""

from __future__ import annotations

import http.server
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from anabranch.client.agent.identity import Coordinator as Stored
from anabranch.client.agent.identity import Identity, write_identity
from anabranch.client.policy.code import app_hash, code_digest, version
from anabranch.protocols.identity import authority, join
from anabranch.protocols.identity.authority import Authority
from anabranch.protocols.identity.invitation import Invitation, new_secret, secret_hash

Answer = tuple[int, bytes]
AUTHOR = "ab" * 32


@dataclass(frozen=True)
class Seen:
    """One request that reached the door through TLS."""

    path: str
    body: bytes
    certificate: bool


@dataclass(eq=False)
class Coordinator:
    """What the door knows. Tests change it as they like."""

    root: Authority
    contract: str = ""
    site: str = "cardiology"
    days: float = authority.SITE_DAYS
    skew_s: float = 0.0
    version: str = field(default_factory=version)
    app: str = field(default_factory=lambda: app_hash(code_digest()))
    invitations: dict[str, str] = field(default_factory=dict)  # hash of the secret -> site
    used: dict[str, str] = field(default_factory=dict)  # hash of the secret -> digest of a key
    refusal: tuple[int, join.Refusal] | None = None
    answers: dict[str, Callable[[bytes], Answer]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    port: int = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def invite(self, fingerprint: str | None = None, address: str | None = None) -> Invitation:
        secret = new_secret()
        self.invitations[secret_hash(secret)] = self.site
        return Invitation(
            address=address or self.address,
            authority=fingerprint or self.root.fingerprint,
            secret=secret,
        )

    def answer(self, path: str, body: bytes) -> Answer:
        if path in self.answers:
            return self.answers[path](body)
        if self.refusal is not None:
            return self.refusal[0], join.encode(self.refusal[1])
        now = time.time() + self.skew_s
        match path:
            case join.HELLO:
                hello = join.Hello(federation=self.root.federation, version=self.version, time=now)
                return 200, join.encode(hello)
            case join.JOIN:
                return self.join(body)
            case join.RENEW:
                request = join.decode(body, join.Renew).request
                return 200, join.encode(join.Renewed(certificate=self.sign(request)))
            case join.REPORT | join.LEAVE:
                return 200, join.encode(join.Heard(time=now))
        return 404, b""

    def sign(self, request: str) -> str:
        key = authority.request_key(request.encode())
        signed = self.root.site(key, self.site, datetime.now(UTC), self.days)
        return authority.certificate_pem(signed).decode()

    def join(self, body: bytes) -> Answer:
        """Take a site in; a used invitation is good again for the key that used it alone."""
        asked = join.decode(body, join.Join)
        hashed = secret_hash(asked.secret)
        key = authority.key_digest(authority.request_key(asked.request.encode()))
        site = self.invitations.get(hashed)
        if site is None or self.used.setdefault(hashed, key) != key:
            text = "the invitation is unknown, used or expired"
            return 403, join.encode(join.Refusal(code="invitation", message=text))
        joined = join.Joined(
            site=site,
            federation=self.root.federation,
            certificate=self.sign(asked.request),
            authority=authority.certificate_pem(self.root.certificate).decode(),
            authors={"trial": AUTHOR},
            version=self.version,
            app=self.app,
            time=time.time() + self.skew_s,
            contract=self.contract,
        )
        return 200, join.encode(joined)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = True
    coordinator: Coordinator
    tls: ssl.SSLContext

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(10.0)
        with self.tls.wrap_socket(request, server_side=True) as stream:
            super().finish_request(stream, client_address)

    def shutdown_request(self, request: Any) -> None:
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that breaks off is what many tests are about."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    connection: ssl.SSLSocket

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        coordinator = self.server.coordinator
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        certificate = bool(self.connection.getpeercert())
        coordinator.seen.append(Seen(self.path, body, certificate))
        if not certificate and self.path != join.JOIN:
            refusal = join.Refusal(code="certificate", message="a client certificate is required")
            status, answer = 401, join.encode(refusal)
        else:
            status, answer = coordinator.answer(self.path, body)
        if status == 0:  # as if it were killed
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = _serve


def server_context(
    folder: Path, root: Authority, hosts: tuple[str, ...] = ("127.0.0.1",), **when: Any
) -> ssl.SSLContext:
    """Return the door's TLS, whose certificates are written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    key = authority.new_key()
    now = when.get("now", datetime.now(UTC))
    certificate = root.server(key.public_key(), hosts, now, when.get("days", 30))
    chain, private, ca = folder / "server.pem", folder / "server.key", folder / "ca.pem"
    pem = authority.certificate_pem(root.certificate)
    chain.write_bytes(authority.certificate_pem(certificate) + pem)
    private.write_bytes(authority.key_pem(key))
    ca.write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(chain, private)
    context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def make_identity(folder: Path, root: Authority, **about: Any) -> Identity:
    """Write the identity of a site that has joined."""
    key, name = about.get("key", authority.new_key()), about.get("name", "cardiology")
    begin = about.get("begin", datetime.now(UTC))
    certificate = root.site(key.public_key(), name, begin, about.get("days", authority.SITE_DAYS))
    stored = Stored(
        site=name,
        federation=root.federation,
        address=about.get("address", "127.0.0.1:1"),
        authority=root.fingerprint,
        authors={"trial": AUTHOR},
        app=app_hash(code_digest()),
        version=version(),
        joined=0.0,
    )
    write_identity(folder, key, certificate, about.get("trust", root).certificate, stored)
    return Identity(folder)


def long_ago() -> datetime:
    return datetime.now(UTC) - timedelta(days=100)


def everything(folder: Path) -> bytes:
    """Return all names and contents below a folder."""
    parts = []
    for path in sorted(folder.rglob("*")):
        parts.append(str(path).encode())
        if path.is_file():
            parts.append(path.read_bytes())
    return b"\n".join(parts)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change coordinator.json."""
    path = folder / "identity" / "coordinator.json"
    stored = msgspec.json.decode(path.read_bytes(), type=Stored)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(stored, **changes)))
