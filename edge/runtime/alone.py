"""One process works for one device: a lock in its folder that ends with the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from anabranch.edge.runtime.home import Home
from anabranch.protocols.errors import DeviceError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second agent away
    fcntl = None  # type: ignore[assignment]


@contextmanager
def only_one(home: Home) -> Iterator[None]:
    """Keep other processes from working for the same device; the lock ends with the process."""
    home.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(home.folder / ".agent.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DeviceError(
                f"{home.folder}: another process works for this device; stop it first"
            ) from None
        yield
    finally:
        os.close(handle)
