"""What a process may use: the smallest limit of its cgroups on the way to the root."""

from __future__ import annotations

import os
from pathlib import Path

from anabranch.client.agent.machine import cores, memory_bytes

OWN = float(len(os.sched_getaffinity(0)))


def machine(root: Path, files: dict[str, str], group: str = "0::/a/b") -> Path:
    """Write what Linux would show."""
    for name, text in ({"proc/self/cgroup": group + "\n"} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_cgroups_the_affinity_mask_counts(tmp_path: Path) -> None:
    assert cores(tmp_path) == OWN
    assert memory_bytes(tmp_path) is None


def test_the_smallest_quota_on_the_way_to_the_root_counts(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    root = machine(
        tmp_path,
        {
            f"{top}/cpu.max": "max 100000",
            f"{top}/a/cpu.max": "25000 100000",
            f"{top}/a/b/cpu.max": "50000 100000",
            f"{top}/c/cpu.max": "1000 100000",  # of somebody else
        },
    )
    assert cores(root) == 0.25


def test_no_quota_is_no_limit(tmp_path: Path) -> None:
    assert cores(machine(tmp_path, {"sys/fs/cgroup/a/b/cpu.max": "max 100000"})) == OWN


def test_memory_is_the_smallest_rest_and_files_do_not_count_as_used(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/a"
    files = {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n",
        f"{top}/memory.max": "max",
        f"{top}/memory.current": "5",
        f"{top}/b/memory.max": "3000000",
        f"{top}/b/memory.current": "2500000",
        f"{top}/b/memory.stat": "anon 7\ninactive_file 1000000\n",
    }
    assert memory_bytes(machine(tmp_path / "limited", files)) == 1_500_000
    files[f"{top}/b/memory.max"] = "max"
    assert memory_bytes(machine(tmp_path / "free", files)) == 8000 * 1024


def test_more_used_than_allowed_is_nothing_left(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/a/b"
    files = {f"{top}/memory.max": "10", f"{top}/memory.current": "20"}
    assert memory_bytes(machine(tmp_path, files)) == 0


def test_the_first_version_of_cgroups_is_read_too(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory/a"
    files = {f"{top}/memory.limit_in_bytes": "100", f"{top}/memory.usage_in_bytes": "30"}
    assert memory_bytes(machine(tmp_path, files, group="4:memory:/a")) == 70


def test_this_machine_has_some_of_both() -> None:
    left = memory_bytes()
    assert left is not None
    assert left > 0
    assert 0 < cores() <= OWN
