"""What a sum needs between two processes: a node of Flower starts one for each message.

    <memory>/anabranch-<uid>/<place>   Left: one participant's part in the sum that is under way

The secrets of a sum are never on a disk. So this lies in memory that the system shows as a folder
(tmpfs), for its owner alone: a machine that is started anew has forgotten it, and the site is a
dropout, as a long-lived process is that was killed. It is written before an answer leaves, so no
stage is answered twice in two ways. It goes with the last answer; if that is never asked for, with
the first message of any kind, of any run, after the sum is over by its deadlines (`sweep`).
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.secagg.member import Paused
from anabranch.protocols.secagg.messages import STAGES
from anabranch.storage.files import locked, write_atomic

MOUNTS = Path("/proc/self/mounts")
SHARED = Path("/dev/shm")
IN_MEMORY = frozenset({"tmpfs", "ramfs"})
TORN_S = 600.0  # a file that cannot be read, and is older, is not being written any more
LONGER_S = 60.0  # that a sum may take beyond the deadlines of its stages


class Left(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A participant's part in a sum (participant.py), with its secrets."""

    member: Paused
    about: Assignment
    rank: int
    advertised: int
    over: tuple[str, ...]
    until: float  # of the monotonic clock, one for all processes: the sum is over then

    def __repr__(self) -> str:
        return f"Left({self.member!r})"


class _Until(msgspec.Struct):
    until: float


def longest(config: RunConfig) -> float:
    """Return the seconds after an invitation by which its sum is over, whatever became of it."""
    secure = config.secure_aggregation
    return LONGER_S + (0.0 if secure is None else len(STAGES) * secure.deadline_s)


class Between(Protocol):
    """Where one process leaves its part in a sum, and the next one finds it."""

    @property
    def many(self) -> bool:
        """Whether there is more than one process."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one that answers a stage, while the block lasts."""

    def read(self) -> Left | None:
        """Return what was left; None: there is no sum. Raises RunError if it cannot be read."""

    def write(self, left: Left | None) -> None:
        """Leave it, or None. Raises RunError if that cannot be done."""


class OneProcess:
    """Of a long-lived process: it has its sum in its own memory."""

    many = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Do nothing."""
        yield

    def read(self) -> Left | None:
        """Return None."""
        return None

    def write(self, left: Left | None) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class InMemoryFile:
    """Of a process per message."""

    path: Path

    many = True

    @classmethod
    def of(cls, place: str) -> InMemoryFile:
        """Return the file of `place` (a site's folder, and a run). Raises ConfigError if none."""
        return cls(own_folder(memory()) / hashlib.sha256(place.encode()).hexdigest())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one that answers a stage, while the block lasts."""
        with locked(self.path):
            yield

    def read(self) -> Left | None:
        """Return what was left; None: there is no sum. Raises RunError if it cannot be read."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Left)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(
                f"the site's part in a secure sum cannot be read ({error.strerror}): it is lost to "
                "this sum"
            ) from None
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise RunError(
                "the site's part in a secure sum is damaged: it is lost to this sum"
            ) from None

    def write(self, left: Left | None) -> None:
        """Leave it, or None. Raises RunError if that cannot be done."""
        try:
            if left is None:
                self.path.unlink(missing_ok=True)
            else:
                write_atomic(self.path, msgspec.json.encode(left), 0o600)
        except OSError as error:
            raise RunError(
                f"the site's part in a secure sum cannot be kept in memory ({error.strerror}): it "
                "is lost to this sum"
            ) from None


def memories(mounts: Path = MOUNTS) -> tuple[Path, ...]:
    """Return the folders of this machine that are memory; the environment's comes first."""
    wanted = [os.environ.get("XDG_RUNTIME_DIR", ""), str(SHARED)]
    try:
        kinds = {line.split()[1]: line.split()[2] for line in mounts.read_text().splitlines()}
    except (OSError, IndexError):
        kinds = {}
    found = []
    for name in filter(None, wanted):
        folder = Path(name).resolve()
        mount = next((str(p) for p in (folder, *folder.parents) if str(p) in kinds), "")
        if kinds.get(mount) in IN_MEMORY and os.access(folder, os.W_OK | os.X_OK):
            found.append(folder)
    return tuple(found)


def memory(mounts: Path = MOUNTS) -> Path:
    """Return the first of them. Raises ConfigError if there is none."""
    for folder in memories(mounts):
        return folder
    raise ConfigError(
        "secure sums keep their secrets in memory, and Flower starts a process for each message "
        f"here: neither $XDG_RUNTIME_DIR nor {SHARED} is a folder in memory (tmpfs) that this user "
        "may write to. Join with `anabranch site join`: `anabranch site serve` is one process"
    )


def sweep() -> None:
    """Remove what sums that are over have left, wherever this user has a folder for that.

    A process before this one may have had another environment.
    """
    for here in memories():
        with suppress(ConfigError):  # it is raised again for whoever takes part in a sum
            if _folder_in(here).exists():
                own_folder(here)


def own_folder(memory: Path) -> Path:
    """Return this user's folder there, without what is over. Raises ConfigError if it is not."""
    folder = _folder_in(memory)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ConfigError(
                f"{folder}: secrets of secure sums are kept there, and it is not a folder for this "
                "user alone: remove it"
            )
        for file in folder.iterdir():
            if _over(file):
                _remove(file)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}: secure sums need it") from None
    return folder


def _folder_in(memory: Path) -> Path:
    return memory / f"anabranch-{os.getuid()}"


def _remove(file: Path) -> None:
    """Remove what is over, if nobody has put a new sum in its place or is about to."""
    if file.name.startswith("."):  # half-written: what is put in place has another name
        file.unlink(missing_ok=True)
        return
    with suppress(RunError), locked(file, busy="another process answers a stage of it"):
        if _over(file):
            file.unlink(missing_ok=True)


def _over(file: Path) -> bool:
    """Return whether no sum needs a file any more. A lock has no secret, and may be held."""
    if file.suffix == ".lock":
        return False
    try:
        return time.monotonic() > msgspec.json.decode(file.read_bytes(), type=_Until).until
    except FileNotFoundError:  # another node's process has put it in its place, or was done with it
        return False
    except (msgspec.DecodeError, UnicodeDecodeError):
        with suppress(FileNotFoundError):
            return time.time() - file.lstat().st_mtime > TORN_S
        return False
