"""One supervisor serves a federation's folder: a lock that ends with its process."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anabranch.protocols.errors import RunError

LOCK = ".serving.lock"
TRIES, PAUSE_S = 5, 0.02  # whoever only looks (`served`) holds the lock for less than that


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the folder for the one supervisor; RunError if another process holds it."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _locked(handle):
            raise RunError(
                f"{folder}: a coordinator is serving this federation already; "
                "`anabranch coordinator status` shows what it does"
            )
        yield
    finally:
        os.close(handle)


def served(folder: Path) -> bool:
    """Whether a supervisor holds the folder now."""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _locked(handle: int) -> bool:
    for _ in range(TRIES):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(PAUSE_S)
        else:
            return True
    return False
