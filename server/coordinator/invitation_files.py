"""An invitation as it is handed over: a file of mode 0600, a QR code (ISO/IEC 18004)."""

from __future__ import annotations

import io
from pathlib import Path

import segno

from anabranch.protocols.errors import ConfigError
from anabranch.storage.files import write_atomic

PICTURE = ".svg"
ERROR_CORRECTION = "m"  # 15 % of the code may be unreadable


def require_free(file: Path) -> None:
    """Raise ConfigError if there is a file already."""
    if file.exists():
        raise ConfigError(f"{file}: exists; name another file")


def write(file: Path, invitation: str) -> None:
    """Write the invitation to a file that only its owner can read; *.svg: as a QR code."""
    data = _picture(invitation) if file.suffix == PICTURE else invitation.encode() + b"\n"
    write_atomic(file, data, 0o600)


def blocks(invitation: str) -> str:
    """Return the QR code for a terminal, two modules a character."""
    text = io.StringIO()
    segno.make(invitation, error=ERROR_CORRECTION, micro=False).terminal(text, compact=True)
    return text.getvalue().rstrip("\n")


def _picture(invitation: str) -> bytes:
    data = io.BytesIO()
    segno.make(invitation, error=ERROR_CORRECTION, micro=False).save(data, kind="svg", scale=4)
    return data.getvalue()
