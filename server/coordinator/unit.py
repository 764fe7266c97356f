"""The systemd unit of a coordinator: `anabranch coordinator serve --print-unit`.

What the process may do is what it needs: its own folder to write, TCP and Unix sockets, no new
privileges, no devices, no other user's home (systemd.exec(5), systemd.service(5)).
"""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.settings import split_address
from anabranch.storage.audit_check import logs_folder

UNIT = """\
# /etc/systemd/system/anabranch-{name}.service
[Unit]
Description=Anabranch coordinator of {name}
Wants=network-online.target
After=network-online.target time-sync.target

[Service]
Type=exec
User={user}
WorkingDirectory={folder}
ExecStart={python} -m anabranch.cli.main coordinator serve --folder {folder}
Restart=always
RestartSec=2
KillMode=mixed
TimeoutStopSec=60
LimitNOFILE=65536
UMask=0077
Environment=XDG_STATE_HOME={home}

# It writes its own folder and /tmp of its own; everything else is read-only or not there.
ProtectSystem=strict
ReadWritePaths={folder} -{state}
PrivateTmp=yes
PrivateDevices=yes
ProtectHostname=yes
ProtectClock=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectProc=invisible
NoNewPrivileges=yes
CapabilityBoundingSet={capability}
AmbientCapabilities={capability}
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""
LOW_PORT = 1024  # below it a port needs a capability


def unit_of(federation: Federation) -> str:
    """Return the unit that serves this federation as this user."""
    settings = federation.settings
    port = split_address(settings.bind)[1]
    return unit_text(federation.folder, settings.name, port, state=logs_folder().parent)


def unit_text(
    folder: Path, name: str, port: int, *, state: Path, user: str = "", python: str = ""
) -> str:
    """Return the unit of the federation `name` in `folder`, for `user` (default: this one).

    `state` is this user's folder of witnesses, outside the federation's (storage/audit_log.py).
    """
    return UNIT.format(
        name=name,
        folder=_quoted(folder.absolute()),
        state=_quoted(state),
        home=_quoted(state.parent),
        user=user or getpass.getuser(),
        python=_quoted(Path(python or sys.executable)),
        capability="CAP_NET_BIND_SERVICE" if port < LOW_PORT else "",
    )


def _quoted(path: Path) -> str:
    """Return a path as systemd reads it: % doubled, quoted if there is a space in it."""
    text = str(path).replace("%", "%%")
    if any(c in text for c in ' "\\'):
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return text
