"""What must not get to a disk: the memory of a process that takes part in secure sums.

    no core file       RLIMIT_CORE 0, which the processes that it starts inherit
    no reading of it   Linux: PR_SET_DUMPABLE 0 (prctl(2)). No core dump goes to a pipe either
                       (systemd-coredump), and another process of the same user cannot attach, nor
                       read /proc/<pid>/mem. A process that it starts is its own again.

Root reads everything. Neither keeps memory from being swapped: docs/secure-aggregation.md says what
does. For a debugger or profiler of the same user start the process with ANABRANCH_DUMPABLE=1.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

DUMPABLE = "ANABRANCH_DUMPABLE"
PR_SET_DUMPABLE = 4

log = logging.getLogger(__name__)


def forbid_dumps() -> None:
    """Keep the memory of this process out of files, as far as the system can; once is enough."""
    if os.environ.get(DUMPABLE) == "1":
        log.warning("%s=1: secrets of secure sums may be in a core dump of this process", DUMPABLE)
        return
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
            why = os.strerror(ctypes.get_errno())
            log.warning("this process stays dumpable (%s): a core dump may hold secrets", why)
