"""What this process may use of its machine: Linux's cgroups (v2, and v1's memory) count.

A limit holds for a group and all groups within it, so the smallest on the way to the root counts:

    cores    min(CPUs of the affinity mask, quota / period of cpu.max)
    memory   min(MemAvailable, memory.max − what is in use and cannot be dropped)

Source: Documentation/admin-guide/cgroup-v2.rst of Linux. Elsewhere memory is not known (None).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def cores(root: Path = ROOT) -> float:
    """Return how many CPUs this process may use at once; a quota makes it a fraction."""
    affinity = getattr(os, "sched_getaffinity", None)
    found = float(os.cpu_count() or 1) if affinity is None else float(len(affinity(0)))
    for group in _groups(root):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.strip().isdigit() and int(period):
            found = min(found, int(quota) / int(period))
    return found


def memory_bytes(root: Path = ROOT) -> int | None:
    """Return how much memory this process may still take; None: not known here."""
    found = [left for group in _groups(root) if (left := _left(group)) is not None]
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            found.append(int(value.split()[0]) * 1024)
    return min(found, default=None)


def _left(group: Path) -> int | None:
    """Return what is left of a group's memory; pages of files count as left."""
    for limit, used, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, now = _text(group / limit).strip(), _text(group / used).strip()
        if not (most.isdigit() and now.isdigit()):
            continue
        rows = (line.split() for line in _text(group / "memory.stat").splitlines())
        stat = {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
        return max(0, int(most) - int(now) + stat.get(droppable, 0))
    return None


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's cgroups, innermost first, up to the root."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        at = top / path.strip().lstrip("/")
        while at != top and at.is_relative_to(top):
            yield at
            at = at.parent
        yield top


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
