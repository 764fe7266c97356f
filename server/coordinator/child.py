"""Processes of a coordinator live as long as their supervisor."""

from __future__ import annotations

import os
import sys
import threading

FINISHED, STOPPED, FAILED, AGAIN = 0, 3, 4, 5  # exit codes of a run's process (running.py)


def end_with_parent() -> None:
    """End this process when its standard input does: the supervisor holds the other end.

    A supervisor that was killed cannot tell its children; the kernel closes its pipes for it.
    """

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()
