"""An invitation: one string that lets one site join, once, for a short time.

    anabranch:HOST:PORT/FINGERPRINT/SECRET
    address of the coordinator; SHA-256 (64 hex digits) of the federation's authority (DER);
    256 random bits, URL-safe base64

The site trusts the authority with this fingerprint and nothing else, and only then sends the
secret: whoever sits in between learns nothing. The coordinator keeps the secret's hash alone.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from typing import Self

from anabranch.protocols.errors import MalformedMessage

PREFIX = "anabranch:"
_PATTERN = re.compile(
    r"(?P<address>(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5})"
    r"/(?P<authority>[0-9a-f]{64})/(?P<secret>[A-Za-z0-9_-]{43})"
)


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """Where a server is, how it is known, and what it asks of who comes: once, as a password.

    In text: HOST:PORT/FINGERPRINT/SECRET. (A gateway's invitation is one: edge/runtime/enrol.py.)
    """

    address: str  # host:port
    authority: str  # SHA-256 of the authority's certificate (DER), hex
    secret: str = field(repr=False)

    def text(self) -> str:
        """Return the string that is handed over: `read` reads it back."""
        return f"{self.address}/{self.authority}/{self.secret}"

    @classmethod
    def read(cls, text: str) -> Self | None:
        """Return the ticket in a string, None if it is none."""
        match = _PATTERN.fullmatch(text)
        if match is None or not 0 < int(match["address"].rpartition(":")[2]) < 65536:
            return None
        return cls(**match.groupdict())

    @property
    def host(self) -> str:
        """Return the server's host, without brackets."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Return the server's port."""
        return int(self.address.rpartition(":")[2])


@dataclass(frozen=True, kw_only=True)
class Invitation(Ticket):
    """What one site needs to join. Treat it as a password."""

    def text(self) -> str:
        """Return the string that is handed over: `parse` reads it back."""
        return PREFIX + super().text()

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """Return the invitation in a string. The secret is never repeated in an error.

        Raises MalformedMessage.
        """
        text = text.strip()
        found = cls.read(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else None
        if found is None:
            raise MalformedMessage(
                "invitation: expected anabranch:HOST:PORT/FINGERPRINT/SECRET in one piece, as "
                "`anabranch coordinator invite` prints it"
            )
        return found


def new_secret() -> str:
    """Return 256 random bits, URL-safe."""
    return secrets.token_urlsafe(32)


def secret_hash(secret: str) -> str:
    """Return what is stored of a secret, hex. 256 random bits need no salt."""
    return hashlib.sha256(secret.encode()).hexdigest()
