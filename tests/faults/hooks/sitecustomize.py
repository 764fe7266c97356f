"""Ends a process by SIGKILL at an exact step, sets its clock off, or makes it another version.

On the path of a process under test (PYTHONPATH).

Kills. Whoever wants one puts a file $ANABRANCH_KILLS/<role> with "N LABEL": the process of that
role dies at its N-th step from then on whose label begins with LABEL ("": any write). The file is
removed first, so each is one kill. Roles: supervisor, superlink, door, page, run, site-<folder>.

    rename PATH    about to put a whole file or folder in its place     renamed PATH    just done
    fsync PATH     about to make an open file's bytes last              fsynced PATH    just done
    call NAME      about to enter a function of POINTS                  called NAME     has returned

A label is matched with what is named, where "*" is any text. Folders are given from the
federation's or the site's folder on.

Version. With $ANABRANCH_OTHER_VERSION this process takes its software for that version, with
other sources.

Clock. $ANABRANCH_SKEW_S seconds are added to what this process takes for the time of day.
(OpenSSL asks the system itself, so that the dates of certificates are compared with the real one.)
"""

# mypy: ignore-errors
# It puts itself in front of functions of other modules while they are imported.
from __future__ import annotations

import datetime
import fnmatch
import functools
import importlib.abc
import importlib.machinery
import os
import signal
import sys

_FOLDER = os.environ.get("ANABRANCH_KILLS", "")
_VERSION = os.environ.get("ANABRANCH_OTHER_VERSION", "")
_CODE = "anabranch.client.policy.code"
_DATE = "flwr.supercore.date"  # what Flower takes for now
_SKEW = float(os.environ.get("ANABRANCH_SKEW_S", "0"))
_MODULES = {
    "anabranch.server.coordinator.superlink_server": "superlink",
    "anabranch.server.coordinator.door_server": "door",
    "anabranch.server.coordinator.page.server": "page",
    "anabranch.server.coordinator.running": "run",
}
POINTS = {
    "anabranch.client.agent.work": ("Told.admit", "Told.train", "Told.secure"),
    "anabranch.client.fleet": ("Fleet._pull", "Fleet.fetch", "Fleet._announce", "Fleet._push"),
    "anabranch.client.tuning.checkpoint": ("Steps.after",),
    "anabranch.server.coordinator.watching": ("Patience.require_wanted",),
    "anabranch.server.exchange": ("Exchange._take",),
    "anabranch.server.mailbox": ("Mailbox.send",),
    "anabranch.server.superlink": ("SuperLinkGrid.begin",),
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


class _Plan:
    """The kill that is planned for this process, if there is one."""

    def __init__(self, file: str) -> None:
        self.file, self.left, self.label = file, 0, ""

    def step(self, label: str) -> None:
        if not self.left:
            try:
                with open(self.file) as file:
                    number, _, self.label = file.read().partition(" ")
                self.left = int(number or "0")
            except (FileNotFoundError, ValueError):
                return
        if self.label:
            wanted = fnmatch.fnmatchcase(label, f"{self.label}*")
        else:
            wanted = label.startswith(("rename ", "fsync "))
        self.left -= wanted
        if wanted and not self.left:
            os.unlink(self.file)
            os.kill(os.getpid(), signal.SIGKILL)


def _writes(plan: _Plan) -> None:
    def hooked(name, done, where):
        real = getattr(os, name)

        def call(*arguments, **keywords):
            what = where(*arguments)
            plan.step(f"{'fsync' if name == 'fsync' else 'rename'} {what}")
            result = real(*arguments, **keywords)
            plan.step(f"{done} {what}")
            return result

        setattr(os, name, call)

    def opened(handle):
        try:
            number = handle if isinstance(handle, int) else handle.fileno()
            return os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            return ""

    for name in ("replace", "rename"):
        hooked(name, "renamed", lambda source, target, *rest: os.fspath(target))
    hooked("fsync", "fsynced", opened)


class _Points(importlib.abc.MetaPathFinder):
    """Wraps the functions of POINTS when their modules are imported."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan

    def find_spec(self, name, path, target=None):
        if name not in POINTS and name not in (_CODE, _DATE):
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                load = spec.loader.exec_module
                spec.loader.exec_module = functools.partial(self._load, load)
                return spec
        return None

    def _load(self, load, module):
        load(module)
        if module.__name__ == _DATE:
            now, off = module.now, datetime.timedelta(seconds=_SKEW)
            module.now = lambda: now() + off
        if module.__name__ == _CODE and _VERSION:
            module.HEADING += _VERSION.encode()
            module.version = lambda: _VERSION
        for point in POINTS.get(module.__name__, ()):
            kind, _, name = point.rpartition(".")
            holder = getattr(module, kind)
            setattr(holder, name, self._wrapped(point, getattr(holder, name)))

    def _wrapped(self, point, real):
        @functools.wraps(real)
        def call(*arguments, **keywords):
            self.plan.step(f"call {point}")
            result = real(*arguments, **keywords)
            self.plan.step(f"called {point}")
            return result

        return call


def _skew(seconds: float) -> None:
    import time

    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + seconds
    time.time_ns = lambda: real_ns() + int(seconds * 1e9)


if _FOLDER and (_mine := _role()):
    _planned = _Plan(os.path.join(_FOLDER, _mine))
    _writes(_planned)
    sys.meta_path.insert(0, _Points(_planned))
if _SKEW and _role():
    _skew(_SKEW)
