"""What a joined site knows of itself, against which runs are compared (rules.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anabranch.client.agent.identity import Identity
from anabranch.client.policy.code import code_digest, version


@dataclass(frozen=True, kw_only=True)
class Here:
    """What the site knows of itself."""

    federation: str  # that it has joined
    authority: str  # fingerprint of the federation's authority
    code: str  # digest of the software that is installed
    version: str  # of it


def here_of(folder: Path) -> Here:
    """Return what the joined site in `folder` knows of itself. Raises ConfigError if it is none."""
    joined = Identity(folder).coordinator
    return Here(
        federation=joined.federation,
        authority=joined.authority,
        code=code_digest(),
        version=version(),
    )
