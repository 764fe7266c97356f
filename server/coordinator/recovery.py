"""A coordinator's state, put back from its copy: `anabranch coordinator restore-state`.

`serve` copies the state when it starts, every hour, and whenever the roster changes. A copy may
lack what happened after it: runs proposed since are proposed again, and what a run did it finds in
its own folder. What must not come back does not: every invitation is withdrawn, and a site that
the audit log says was revoked or left stays out. The damaged file is moved aside, never removed.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.identity.audit import read_line
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.state import State
from anabranch.storage.files import write_atomic

OUT = {"revoked": "revoked", "left": "left"}  # kind of line in the audit log -> status


def restore_state(federation: Federation, now: float) -> tuple[Path | None, int]:
    """Put the last copy in the place of the state; return (where the old file is now, sites).

    Raises RunError while a coordinator serves, and ConfigError if there is no copy, or it is
    damaged, too; nothing has changed then.
    """
    with federation.serving():
        if not federation.backup_file.exists():
            raise ConfigError(
                f"{federation.backup_file}: missing. Without a copy of the state nobody knows "
                "which sites are in: make a new federation with `anabranch coordinator init`, "
                "and let them join anew"
            )
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name) / "state.sqlite"
            shutil.copyfile(federation.backup_file, copy)
            state = State(copy)
            state.check()
            state.withdraw_invitations()
            for site, key, status, reason in _gone(federation):
                there = state.site(site)
                if there is not None and there.key == key and there.status == "active":
                    state.set_site(site, status=status, reason=reason)
            sites = sum(1 for one in state.sites() if one.status == "active")
            state.backup(copy.with_suffix(".whole"))
            state.close()
            data = copy.with_suffix(".whole").read_bytes()
        aside = _move_aside(federation.state_file, now)
        write_atomic(federation.state_file, data, 0o600)
        federation.audit.append("state-restored", sites=sites, aside=aside and aside.name)
    return aside, sites


def _gone(federation: Federation) -> list[tuple[str, str, str, str]]:
    """Return (site, key, status, reason) of every site that the audit log says was shut out."""
    if not federation.audit.path.exists():
        return []
    found = []
    with federation.audit.path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break  # a crash cut it; the copy was made before (enrolment.py)
            entry = read_line(line[:-1])
            if entry.kind in OUT:
                values = (entry.fields.get(name) for name in ("site", "key", "reason"))
                site, key, reason = (str(value or "") for value in values)
                found.append((site, key, OUT[entry.kind], reason))
    return found


def _move_aside(file: Path, now: float) -> Path | None:
    aside = file.with_name(f"{file.name}.damaged-{int(now)}")
    for suffix in ("-wal", "-shm", ""):
        if (part := file.with_name(file.name + suffix)).exists():
            part.rename(aside.with_name(aside.name + suffix))
    return aside if aside.exists() else None
