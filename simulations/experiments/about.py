"""experiment.json: what a simulated run's folder is a run of.

    digest   SHA-256 of all that decides the numbers: configuration with its seed, tables, engine,
             device, and every file that is read
    group    the same without the seed: runs of one group are repetitions of each other

Two runs are compared only where they were measured alike: the same labels, the same test and
validation records.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from anabranch.protocols.errors import ConfigError, DataError
from anabranch.storage.files import digest_of, write_atomic

NAME = "experiment.json"


class About(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    name: str  # what the group is called where it is compared
    digest: str
    group: str
    seed: int
    engine: str
    time: Literal["real", "virtual"]  # what the seconds of rounds.csv are
    labels: tuple[str, ...]
    test: str | None  # fingerprint of the records, client/data/records.py
    validation: str | None
    changes: dict[str, Any] = {}  # what a sweep or a trial has set: dotted path -> value
    targets: tuple[float, ...] = ()  # accuracies whose time is asked for


def write_about(folder: Path, about: About) -> None:
    """Write experiment.json."""
    text = msgspec.json.format(msgspec.json.encode(about), indent=2)
    write_atomic(folder / NAME, text + b"\n")


def read_about(folder: Path) -> About:
    """Return what a run folder is a run of; raise ConfigError if it does not say."""
    path = folder / NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=About)
    except OSError:
        raise ConfigError(
            f"{folder}: there is no {NAME}; expected the folder of a run by `anabranch simulate`"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def digest(facts: Mapping[str, Any], files: Iterable[Path]) -> str:
    """Return the SHA-256 of canonical JSON of `facts`, and of the content of `files`.

    Raises DataError for a file that cannot be read.
    """
    whole = {**facts, "files": sorted(content_digest(path) for path in files)}
    return hashlib.sha256(msgspec.json.encode(whole, order="deterministic")).hexdigest()


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's names and contents; a file is read once."""
    try:
        if path.is_dir():
            inner = [
                f"{one.relative_to(path).as_posix()} {content_digest(one)}\n"
                for one in sorted(path.rglob("*"))
                if one.is_file()
            ]
            return hashlib.sha256("".join(inner).encode()).hexdigest()
        stat = path.stat()
        return _digest_of(path.resolve(), stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give the path of a file") from None


@functools.lru_cache(maxsize=4096)
def _digest_of(path: Path, modified_ns: int, size: int) -> str:
    return digest_of(path)
