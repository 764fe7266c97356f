"""A bundle in one file: an uncompressed tar of which there is exactly one for each bundle.

    manifest.json, manifest.sig, then every listed file by name
    each: one ustar header (mode 0644, no owner, no time), the bytes, zeros up to 512
    two blocks of zeros; nothing after them

`unpack` reads it from front to end, takes only what `pack` writes, and verifies the signature
before anything but these two small files is read. Links, devices, folders, pax and GNU headers,
sparse files, paths, names that appear twice and files that the signed manifest does not list
are refused with the rule named; then nothing is left on the disk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import msgspec

from anabranch.edge.runtime import bundle_manifest as names
from anabranch.edge.runtime.bundle import (
    MAX_MANIFEST,
    Bundle,
    open_bundle,
    read_manifest,
    require_current,
    require_exact_files,
)
from anabranch.edge.runtime.bundle_manifest import Manifest
from anabranch.edge.runtime.onnx_file import PLAIN
from anabranch.edge.runtime.trust import MAX_SIGNATURE, remember_version
from anabranch.protocols.errors import AnabranchError, BundleError, DeviceError
from anabranch.protocols.spec import shown
from anabranch.storage.files import staged, writing

BLOCK = 512
CHUNK = 1 << 20
MAX_NAME = 100  # characters in a ustar header
MAX_FILE = 8**11 - 1  # bytes in a ustar header
MAX_BYTES = 8 << 30  # of a bundle, if the caller says nothing else
FIRST = (names.MANIFEST, names.SIGNATURE)
TRICKS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
    b"x": "a pax header",
    b"g": "a pax header",
    b"K": "a GNU long name",
    b"L": "a GNU long name",
    b"S": "a sparse file",
}


def pack(folder: Path, archive: Path) -> None:
    """Write the bundle in `folder` to `archive`; the same bundle gives the same bytes.

    The archive is there whole or not at all. Raises BundleError if the folder does not hold just
    the files of its manifest. The signature is not checked: whoever unpacks does that.
    """
    try:
        data = (folder / names.MANIFEST).read_bytes()
        manifest = msgspec.json.decode(data, type=Manifest)
    except OSError as error:
        raise BundleError(f"{folder}: no bundle ({error.strerror})") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, AnabranchError) as error:
        raise BundleError(f"{folder}: manifest: {error}") from None
    require_exact_files(folder, manifest)
    with writing(archive) as out:
        for name in (*FIRST, *sorted(manifest.files)):
            with (folder / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                out.write(_header(name, size))
                _copy(file, out, size, name)
            out.write(bytes(-size % BLOCK))
        out.write(bytes(2 * BLOCK))


def unpack(
    archive: Path,
    target: Path,
    *,
    trusted: Sequence[bytes],
    versions: Path | None = None,
    max_bytes: int = MAX_BYTES,
) -> Bundle:
    """Take a bundle out of `archive` into the new folder `target`, and return it opened.

    `target` appears when everything is verified, or not at all. Memory does not grow with the
    bundle.

    Raises:
        BundleError: the archive or the bundle breaks a rule, has more than `max_bytes`, is a
            step back for the device's `versions`, or `target` exists.
        DeviceError: the disk is full or cannot be written.
    """
    if target.exists() or target.is_symlink():
        raise BundleError(f"{target} exists already: move it away, or choose another folder")
    try:
        file = archive.open("rb")
    except OSError as error:
        raise BundleError(f"{archive}: cannot be read ({error.strerror})") from None
    try:
        with file, staged(target) as stage:
            _extract(_Reader(file, str(archive)), stage, trusted, versions, max_bytes)
            bundle = open_bundle(stage, trusted=trusted)
            if versions is not None:  # before it is seen: another process may have had a newer one
                manifest = bundle.manifest
                remember_version(versions, manifest.name, manifest.version, bundle.digest)
    except OSError as error:
        raise DeviceError(
            f"{target}: cannot be written ({error.strerror}); make room or choose another disk"
        ) from None
    return replace(bundle, folder=target)


def _extract(
    reader: _Reader, stage: Path, trusted: Sequence[bytes], versions: Path | None, max_bytes: int
) -> None:
    data = reader.small(names.MANIFEST, MAX_MANIFEST)
    signature = reader.small(names.SIGNATURE, MAX_SIGNATURE)
    manifest = read_manifest(data, signature, trusted)
    if versions is not None:
        require_current(manifest, data, versions)
    total = sum(file.bytes for file in manifest.files.values())
    if total > max_bytes:
        raise BundleError(f"sizes: the bundle has {total} bytes, at most {max_bytes} are allowed")
    free = shutil.disk_usage(stage).free
    if total > free:
        raise DeviceError(f"{stage.parent}: the bundle needs {total} bytes, {free} are free")
    (stage / names.MANIFEST).write_bytes(data)
    (stage / names.SIGNATURE).write_bytes(signature)
    for name in sorted(manifest.files):
        expected = manifest.files[name]
        reader.enter(name, expected.bytes)
        with (stage / name).open("xb") as out:
            digest = reader.copy(out, expected.bytes)
        if digest != expected.sha256:
            raise BundleError(f"digests: {name} is not the file that was signed")
    reader.finish()


class _Reader:
    """Reads what `pack` writes, one file after the other, and refuses everything else."""

    def __init__(self, file: BinaryIO, what: str) -> None:
        self._file = file
        self._what = what
        self._seen: set[str] = set()

    def small(self, name: str, limit: int) -> bytes:
        """Return the whole content of the next file, which must be `name`."""
        size = self.enter(name, None)
        if size > limit:
            raise BundleError(f"{self._what}: {name} has {size} bytes, at most {limit} are read")
        data = self._exactly(size)
        self._padding(size)
        return data

    def enter(self, name: str, size: int | None) -> int:
        """Read the header of the next file, which must be `name`; return its size."""
        block = self._exactly(BLOCK)
        if not any(block):
            raise BundleError(f"{self._what}: ends before {name}")
        got, bytes_ = self._member(block)
        if got != name:
            raise BundleError(f"{self._what}: {shown(got)} stands where {name} is expected")
        if size is not None and bytes_ != size:
            raise BundleError(f"sizes: {name} has {bytes_} bytes, expected {size}")
        if block != _header(name, bytes_):
            raise BundleError(f"{self._what}: the header of {name} is not as pack writes it")
        return bytes_

    def copy(self, out: BinaryIO, size: int) -> str:
        """Copy the content of the file just entered; return its SHA-256."""
        digest = hashlib.sha256()
        left = size
        while left:
            part = self._exactly(min(left, CHUNK))
            digest.update(part)
            out.write(part)
            left -= len(part)
        self._padding(size)
        return digest.hexdigest()

    def finish(self) -> None:
        """Refuse anything but the two blocks of zeros at the end."""
        block = self._exactly(BLOCK)
        if any(block):
            name, _ = self._member(block)
            raise BundleError(f"{self._what}: {shown(name)} is not listed in the manifest")
        if any(self._exactly(BLOCK)) or self._file.read(1):
            raise BundleError(f"{self._what}: something follows the end of the archive")

    def _member(self, block: bytes) -> tuple[str, int]:
        """Return name and size in a header, or name the trick that it plays."""
        name = block[:MAX_NAME].rstrip(b"\0").decode("latin-1")
        kind = block[156:157]
        if kind in TRICKS:
            raise BundleError(f"{self._what}: {shown(name)} is {TRICKS[kind]}")
        if kind != tarfile.REGTYPE:
            raise BundleError(f"{self._what}: {shown(name)} is no regular file")
        if name.startswith("/") or name[1:2] == ":":
            raise BundleError(f"{self._what}: {shown(name)} is an absolute path")
        if ".." in name.replace("\\", "/").split("/"):
            raise BundleError(f"{self._what}: {shown(name)} leads out of the folder")
        if "/" in name or "\\" in name or any(block[345:500]):
            raise BundleError(f"{self._what}: {shown(name)} is a path, expected a plain name")
        if not PLAIN.fullmatch(name):
            raise BundleError(f"{self._what}: {shown(name)} is no plain name")
        if name in self._seen:
            raise BundleError(f"{self._what}: {name} appears twice")
        self._seen.add(name)
        digits = block[124:135]
        if not digits.isdigit() or b"8" in digits or b"9" in digits:
            raise BundleError(f"{self._what}: the size of {name} is no octal number")
        return name, int(digits, 8)

    def _padding(self, size: int) -> None:
        if any(self._exactly(-size % BLOCK)):
            raise BundleError(f"{self._what}: something hides between two files")

    def _exactly(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise BundleError(f"{self._what}: ends too early; fetch it again")
        return data


def _header(name: str, size: int) -> bytes:
    """Return the one ustar header of a file."""
    if len(name) > MAX_NAME or not PLAIN.fullmatch(name) or size > MAX_FILE:
        raise BundleError(
            f"{shown(name)} of {size} bytes: an archive holds plain names of at most {MAX_NAME} "
            f"characters, and files of at most {MAX_FILE} bytes"
        )
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def _copy(file: BinaryIO, out: BinaryIO, size: int, name: str) -> None:
    left = size
    while left:
        part = file.read(min(left, CHUNK))
        if not part:
            raise BundleError(f"sizes: {name} shrank while it was packed")
        out.write(part)
        left -= len(part)
