"""A systemd user unit for a site's agent: `anabranch site serve --print-unit`.

It may write to the site's folder and to the folder of the ledger's witnesses, and to nothing else
but its own /tmp; it gains no privileges. Options that need capabilities, which a user's service
manager does not have, are left out (systemd.exec(5)). MemoryMax and CPUQuota are policy.toml's.
The secrets of secure sums are in its memory, so that is neither dumped nor swapped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

_UNIT = """\
[Unit]
Description=Anabranch site {name} of {federation}
StartLimitIntervalSec=0

[Service]
ExecStart={command}
WorkingDirectory={folder}
Restart=always
RestartSec=2
TimeoutStopSec=60
UMask=0077
Environment=PYTHONDONTWRITEBYTECODE=1
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths={writable}
PrivateTmp=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
SystemCallArchitectures=native
LimitCORE=0
MemorySwapMax=0
{limits}
[Install]
WantedBy=default.target
"""


def unit(
    folder: Path,
    *,
    name: str,
    federation: str,
    writable: Sequence[Path] = (),
    memory_mb: int | None = None,
    cores: float | None = None,
    python: str = sys.executable,
) -> str:
    """Return the unit. `memory_mb` in MiB and `cores` None: no limit."""
    where = folder.resolve()
    command = [python, "-m", "anabranch.cli.main", "site", "serve", "--folder", str(where)]
    limits = ""
    if memory_mb is not None:
        limits += f"MemoryMax={memory_mb}M\n"
    if cores is not None:
        limits += f"CPUQuota={cores * 100:.0f}%\n"
    return _UNIT.format(
        name=name,
        federation=federation,
        command=" ".join(_quoted(one, "$") for one in command),
        folder=str(where).replace("%", "%%"),
        writable=" ".join(_quoted(str(one)) for one in (where, *writable)),
        limits=limits,
    )


def _quoted(word: str, also: str = "") -> str:
    """Return a word as systemd.syntax(7) reads it back."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    for one in also:
        word = word.replace(one, one * 2)
    return f'"{word}"' if any(c in word for c in " \t'\"\\;") else word
