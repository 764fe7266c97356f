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

from anabranch.protocols.errors import MalformedMessage

PREFIX = "anabranch:"
_PATTERN = re.compile(
    r"anabranch:(?P<address>(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5})"
    r"/(?P<authority>[0-9a-f]{64})/(?P<secret>[A-Za-z0-9_-]{43})"
)


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """What one site needs to join. Treat it as a password."""

    address: str  # host:port
    authority: str  # SHA-256 of the authority's certificate (DER), hex
    secret: str = field(repr=False)

    def text(self) -> str:
        """Return the string that is handed over: `parse` reads it back."""
        return f"{PREFIX}{self.address}/{self.authority}/{self.secret}"

    @property
    def host(self) -> str:
        """Return the coordinator's host, without brackets."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Return the coordinator's port."""
        return int(self.address.rpartition(":")[2])

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """Return the invitation in a string. The secret is never repeated in an error.

        Raises MalformedMessage.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None or not 0 < int(match["address"].rpartition(":")[2]) < 65536:
            raise MalformedMessage(
                "invitation: expected anabranch:HOST:PORT/FINGERPRINT/SECRET in one piece, as "
                "`anabranch coordinator invite` prints it"
            )
        return cls(**match.groupdict())


def new_secret() -> str:
    """Return 256 random bits, URL-safe."""
    return secrets.token_urlsafe(32)


def secret_hash(secret: str) -> str:
    """Return what is stored of a secret, hex. 256 random bits need no salt."""
    return hashlib.sha256(secret.encode()).hexdigest()
