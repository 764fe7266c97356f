"""Memory of a process and all it has started: PSS, so that shared pages count once."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

PERIOD_S = 0.2
MIB = 2**20


def tree_pss(pid: int) -> int:
    """Return the bytes of the process tree now (proportional set size; Linux)."""
    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


class Peak:
    """The largest `tree_pss` while it is open, looked at every PERIOD_S."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(PERIOD_S):
            self.bytes = max(self.bytes, tree_pss(self._pid))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self.bytes = max(self.bytes, tree_pss(self._pid))
