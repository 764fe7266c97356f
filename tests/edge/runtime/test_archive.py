"""A bundle in one file, and the tricks that archives play."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.client.tuning.classifier import Classifier
from anabranch.edge.runtime import archive as archives
from anabranch.edge.runtime.archive import pack, unpack
from anabranch.edge.runtime.bundle import Bundle, open_bundle
from anabranch.edge.runtime.trust import remember_version
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import BundleError, DeviceError
from tests.edge.bundles import TRUSTED, reseal, write_bundle

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture(scope="module")
def source(
    tmp_path_factory: pytest.TempPathFactory,
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
) -> Path:
    folder = tmp_path_factory.mktemp("source") / "bundle"
    write_bundle(
        folder,
        make_classifier("logistic"),
        make_config("logistic"),
        precisions=("fp32",),
        with_artifacts=False,
    )
    return folder


@pytest.fixture(scope="module")
def packed(source: Path) -> bytes:
    archive = source.parent / "bundle.tar"
    pack(source, archive)
    return archive.read_bytes()


def test_a_bundle_comes_back_as_it_was(source: Path, packed: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "bundle.tar"
    archive.write_bytes(packed)
    bundle = unpack(archive, tmp_path / "out", trusted=TRUSTED, versions=tmp_path / "v.json")
    assert bundle.folder == tmp_path / "out"
    assert contents(bundle.folder) == contents(source)
    assert (tmp_path / "v.json").exists()


def test_the_same_bundle_gives_the_same_bytes(source: Path, packed: bytes, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy, copy_function=shutil.copy)
    for number, path in enumerate(sorted(copy.iterdir(), reverse=True)):
        path.chmod(0o600)
        os.utime(path, (number, number))
    pack(copy, tmp_path / "copy.tar")
    assert (tmp_path / "copy.tar").read_bytes() == packed


def test_any_tar_reads_what_pack_writes(source: Path, packed: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        found = {m.name: read(tar, m) for m in tar.getmembers()}
        assert all(m.isreg() and m.mode == 0o644 and m.mtime == 0 for m in tar.getmembers())
    assert found == contents(source)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_flipped_byte_is_refused_and_leaves_nothing(
    packed: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    at, mask = data.draw(st.integers(0, len(packed) - 1)), data.draw(st.integers(1, 255))
    changed = bytearray(packed)
    changed[at] ^= mask
    refused(bytes(changed), tmp_path, "[a-z]")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_truncation_is_refused_and_leaves_nothing(
    packed: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    refused(packed[: data.draw(st.integers(0, len(packed) - 1))], tmp_path, "ends too early")


def link(kind: bytes, to: str) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[2][0].type, members[2][0].linkname = kind, to
        members[2] = (members[2][0], b"")

    return change


def named(name: str) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[2][0].name = name

    return change


def of_type(kind: bytes) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[2][0].type = kind

    return change


def twice(members: Members) -> None:
    members.insert(3, members[2])


def second_manifest(members: Members) -> None:
    members.append(members[0])


def extra(members: Members) -> None:
    members.append((tarfile.TarInfo("zzz.bin"), b"more"))


def missing(members: Members) -> None:
    del members[3]


def swapped(members: Members) -> None:
    members[2], members[3] = members[3], members[2]


def unsigned(members: Members) -> None:
    del members[1]


def longer(members: Members) -> None:
    members[2] = (members[2][0], members[2][1] + b"x")


def owned(members: Members) -> None:
    members[2][0].uid = 1000


def set_uid(members: Members) -> None:
    members[2][0].mode = 0o4755


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (link(tarfile.SYMTYPE, "/etc/passwd"), "is a symbolic link"),
        (link(tarfile.LNKTYPE, "manifest.json"), "is a hard link"),
        (of_type(tarfile.CHRTYPE), "is a device"),
        (of_type(tarfile.BLKTYPE), "is a device"),
        (of_type(tarfile.FIFOTYPE), "is a pipe"),
        (of_type(tarfile.DIRTYPE), "is a folder"),
        (of_type(tarfile.GNUTYPE_SPARSE), "is a sparse file"),
        (of_type(tarfile.XHDTYPE), "is a pax header"),
        (of_type(tarfile.XGLTYPE), "is a pax header"),
        (of_type(tarfile.GNUTYPE_LONGNAME), "is a GNU long name"),
        (of_type(tarfile.CONTTYPE), "is no regular file"),
        (of_type(tarfile.AREGTYPE), "is no regular file"),
        (named("/etc/cron.d/x"), "is an absolute path"),
        (named("C:evil"), "is an absolute path"),
        (named("../outside"), "leads out of the folder"),
        (named("a/../../outside"), "leads out of the folder"),
        (named("..\\outside"), "leads out of the folder"),
        (named("sub/file"), "is a path"),
        (named("sub\\file"), "is a path"),
        (named(".hidden"), "is no plain name"),
        (named("a b"), "is no plain name"),
        (named("adapter.bin\n"), "is no plain name"),
        (twice, "appears twice"),
        (second_manifest, "appears twice"),
        (extra, "is not listed"),
        (missing, "stands where"),
        (swapped, "stands where"),
        (unsigned, r"stands where manifest\.sig is expected"),
        (longer, "sizes: "),
        (owned, "header of .* is not as pack writes it"),
        (set_uid, "header of .* is not as pack writes it"),
    ],
)
def test_a_trick_is_named_and_leaves_nothing(
    packed: bytes, tmp_path: Path, change: Callable[[Members], None], message: str
) -> None:
    members = list(members_of(packed))
    change(members)
    refused(built(members), tmp_path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tar: tar + b"more", "something follows"),
        (lambda tar: tar + bytes(512), "something follows"),
        (lambda tar: tar[:-512], "ends too early"),
        (lambda tar: bytes(512) + tar, r"ends before manifest\.json"),
        (lambda tar: b"", "ends too early"),
    ],
)
def test_an_archive_ends_where_it_ends(
    packed: bytes, tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    refused(change(packed), tmp_path, message)


def test_padding_hides_nothing(packed: bytes, tmp_path: Path) -> None:
    size = len(next(members_of(packed))[1])
    changed = bytearray(packed)
    assert size % 512
    changed[512 + size] = 1
    refused(bytes(changed), tmp_path, "hides between two files")


def test_pax_and_gnu_formats_of_other_tars_are_refused(source: Path, tmp_path: Path) -> None:
    for format_, message in (
        (tarfile.PAX_FORMAT, "is a pax header"),
        (tarfile.GNU_FORMAT, "is a GNU long name"),
    ):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=format_) as tar:
            member = tarfile.TarInfo("n" * 120)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
        refused(out.getvalue(), tmp_path, message)


def test_nothing_is_read_before_the_signature_is_right(packed: bytes, tmp_path: Path) -> None:
    members = list(members_of(packed))
    data = bytearray(members[0][1])
    data[-2] ^= 1
    members[0] = (members[0][0], bytes(data))
    members[2][0].name = "../outside"
    refused(built(members), tmp_path, r"signature: does not fit manifest\.json")


def test_a_key_that_is_not_trusted_unpacks_nothing(packed: bytes, tmp_path: Path) -> None:
    refused(packed, tmp_path, "does not trust", trusted=(bytes(32),))


def test_more_bytes_than_allowed_are_refused_before_any_is_written(
    packed: bytes, tmp_path: Path
) -> None:
    refused(packed, tmp_path, "at most 100 are allowed", max_bytes=100)


def test_a_huge_manifest_is_not_read(packed: bytes, tmp_path: Path) -> None:
    members = list(members_of(packed))
    members[0] = (members[0][0], bytes(5 << 20))
    refused(built(members), tmp_path, "at most 4194304 are read")


def test_an_older_version_is_refused(source: Path, packed: bytes, tmp_path: Path) -> None:
    copy, versions = tmp_path / "copy", tmp_path / "versions.json"
    shutil.copytree(source, copy)
    reseal(copy, lambda m: msgspec.structs.replace(m, version=2))
    pack(copy, tmp_path / "new.tar")
    unpack(tmp_path / "new.tar", tmp_path / "new", trusted=TRUSTED, versions=versions)
    (tmp_path / "old.tar").write_bytes(packed)
    with pytest.raises(BundleError, match="1 is older than 2"):
        unpack(tmp_path / "old.tar", tmp_path / "old", trusted=TRUSTED, versions=versions)
    assert not (tmp_path / "old").exists()


def test_a_newer_version_that_another_process_took_meanwhile_leaves_nothing(
    packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = tmp_path / "versions.json"
    (tmp_path / "a.tar").write_bytes(packed)

    def opening(*args: Any, **more: Any) -> Bundle:
        bundle = open_bundle(*args, **more)
        remember_version(versions, bundle.manifest.name, 2, "0" * 64)  # the other process
        return bundle

    monkeypatch.setattr(archives, "open_bundle", opening)
    with pytest.raises(BundleError, match="1 is older than 2"):
        unpack(tmp_path / "a.tar", tmp_path / "out", trusted=TRUSTED, versions=versions)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_not_touched(packed: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(packed)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_bytes(b"1")
    with pytest.raises(BundleError, match="exists already"):
        unpack(tmp_path / "a.tar", tmp_path / "out", trusted=TRUSTED)
    assert contents(tmp_path / "out") == {"mine": b"1"}


def test_a_disk_that_cannot_be_written_is_the_devices(packed: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(packed)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DeviceError, match="cannot be written"):
        unpack(tmp_path / "a.tar", tmp_path / "file" / "out", trusted=TRUSTED)


def test_a_folder_that_is_no_bundle_is_not_packed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle"):
        pack(tmp_path, tmp_path / "a.tar")
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "extra").write_bytes(b"")
    with pytest.raises(BundleError, match="'extra' is not listed"):
        pack(copy, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()


def refused(
    archive: bytes,
    folder: Path,
    message: str,
    *,
    trusted: tuple[bytes, ...] = TRUSTED,
    max_bytes: int = 1 << 30,
) -> None:
    """Unpacking is refused with the rule named, and nothing new is in the folder."""
    path = folder / "case.tar"
    path.write_bytes(archive)
    before = set(folder.rglob("*"))
    with pytest.raises(BundleError, match=message):
        unpack(path, folder / "out", trusted=trusted, max_bytes=max_bytes)
    assert set(folder.rglob("*")) == before


def members_of(archive: bytes) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar.getmembers():
            yield member, read(tar, member)


def built(members: Members) -> bytes:
    """Return a tar of these members, whatever they claim to be."""
    out = bytearray()
    for member, data in members:
        member.size = len(data)
        out += member.tobuf(tarfile.USTAR_FORMAT)[:512] + data + bytes(-len(data) % 512)
    return bytes(out) + bytes(1024)


def read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
