"""Files: written whole or not at all (write, fsync, rename); run.toml read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.errors import ConfigError


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; after a crash the old file or the new one is there, never a part.

    The temporary file lies in the same folder, so the rename never crosses a file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_run(path: Path) -> RunConfig:
    """Return the run configuration in `path`; raise ConfigError naming file and field."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}; give the path of a run.toml"
        ) from None
    return parse(data, source=str(path))
