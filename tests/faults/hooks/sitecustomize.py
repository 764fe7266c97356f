"""Ends a process of the product by SIGKILL at an exact write: a crash at that very step.

On the path of a process under test (PYTHONPATH). Whoever wants a kill puts a file
$ANABRANCH_KILLS/<role> with a number n: the process of that role dies just before the n-th time
from then on that it would put something on the disk for good (a rename, or an fsync). The file is
removed first, so each is one kill. Roles: supervisor, superlink, door, page, run, site-<folder>.
"""

from __future__ import annotations

import os
import signal
import sys

_FOLDER = os.environ.get("ANABRANCH_KILLS", "")
_MODULES = {
    "anabranch.server.coordinator.superlink_server": "superlink",
    "anabranch.server.coordinator.door_server": "door",
    "anabranch.server.coordinator.page.server": "page",
    "anabranch.server.coordinator.running": "run",
}


def _role() -> str:
    words = sys.orig_argv
    for word in words:
        if word in _MODULES:
            return _MODULES[word]
    if "coordinator" in words and "serve" in words:
        return "supervisor"
    if "site" in words and "serve" in words:
        return f"site-{os.path.basename(words[-1])}"
    return ""


def _arm(plan: str) -> None:
    left = [0]

    def step() -> None:
        if not left[0]:
            try:
                with open(plan) as file:
                    left[0] = int(file.read() or "0")
            except (FileNotFoundError, ValueError):
                return
            if not left[0]:
                return
        left[0] -= 1
        if not left[0]:
            os.unlink(plan)
            os.kill(os.getpid(), signal.SIGKILL)

    def hooked(name):  # type: ignore[no-untyped-def]
        real = getattr(os, name)

        def call(*arguments, **keywords):  # type: ignore[no-untyped-def]
            step()
            return real(*arguments, **keywords)

        setattr(os, name, call)

    for name in ("replace", "rename", "fsync"):
        hooked(name)


if _FOLDER and (_mine := _role()):
    _arm(os.path.join(_FOLDER, _mine))
