from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anabranch.client.tuning.classifier import Classifier
from anabranch.edge.gateway.authority import Authority
from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import download
from anabranch.edge.runtime.bundle_manifest import MANIFEST, SIGNATURE, Manifest
from anabranch.edge.runtime.download import (
    Wanted,
    fetch,
    fetch_bundle,
    installed,
    prune,
    wanted,
)
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.transport import GatewayRefused, GatewayUnavailable
from anabranch.edge.runtime.trust import add_trusted
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import BundleError, DeviceError, ProtocolError
from tests.edge.bundles import TRUSTED, write_bundle
from tests.edge.gateways import CHUNK, FakeGateway, gateway_of, new_authority

DATA = bytes(i * i % 251 for i in range(4 * CHUNK + 123))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return new_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def fake(authority: Authority) -> FakeGateway:
    return FakeGateway(authority)


def asked(fake: FakeGateway, data: bytes = DATA) -> Wanted:
    return wanted(fake.put(data), limit=1 << 20)


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, len(DATA)])
def test_a_file_comes_whole_and_once(size: int, fake: FakeGateway, tmp_path: Path) -> None:
    file = asked(fake, DATA[:size])
    with gateway_of(fake) as gateway:
        path = fetch(gateway, file, tmp_path / "cache")
        assert path.read_bytes() == DATA[:size]
        assert fetch(gateway, file, tmp_path / "cache") == path
    assert fake.sent == size
    assert [one.name for one in (tmp_path / "cache").iterdir()] == [file.sha256]


