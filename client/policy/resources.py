"""What a process takes of a machine, and how it is held to less."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

STATM = Path("/proc/self/statm")  # proc(5): size resident shared …, in pages
MIB = 1 << 20


def resident_bytes() -> int:
    """Return the memory that this process holds now; where no system says it, the most it held."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return _peak_bytes()


def hold_to_cores(cores: int | None) -> None:
    """Let torch compute on at most so many cores; None: on as many as it began with."""
    if cores is None and "torch" not in sys.modules:
        return
    import torch  # here and not above: a site's owner looks at the policy without it

    began = _threads_at_start()
    wanted = began if cores is None else min(began, cores)
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)


@functools.cache
def _threads_at_start() -> int:
    import torch

    return torch.get_num_threads()


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # not a POSIX system: no limit can be kept, and none is claimed
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
