"""A run's progress on disk (server/progress.py): what a coordinator that died goes on from.

    RUN/progress/000012-1-merged.progress       round 12 is merged, its checkpoint may be missing
    RUN/progress/000012-2-evaluated.progress    all of round 12 is done
    RUN/progress/000012-3-masked.progress       and sites give round 13's updates to a sum

The newest two are kept. A file is whole or not there (write, fsync, rename), and it is there
before anything of it is announced. Its bytes:

    magic       19   b"anabranch progress\n"
    N            8   length of the header, u64 little-endian
    header       N   JSON: {"format": 1, "blobs": […], "progress": …}
    blobs            float arrays in C order, and adapters as frames (docs/wire-format.md)
    checksum    32   SHA-256 of everything before it

Values become JSON: numbers and texts as they are; numbers that are not finite, tuples, sets, and
the dataclasses of the rules by a name of the list below, so that reading runs nothing that is not
on it. Arrays keep their type, shape and order in memory, and so the last bit of what is computed
from them.

A file that does not keep its checksum is not used. If it is the newest, the one before it is
taken, where nothing is published twice by that: round 12 is evaluated again, or trained again,
and the sites answer as before. A client-private run does not train a round again, as its noisy
mean may have left; it is refused. So is a file of a newer version, always.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import AnabranchError, RunError
from anabranch.protocols.messages import Evaluated, Trained
from anabranch.server.aggregation.fedex import Carried
from anabranch.server.aggregation.optimizers import Moments, OptimizerState
from anabranch.server.aggregation.private import ClientPrivate
from anabranch.server.aggregation.products import Product
from anabranch.server.exchange import Events
from anabranch.server.flower import Failure
from anabranch.server.progress import Progress
from anabranch.server.result import RoundReport, SiteRow
from anabranch.storage.files import sweep, sync_folder, writing

MAGIC = b"anabranch progress\n"
FORMAT = 1
KEPT = 2
MASKED = "3-masked"
CHECKSUM = 32
DTYPES = frozenset({"<f4", "<f8", "<i8"})

# Everything that a progress is made of, beside numbers, texts, tuples, sets and mappings.
KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Progress, RoundReport, SiteRow, Trained, Evaluated, Failure,
        Carried, Product, OptimizerState, Moments, ClientPrivate,
    )
}  # fmt: skip


class Damaged(Exception):
    """A file does not hold what was written."""


class ProgressFolder:
    """The progress of one run, in the folder `path`."""

    def __init__(
        self,
        path: Path,
        *,
        private: bool = False,
        event: Events = lambda kind, **fields: None,
    ) -> None:
        self.path, self._private, self._event = path, private, event

    def save(self, progress: Progress) -> None:
        """Keep a progress; it is on the disk when this returns. OSError if the disk is full."""
        step = "2-evaluated" if progress.evaluated else "1-merged"
        if progress.masked > progress.round:
            step = MASKED
        self.path.mkdir(parents=True, exist_ok=True)
        with writing(self.path / f"{progress.round:06d}-{step}.progress") as file:
            write(file.write, progress)
        for old in self._files()[KEPT:]:
            old.unlink()

    def load(self) -> Progress | None:
        """Return the last progress; None if nothing was kept yet.

        Raises RunError if it cannot be read and what was kept before it is not enough, or if a
        newer version wrote it.
        """
        sweep(self.path)
        files = self._files()
        if not files:
            return None
        try:
            return read(files[0].read_bytes(), str(files[0]))
        except Damaged as reason:
            return self._before(files, str(reason))

    def _before(self, files: list[Path], reason: str) -> Progress:
        """Return the progress before a damaged one, or raise RunError."""
        bad = files[0]
        text = f"{bad}: {reason}"
        if self._private and bad.stem.endswith("merged"):
            raise RunError(
                f"{text}. The noisy mean of that round may have left already, and is made once: "
                "restore the file from a backup, or plan a new run"
            )
        if len(files) < 2:
            raise RunError(
                f"{text}, and there is none before it: restore it from a backup, or stop the run "
                "and propose it anew"
            )
        try:
            progress = read(files[1].read_bytes(), str(files[1]))
        except Damaged as again:
            raise RunError(
                f"{text}; and {files[1]}: {again}. Restore one of them from a backup, or stop the "
                "run and propose it anew"
            ) from None
        set_aside = bad.with_name(f"{bad.name}.damaged")
        if bad.stem.endswith(MASKED):  # the one thing that was new in it: the name says it, too
            set_aside.write_bytes(bad.read_bytes())
            progress = dataclasses.replace(progress, masked=progress.round + 1)
            self.save(progress)  # in its place
        else:
            bad.replace(set_aside)
        sync_folder(self.path)
        self._event(
            "progress_damaged",
            file=set_aside.name,
            message=reason,
            round=progress.round,
            evaluated=progress.evaluated,
        )
        return progress

    def _files(self) -> list[Path]:
        """Return what was kept, the newest first."""
        return sorted(self.path.glob("[0-9]*.progress"), reverse=True)


def write(put: Callable[[bytes], Any], progress: Progress) -> None:
    """Hand the bytes of a progress to `put`, piece by piece."""
    packing = _Packing()
    tree = packing.pack(progress)
    header = {"format": FORMAT, "blobs": [about for about, _ in packing.blobs], "progress": tree}
    text, checksum = msgspec.json.encode(header), hashlib.sha256()
    pieces = [MAGIC, struct.pack("<Q", len(text)), text, *(data for _, data in packing.blobs)]
    for piece in pieces:
        checksum.update(piece)
        put(piece)
    put(checksum.digest())


def read(data: bytes, source: str) -> Progress:
    """Return the progress in `data`, equal in every bit to the one that was written.

    Raises Damaged if the bytes are not what was written, and RunError for those of a newer
    version, naming `source`.
    """
    body = memoryview(data)[:-CHECKSUM]
    if hashlib.sha256(body).digest() != data[-CHECKSUM:] or len(body) < len(MAGIC) + 8:
        raise Damaged("its checksum does not match: it was damaged or cut")
    if bytes(body[: len(MAGIC)]) != MAGIC:
        raise Damaged("it is no progress of a run")
    start = len(MAGIC) + 8
    (length,) = struct.unpack("<Q", body[len(MAGIC) : start])
    try:
        header = msgspec.json.decode(body[start : start + length])
        version = header["format"]
        if version != FORMAT:
            raise RunError(
                f"{source}: written by a newer version of anabranch (format {version}, this one "
                f"reads {FORMAT}): start the coordinator with that version again"
            )
        progress = _Unpacking(header["blobs"], body[start + length :]).unpack(header["progress"])
    except RunError:
        raise
    except (AnabranchError, ValueError, TypeError, LookupError, struct.error) as error:
        raise Damaged(f"it cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(progress, Progress):
        raise Damaged("it holds something else than a progress")
    return progress


class _Packing:
    """Turns values into JSON, and what JSON cannot hold into blobs."""

    def __init__(self) -> None:
        self.blobs: list[tuple[dict[str, Any], bytes]] = []
        self._adapters: dict[int, Any] = {}  # by identity: the best is often the last

    def pack(self, value: Any) -> Any:
        """Return the JSON of a value; TypeError for one that no progress is made of."""
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, float | np.floating):
            number = float(value)
            bits = {"$": "float", "of": struct.pack("<d", number).hex()}
            return number if math.isfinite(number) else bits
        if isinstance(value, int | np.integer):
            return int(value)
        if isinstance(value, tuple | list):
            return [self.pack(one) for one in value]
        if isinstance(value, frozenset):
            return {"$": "set", "of": sorted(value)}
        if isinstance(value, Adapter):
            return self._adapter(value)
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, Mapping):
            return self._mapping(value)
        return self._fields(value)

    def _mapping(self, value: Mapping[Any, Any]) -> dict[str, Any]:
        if not all(isinstance(key, str) and key != "$" for key in value):
            raise TypeError(f"a progress has no mapping with keys such as {list(value)[:3]}")
        return {key: self.pack(one) for key, one in value.items()}

    def _fields(self, value: Any) -> dict[str, Any]:
        kind = type(value)
        if KINDS.get(kind.__name__) is not kind:
            raise TypeError(f"a progress is not made of {kind.__module__}.{kind.__qualname__}")
        return {"$": kind.__name__} | {n: self.pack(getattr(value, n)) for n in fields_of(kind)}

    def _adapter(self, adapter: Adapter) -> dict[str, Any]:
        if id(adapter) not in self._adapters:
            self._adapters[id(adapter)] = self._blob("adapter", {}, wire.encode(adapter))
        found: dict[str, Any] = self._adapters[id(adapter)]
        return found

    def _array(self, array: np.ndarray[Any, Any]) -> dict[str, Any]:
        if array.dtype.str not in DTYPES:
            raise TypeError(f"a progress has no arrays of {array.dtype}")
        order: Literal["C", "F"] = "F" if array.ndim > 1 and _column_first(array) else "C"
        about = {"dtype": array.dtype.str, "shape": list(array.shape), "order": order}
        return self._blob("array", about, array.tobytes(order))

    def _blob(self, kind: str, about: dict[str, Any], data: bytes) -> dict[str, Any]:
        self.blobs.append(({"kind": kind, "bytes": len(data), **about}, data))
        return {"$": "blob", "of": len(self.blobs) - 1}


class _Unpacking:
    """Turns the JSON and the blobs of a file back into values."""

    def __init__(self, blobs: list[dict[str, Any]], data: memoryview) -> None:
        sizes = [int(about["bytes"]) for about in blobs]
        if min(sizes, default=0) < 0 or sum(sizes) != len(data):
            raise ValueError(f"{sum(sizes)} bytes of arrays are announced, {len(data)} are there")
        starts = np.cumsum([0, *sizes]).tolist()
        self._values = [
            _blob(about, data[start : start + size])
            for about, start, size in zip(blobs, starts, sizes, strict=False)
        ]

    def unpack(self, tree: Any) -> Any:
        """Return the value of a JSON."""
        if isinstance(tree, list):
            return tuple(self.unpack(one) for one in tree)
        if not isinstance(tree, dict):
            return tree
        kind = tree.get("$")
        if kind is None:
            return {key: self.unpack(one) for key, one in tree.items()}
        if kind == "blob":
            return self._values[tree["of"]]
        if kind == "float":
            (number,) = struct.unpack("<d", bytes.fromhex(tree["of"]))
            return number
        if kind == "set":
            return frozenset(tree["of"])
        names = fields_of(KINDS[kind])
        if kind == "Progress":  # one from before there were secure sums
            tree = {"masked": 0} | tree
        if set(names) != tree.keys() - {"$"}:
            raise ValueError(f"{kind}: expected {names}, got {sorted(tree.keys() - {'$'})}")
        return KINDS[kind](**{name: self.unpack(tree[name]) for name in names})


def _blob(about: dict[str, Any], data: memoryview) -> Any:
    if about["kind"] == "adapter":
        return wire.decode_adapter(bytes(data))
    if about["dtype"] not in DTYPES:
        raise ValueError(f"arrays of {about['dtype']}")
    flat = np.frombuffer(bytearray(data), about["dtype"])
    return flat.reshape(about["shape"], order=about["order"])


def fields_of(kind: type[Any]) -> list[str]:
    """Return the names of what a value of this kind is made of."""
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return list(kind.__struct_fields__)


def _column_first(array: np.ndarray[Any, Any]) -> bool:
    """Whether the first index is the fastest in memory, as in a matrix that was transposed."""
    return abs(array.strides[0]) < abs(array.strides[-1])