@pytest.mark.parametrize("chunks", range(5))
def test_a_server_that_stops_at_any_chunk_and_comes_back(
    chunks: int, fake: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = asked(fake)
    fake.cut = chunks
    with gateway_of(fake) as gateway:
        monkeypatch.setattr(gateway, "wait", _killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(gateway, file, tmp_path)
    with gateway_of(fake) as gateway:  # another server, another connection
        assert fetch(gateway, file, tmp_path).read_bytes() == DATA
    assert fake.sent == len(DATA)  # no byte came twice


def _killed(failures: int) -> None:
    raise KeyboardInterrupt


def test_goes_on_by_itself_when_a_stream_breaks(fake: FakeGateway, tmp_path: Path) -> None:
    file = asked(fake)
    fake.cut = 2
    with gateway_of(fake) as gateway:
        assert fetch(gateway, file, tmp_path).read_bytes() == DATA
    assert fake.fetched == [(file.sha256, 0), (file.sha256, 2 * CHUNK)]


def test_a_damaged_chunk_is_asked_for_again(fake: FakeGateway, tmp_path: Path) -> None:
    file = asked(fake)
    damaged: list[int] = []

    def damage(chunk: edge_pb2.Chunk) -> edge_pb2.Chunk:
        if chunk.offset == CHUNK and not damaged:
            damaged.append(chunk.offset)
            chunk.data = b"?" + chunk.data[1:]
        return chunk

    fake.chunk = damage
    with gateway_of(fake) as gateway:
        assert fetch(gateway, file, tmp_path).read_bytes() == DATA
    assert fake.fetched[1] == (file.sha256, CHUNK)


def test_another_file_is_thrown_away(fake: FakeGateway, tmp_path: Path) -> None:
    file = asked(fake)
    fake.files[file.sha256] = DATA[::-1]
    with gateway_of(fake) as gateway, pytest.raises(ProtocolError, match="sent another file"):
        fetch(gateway, file, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("endless", [False, True])
def test_a_longer_file_or_an_endless_stream_is_cut_off(
    endless: bool, fake: FakeGateway, tmp_path: Path
) -> None:
    file = asked(fake)
    fake.files[file.sha256] = DATA + b"more"
    fake.endless = endless
    with gateway_of(fake) as gateway, pytest.raises(ProtocolError, match="expected some at 4000"):
        fetch(gateway, file, tmp_path)
    assert sum(one.stat().st_size for one in tmp_path.iterdir()) <= file.size


def test_a_shorter_file_ends_after_some_attempts(fake: FakeGateway, tmp_path: Path) -> None:
    file = asked(fake)
    fake.files[file.sha256] = DATA[:-1]
    with gateway_of(fake) as gateway, pytest.raises(GatewayUnavailable, match="ended after 4122"):
        fetch(gateway, file, tmp_path)


@pytest.mark.parametrize(
    "change", [{"offset": 7}, {"data": b"", "crc32": 0}], ids=["gap", "nothing"]
)
def test_chunks_that_do_not_follow_are_refused(
    change: dict[str, Any], fake: FakeGateway, tmp_path: Path
) -> None:
    def wrong(chunk: edge_pb2.Chunk) -> edge_pb2.Chunk:
        for name, value in change.items():
            setattr(chunk, name, value)
        return chunk

    file = asked(fake)
    fake.chunk = wrong
    with gateway_of(fake) as gateway, pytest.raises(ProtocolError, match="a chunk of"):
        fetch(gateway, file, tmp_path)


@pytest.mark.parametrize("part", [DATA[:1500][::-1], DATA + b"x", DATA[::-1]])
def test_a_damaged_part_is_downloaded_anew(part: bytes, fake: FakeGateway, tmp_path: Path) -> None:
    file = asked(fake)
    (tmp_path / f"{file.sha256}.part").write_bytes(part)
    with gateway_of(fake) as gateway:
        assert fetch(gateway, file, tmp_path).read_bytes() == DATA


def test_a_damaged_file_in_the_cache_is_downloaded_anew(fake: FakeGateway, tmp_path: Path) -> None:
    file = asked(fake)
    (tmp_path / file.sha256).write_bytes(DATA[::-1])
    with gateway_of(fake) as gateway:
        assert fetch(gateway, file, tmp_path).read_bytes() == DATA


def test_too_little_space_is_noticed_before_a_byte(
    fake: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = asked(fake)
    here = shutil.disk_usage(tmp_path)._replace(free=download.RESERVE + file.size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: here)
    with gateway_of(fake) as gateway, pytest.raises(DeviceError, match="free some space"):
        fetch(gateway, file, tmp_path)
    assert fake.fetched == []


def test_references_that_cannot_be_are_refused(fake: FakeGateway, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="5000000 bytes, at most 4194304"):
        wanted(edge_pb2.FileRef(name="m", sha256=b"x" * 32, size=5_000_000), limit=4 << 20)
    with pytest.raises(ProtocolError, match="expected a SHA-256, got 3 bytes"):
        wanted(edge_pb2.FileRef(name="m", sha256=b"abc", size=5), limit=10)
    missing = Wanted(name="m", sha256="0" * 64, size=5)
    with gateway_of(fake) as gateway, pytest.raises(GatewayRefused, match="NOT_FOUND"):
        fetch(gateway, missing, tmp_path)


# Bundles


@pytest.fixture(scope="module")
def bundles(
    tmp_path_factory: pytest.TempPathFactory,
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
) -> list[tuple[Path, Manifest]]:
    """Two versions with one base and different adapters."""
    folder = tmp_path_factory.mktemp("bundles")
    made = []
    for version, std in ((1, 0.2), (2, 0.3)):
        path = folder / str(version)
        manifest = write_bundle(
            path,
            make_classifier("tabular", std),
            make_config("tabular"),
            precisions=("fp32",),
            with_artifacts=False,
            version=version,
        )
        made.append((path, manifest))
    return made


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    add_trusted(home.trusted, TRUSTED[0])
    return home


def serve(fake: FakeGateway, bundle: tuple[Path, Manifest]) -> edge_pb2.Task:
    folder, manifest = bundle
    for path in folder.iterdir():
        fake.put(path.read_bytes(), path.name)
    return edge_pb2.Task(
        id="t-1",
        bundle=manifest.name,
        bundle_version=manifest.version,
        manifest=fake.put((folder / MANIFEST).read_bytes(), MANIFEST),
        signature=fake.put((folder / SIGNATURE).read_bytes(), SIGNATURE),
        adapter=fake.put(b"frame", "adapter"),
    )


def test_a_bundle_is_verified_and_installed(
    fake: FakeGateway, bundles: list[tuple[Path, Manifest]], home: Home
) -> None:
    task = serve(fake, bundles[0])
    with gateway_of(fake) as gateway:
        folder = fetch_bundle(gateway, task, home)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
            p.name: p.read_bytes() for p in bundles[0][0].iterdir()
        }
        sent = fake.sent
        assert fetch_bundle(gateway, task, home) == folder
    assert fake.sent == sent
    assert folder == home.bundle(bundles[0][1].name, 1)
    assert not installed(task, home)  # the adapter's frame is not here
    (home.cache / task.adapter.sha256.hex()).write_bytes(b"frame")
    assert installed(task, home)


def test_another_version_downloads_only_what_is_new(
    fake: FakeGateway, bundles: list[tuple[Path, Manifest]], home: Home
) -> None:
    with gateway_of(fake) as gateway:
        fetch_bundle(gateway, serve(fake, bundles[0]), home)
        fake.fetched.clear()
        fetch_bundle(gateway, serve(fake, bundles[1]), home)
    old = {file.sha256 for file in bundles[0][1].files.values()}
    names = {file.sha256: name for name, file in bundles[1][1].files.items()}
    got = {names.get(sha, MANIFEST) for sha, _ in fake.fetched}
    assert not old & {sha for sha, _ in fake.fetched}
    assert "base-fp32.bin" not in got
    assert "adapter.bin" in got


def test_nothing_follows_a_manifest_that_no_trusted_key_signed(
    fake: FakeGateway, bundles: list[tuple[Path, Manifest]], tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    add_trusted(home.trusted, b"k" * 32)
    task = serve(fake, bundles[0])
    with gateway_of(fake) as gateway, pytest.raises(BundleError, match="does not trust"):
        fetch_bundle(gateway, task, home)
    assert {sha for sha, _ in fake.fetched} == {
        task.manifest.sha256.hex(),
        task.signature.sha256.hex(),
    }
    assert list(home.cache.iterdir()) == []


def test_a_manifest_of_another_bundle_is_refused(
    fake: FakeGateway, bundles: list[tuple[Path, Manifest]], home: Home
) -> None:
    task = serve(fake, bundles[0])
    task.bundle_version = 2
    with gateway_of(fake) as gateway, pytest.raises(BundleError, match="the task is for"):
        fetch_bundle(gateway, task, home)
    assert len(fake.fetched) == 2


def test_an_older_version_is_refused_before_it_is_downloaded(
    fake: FakeGateway, bundles: list[tuple[Path, Manifest]], home: Home
) -> None:
    with gateway_of(fake) as gateway:
        fetch_bundle(gateway, serve(fake, bundles[1]), home)
        count = len(fake.fetched)
        with pytest.raises(BundleError, match="never goes back"):
            fetch_bundle(gateway, serve(fake, bundles[0]), home)
    assert len(fake.fetched) <= count + 2


def test_a_bundle_above_the_limit_is_refused(
    fake: FakeGateway, bundles: list[tuple[Path, Manifest]], home: Home
) -> None:
    with gateway_of(fake) as gateway, pytest.raises(DeviceError, match="at most 1000 are taken"):
        fetch_bundle(gateway, serve(fake, bundles[0]), home, limit=1000)
    assert len(fake.fetched) == 2


def test_a_cut_download_of_a_bundle_leaves_no_folder_and_goes_on(
    fake: FakeGateway, bundles: list[tuple[Path, Manifest]], home: Home
) -> None:
    task = serve(fake, bundles[0])
    lost = bundles[0][1].files["base-fp32.bin"].sha256
    kept = fake.files.pop(lost)
    with gateway_of(fake) as gateway:
        with pytest.raises(GatewayRefused):
            fetch_bundle(gateway, task, home)
        assert not home.bundle(task.bundle, 1).exists()
        fake.files[lost] = kept
        fake.fetched.clear()
        fetch_bundle(gateway, task, home)
    assert task.manifest.sha256.hex() not in {sha for sha, _ in fake.fetched}


def test_prune_keeps_what_bundles_and_tasks_use(
    fake: FakeGateway, bundles: list[tuple[Path, Manifest]], home: Home
) -> None:
    with gateway_of(fake) as gateway:
        fetch_bundle(gateway, serve(fake, bundles[0]), home)
    (home.cache / ("a" * 64)).write_bytes(b"old")
    (home.cache / ("b" * 64)).write_bytes(b"kept")
    (home.cache / ("c" * 64 + ".part")).write_bytes(b"half")
    (home.cache / ("d" * 64 + ".part")).write_bytes(b"half of what nobody wants now")
    before = len(list(home.cache.iterdir()))
    freed = prune(home, keep=["b" * 64, "c" * 64])
    after = {path.name for path in home.cache.iterdir()}
    assert not {"a" * 64, "d" * 64 + ".part"} & after
    assert {"b" * 64, "c" * 64 + ".part"} <= after
    assert {file.sha256 for file in bundles[0][1].files.values()} <= after
    assert freed >= 3
    assert len(after) < before
