"""Which software is installed here, as one digest; and the thin Flower app that names it.

    code digest   SHA-256 of a heading, the version, and every source of SOURCES in order:
                  path ‖ length ‖ contents
    app bundle    what Flower calls a FAB: pyproject.toml and README.md in a zip, no code at all
    app hash      SHA-256 of the bundle

A source is a *.py or a file of package data (DATA) below anabranch.protocols, anabranch.storage
or anabranch.client: what touches records at a site. Where it is installed, when it was written
and what was compiled from it do not matter. Flower insists on a bundle with every run; a site
never unpacks it and compares its hash alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

SOURCES = ("anabranch.client", "anabranch.protocols", "anabranch.storage")
DATA = frozenset({".py", ".typed", ".html", ".toml", ".proto", ".csv"})
HEADING = b"anabranch code 1\0"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can name


def version() -> str:
    """Return the version of the installed package; "unknown" where there is no package."""
    try:
        return metadata.version("anabranch")
    except metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def code_digest() -> str:
    """Return the digest of the software that is installed here, hex. Read once a process."""
    folders = {name: Path(str(importlib.import_module(name).__file__)).parent for name in SOURCES}
    return digest_of(version(), sources(folders))


def sources(folders: dict[str, Path]) -> list[tuple[str, bytes]]:
    """Return (name/path, contents) of every source below the folders of packages, in order."""
    found = [
        (f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.suffix in DATA and path.is_file() and "__pycache__" not in path.parts
    ]
    return sorted(found)


def digest_of(number: str, files: Iterable[tuple[str, bytes]]) -> str:
    """Return the digest of a version and its sources, hex. No two inputs share their bytes."""
    digest = hashlib.sha256(HEADING)
    for part in (
        number.encode(),
        *(half for path, data in files for half in (path.encode(), data)),
    ):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def app_bundle(code: str, number: str | None = None) -> bytes:
    """Return the Flower app of a code digest: the same bytes for the same code and version."""
    number = version() if number is None else number
    files = {
        "README.md": _README.format(code=code),
        "pyproject.toml": _PYPROJECT.format(version=number, code=code),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as bundle:  # a zlib may change
        for name, text in sorted(files.items()):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system = 3  # the same on every system
            entry.external_attr = 0o644 << 16
            bundle.writestr(entry, text)
    return buffer.getvalue()


def app_hash(code: str, number: str | None = None) -> str:
    """Return the SHA-256 of `app_bundle(code)`, hex: what Flower calls the hash of a FAB."""
    return hashlib.sha256(app_bundle(code, number)).hexdigest()


_PYPROJECT = """\
[project]
name = "anabranch"
version = "{version}"
description = "Anabranch, code {code}"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "anabranch"

[tool.flwr.app.components]
serverapp = "anabranch.server.app:app"
clientapp = "anabranch.client.app:app"
"""

_README = """\
# Anabranch

This bundle holds no code. It names the software that a coordinator and its sites have installed:

    {code}

A site of Anabranch never unpacks or runs a bundle. It compares the bundle's SHA-256 with the one
that its own software gives, and does nothing for any other.
"""
