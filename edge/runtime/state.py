"""The state of a training on disk, so that a kill at any step costs some steps and no bit.

One file, replaced as a whole (write, fsync, rename):

    offset  size  field
    0       4     magic  b"ABT1"
    4       4     N: length of the header, u32 little-endian
    8       N     header, JSON: {"about": {what: value}, "step": n, "arrays": [[name, shape], …]}
    8+N     8 n   loss of every step so far, float64, little-endian
            …     the arrays in their order, float32, little-endian
    end−32  32    SHA-256 of everything before it

`about` says what the state belongs to: bundle, engine, precision, records, start adapter and
configuration. A state of something else is not used; a damaged one is refused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from anabranch.edge.runtime.engine import Floats
from anabranch.protocols.errors import DeviceError
from anabranch.storage.files import write_atomic

FILE = "training.state"
MAGIC = b"ABT1"
DIGEST_BYTES = 32
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    about: dict[str, str]
    step: Size
    arrays: tuple[tuple[str, tuple[Size, ...]], ...]


@dataclass(frozen=True, eq=False)
class State:
    """A training after `step` steps."""

    about: Mapping[str, str]
    step: int
    losses: NDArray[np.float64]  # (step,)
    arrays: Mapping[str, Floats]


def save(folder: Path, state: State) -> None:
    """Replace the state in `folder`; after a crash the old one or the new one is there.

    Raises DeviceError if the disk does not take it.
    """
    shapes = tuple((name, tuple(a.shape)) for name, a in state.arrays.items())
    head = msgspec.json.encode(_Header(about=dict(state.about), step=state.step, arrays=shapes))
    parts = [MAGIC, len(head).to_bytes(4, "little"), head, state.losses.astype("<f8").tobytes()]
    parts += [np.ascontiguousarray(a).astype("<f4").tobytes() for a in state.arrays.values()]
    data = b"".join(parts)
    try:
        write_atomic(folder / FILE, data + hashlib.sha256(data).digest(), mode=0o600)
    except OSError as error:
        raise DeviceError(
            f"{folder / FILE}: cannot be written ({error.strerror or error}); free some space"
        ) from None


def read(folder: Path) -> State | None:
    """Return the state in `folder`, None if there is none.

    Raises DeviceError for a file that is not, to the last bit, what `save` wrote.
    """
    path = folder / FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DeviceError(f"{path}: cannot be read ({error.strerror or error})") from None
    size = int.from_bytes(data[4:8], "little")
    if len(data) < 8 + DIGEST_BYTES or data[:4] != MAGIC:
        _refuse(path)
    if hashlib.sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
        _refuse(path)
    try:
        header = msgspec.json.decode(data[8 : 8 + size], type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError):
        _refuse(path)
    count = sum(math.prod(shape) for _, shape in header.arrays)
    if len(data) != 8 + size + 8 * header.step + 4 * count + DIGEST_BYTES:
        _refuse(path)
    return _arrays(header, data, 8 + size)


def discard(folder: Path) -> None:
    """Remove the state in `folder`, if there is one."""
    (folder / FILE).unlink(missing_ok=True)


def difference(expected: Mapping[str, str], got: Mapping[str, str]) -> str | None:
    """Return the first thing in which a state is of something else, or None."""
    for what in sorted(expected.keys() | got.keys()):
        if expected.get(what) != got.get(what):
            return what
    return None


def _arrays(header: _Header, data: bytes, at: int) -> State:
    losses = np.frombuffer(data, "<f8", header.step, at).astype(np.float64)
    at += 8 * header.step
    arrays = {}
    for name, shape in header.arrays:
        count = math.prod(shape)
        arrays[name] = np.frombuffer(data, "<f4", count, at).astype(np.float32).reshape(shape)
        at += 4 * count
    return State(header.about, header.step, losses, arrays)


def _refuse(path: Path) -> NoReturn:
    raise DeviceError(
        f"{path}: damaged (its SHA-256 does not match); delete the file to train from the start"
    ) from None
