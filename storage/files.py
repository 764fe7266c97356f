"""Files and folders on a device: there whole or not at all (write, fsync, rename).

Whatever is being written lies under a hidden name in the same folder, so a rename never crosses a
file system; `sweep` removes what a crash left behind.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from anabranch.protocols.errors import RunError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"  # suffix of whatever is being written


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`; after a crash the old file or the new one is there, never a part.

    The file never has more permissions than `mode`. Makes the folder if it is missing.
    """
    with writing(path, mode) as file:
        file.write(data)


@contextmanager
def writing(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path` when the block ends, and vanishes if the block raises.

    Until then it lies under the hidden name `file.name`, readable by its owner alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with temporary.open("r+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty hidden folder that becomes `target` when the block ends.

    If the block raises, the folder vanishes and `target` stays as it was. A `target` that is
    there is replaced: between two renames neither is there, but never a half-written one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    name = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent)
    folder = Path(name)
    try:
        yield folder
        folder.chmod(0o755)
        replace_folder(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def replace_folder(folder: Path, target: Path) -> None:
    """Rename `folder` to `target` on the same file system; the folder that was there is removed.

    Every file of `folder` is on the disk before it is seen under its new name.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.is_symlink():
            _sync_file(path)
    sync_folder(folder)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent))
        target.rename(old / "old")
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(target)
    sync_folder(target.parent)


def sweep(folder: Path) -> list[Path]:
    """Remove what a crash left half-written in `folder`; return what was removed.

    Only for a folder in which nobody else is writing now.
    """
    if not folder.is_dir():
        return []
    found = sorted(folder.glob(f".*{PARTIAL}"))
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return found


@contextmanager
def locked(path: Path, *, busy: str = "") -> Iterator[None]:
    """Let one process at a time read and replace `path`; waits for its turn.

    With `busy` it does not wait: RunError with this text if another process has its turn. The lock
    is advisory, on a hidden file beside `path`, and ends with the process. Where the system has no
    flock, as on Windows, there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path.parent / f".{path.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError:
                raise RunError(busy) from None
        yield
    finally:
        os.close(handle)


def open_to_others(path: Path) -> str:
    """Return the mode of a file that others than its owner may read or change, as 0644; else "".

    Without POSIX modes the answer is "".
    """
    mode = path.stat().st_mode & 0o777
    return f"{mode:04o}" if os.name == "posix" and mode & 0o077 else ""


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex; memory does not grow with the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
