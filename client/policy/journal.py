"""What a guarded site writes to its audit log, and how often.

    policy          policy.toml is another one than before (its digest)
    run-allowed     the first message of a proposal that is allowed
    round-trained   one round: data fingerprint, privacy, bytes
    update-of-zeros before it: nothing was learned, and only this machine knows (refusals.py)
    update-masked   a masked update, of a secure sum, that may leave
    refused         a message, and why: the same one once in REPEAT_S, at most LINES in that time

Whoever asks cannot fill the disk. What the log does not take is not done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from anabranch.client.policy.rules import NotAllowed
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import AnabranchError
from anabranch.protocols.identity.proposal import Signed

REPEAT_S = 3600.0
LINES = 100

log = logging.getLogger(__name__)


class Audit(Protocol):
    """Where decisions are written (storage/audit_log.py)."""

    def append(self, kind: str, **fields: object) -> object:
        """Add an entry; it is on the disk when this returns."""


@dataclass(eq=False)
class Journal:
    """The audit log of a guarded site; None: decisions are not written down."""

    name: str
    audit: Audit | None
    clock: Callable[[], float]
    _policy: str = ""
    _begun: float = float("-inf")  # of the time in which LINES are counted
    _lines: int = 0
    _repeated: dict[str, int] = field(default_factory=dict)  # refusals of that time

    def write(self, kind: str, **fields: object) -> None:
        """Add an entry. Raises NotAllowed if it cannot be written."""
        if self.audit is None:
            return
        try:
            self.audit.append(kind, **fields)
        except (AnabranchError, OSError) as error:  # its text names folders of this machine
            log.error("%s: the audit log: %s", self.name, error)
            raise NotAllowed(
                "policy", "this site's audit log cannot be written, and nothing is done without it"
            ) from None

    def policy(self, digest: str) -> None:
        """Write down under which policy the site works, when it is another one."""
        if digest != self._policy:
            self.write("policy", digest=digest)
            self._policy = digest

    def refusal(self, run: str, signed: Signed | None, error: NotAllowed) -> None:
        """Write down a refusal, unless the same one, or too many, were written before."""
        now, before = self.clock(), dict[str, int]()
        if now - self._begun >= REPEAT_S:
            before, self._repeated = self._repeated, {}
            self._begun, self._lines = now, 0
        key = f"{error.code} {run[:200]} {digest_of(signed)}"
        if key in self._repeated:
            self._repeated[key] += 1
            return
        log.warning("%s refuses run %s: %s", self.name, run[:60], error)
        if self._lines == LINES:
            return
        self._lines += 1
        self._repeated[key] = 0
        self.write(
            "refused",
            run=run[:200],
            proposal=digest_of(signed),
            author="" if signed is None else signed.proposal.author,
            code=error.code,
            message=str(error)[:500],
            repeated=before.get(key, 0),  # not listed, in the time before
        )


def digest_of(signed: Signed | None) -> str:
    """Return the digest of a proposal; "" if there is none."""
    return "" if signed is None else signed.proposal.digest


def privacy_of(config: RunConfig) -> dict[str, dict[str, float | None]]:
    """Return what a run promises: table -> epsilon and delta; {} if it promises nothing."""
    tables = {"privacy": config.privacy, "client_privacy": config.client_privacy}
    return {
        name: {"epsilon": table.epsilon, "delta": table.delta}
        for name, table in tables.items()
        if table is not None
    }
