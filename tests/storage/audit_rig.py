"""An audit log in a folder, for tests."""

from __future__ import annotations

from pathlib import Path

from anabranch.storage.audit_check import logs_folder, opening_at
from anabranch.storage.audit_log import AuditLog


def log_in(folder: Path) -> AuditLog:
    return AuditLog(folder / "audit.jsonl", folder / "audit.key", "site a of b")


def written(folder: Path, lines: int = 5) -> AuditLog:
    log = log_in(folder)
    for number in range(lines):
        log.append("run-approved", run=f"r{number}", epsilon=number / 2)
    return log


def second_witness(log: AuditLog) -> Path:
    return logs_folder() / f"{opening_at(log.path).log}.head"


def without_witnesses(log: AuditLog) -> None:
    second_witness(log).unlink()
    log.path.with_suffix(".head").unlink()
