"""Rounds on demand: an engine's own loop stops at the end of each round until it is asked on.

    parent: {} ─► one round ─► {"seconds": …, "cpu": …} ─► parent asks another engine …

So engines that each run a loop of their own (pfl, Flower's Simulation Runtime, ours) take turns
round by round, and what else the machine does hits all of them. The clock stands still between
rounds. Standard output is the gate's alone: what libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil


class Gate:
    """The worker's side: `begin` before the first round of a job, `lap` after each."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._loss_round = self._round = 0
        self._wall = self._cpu = 0.0

    def begin(self, loss_round: int = 0) -> None:
        """Say that all is ready, and wait for the first round to be asked for.

        The loss is computed after round `loss_round`, with the clock stopped.
        """
        self._loss_round, self._round = loss_round, 0
        self._send({"ready": True})
        self._wait()

    def lap(self, loss: Callable[[], float], *, last: bool = False) -> None:
        """Report a round, and wait until the next one is asked for, unless it was the last."""
        took = {"seconds": time.perf_counter() - self._wall, "cpu": tree_cpu() - self._cpu}
        self._round += 1
        self._send(took | ({"loss": loss()} if self._round == self._loss_round else {}))
        if not last:
            self._wait()

    def _send(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit("nobody asks for rounds any more")
        self._cpu = tree_cpu()
        self._wall = time.perf_counter()


def tree_cpu() -> float:
    """Return the CPU seconds of this process and all it has started that still live."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
