"""What of a run may be taken away: `anabranch coordinator export RUN TARGET`.

    run.toml  summary.json  report.html  events.jsonl  checkpoints/  release/     as in the run's
    proposal.json                                       the proposal with its author's signature
    audit.jsonl                                         the audit log's lines about this run
    audit.pub                                           the public key that signed them

Only what is named here is copied: no key, no token, no progress, nothing of other runs. Lines of
the audit log are copied byte for byte; each carries its own signature, the chain is in the whole
log. With [client_privacy] events and audit lines tell who took part, so they stay here
(docs/client_privacy.md).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from anabranch.protocols.config import parse
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.identity.audit import read_line
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.proposing import existing
from anabranch.storage.files import staged, write_atomic

FILES = ("run.toml", "summary.json", "report.html")
FOLDERS = ("checkpoints", "release")
OWN_VIEW = "events.jsonl"  # who was asked, who answered


def export(federation: Federation, run: str, target: Path) -> list[str]:
    """Copy what may be taken away of a run to the new folder `target`; return the files' names.

    The folder is there whole or not at all. Raises ConfigError if there is no such run, nothing of
    it yet, or `target` has something in it.
    """
    entry = existing(federation, run)
    source = federation.run_folder(entry.run)
    if not (source / "run.toml").is_file():
        raise ConfigError(f"run {entry.run}: {entry.state}; there is nothing to export yet")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: not an empty folder; name another")
    published = parse(entry.toml, source=entry.run).client_privacy is not None
    with staged(target) as folder:
        for name in (*FILES, *(() if published else (OWN_VIEW,))):
            if (source / name).is_file() and not (source / name).is_symlink():
                shutil.copyfile(source / name, folder / name)
        for name in FOLDERS:
            if (source / name).is_dir() and not (source / name).is_symlink():
                shutil.copytree(source / name, folder / name, ignore=_links)
        signed = msgspec.json.format(entry.signed.encode(), indent=2)
        write_atomic(folder / "proposal.json", signed + b"\n")
        if not published:
            write_atomic(folder / "audit.jsonl", audit_lines(federation, entry.run))
        write_atomic(folder / "audit.pub", federation.audit.public_key.encode() + b"\n")
        files = sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )
    federation.audit.append("exported", run=entry.run, files=len(files))
    return files


def audit_lines(federation: Federation, run: str) -> bytes:
    """Return the lines of the audit log that are about a run, byte for byte."""
    if not federation.audit.path.exists():
        return b""
    with federation.audit.path.open("rb") as file:
        return b"".join(
            line
            for line in file
            if line.endswith(b"\n") and read_line(line[:-1]).fields.get("run") == run
        )


def _links(folder: str, names: list[str]) -> list[str]:
    """Return the names that are links: what they lead to is no part of a run."""
    return [name for name in names if (Path(folder) / name).is_symlink()]
