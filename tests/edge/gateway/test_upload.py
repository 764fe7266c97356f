"""Uploads that are cut at every chunk, servers that are killed, bytes that are not as announced."""

from __future__ import annotations

import hashlib
import itertools
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from anabranch.edge.gateway.config import Limits
from anabranch.edge.generated import edge_pb2
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from benchmarks.edge.gateway_devices import CALL_S, Died, chunks_of, enrol_many, patiently
from benchmarks.edge.gateway_load import (
    adapter_of,
    delta_of,
    new_gateway,
    opener_of,
    serve,
    spec_of,
)
from tests.gateway_cases import ended, open_round

Fleet = Callable[..., Any]
Code = grpc.StatusCode
SMALL = Limits(chunk_bytes=1024)


@pytest.fixture
def one(fleet: Fleet, adapter: Adapter) -> tuple[Any, Any, bytes]:
    """A gateway, a device with a task, and the frame it is to send (four chunks)."""
    gateway, (device,) = fleet(1, limits=SMALL, min_cohort=1)
    open_round(gateway.opener, adapter)
    device.check_in()
    frame = wire.encode(delta_of(adapter.spec, 0))
    assert 3 * 1024 < len(frame) <= 4 * 1024
    return gateway, device, frame


def raw(device: Any, frame: bytes, *chunks: tuple[int, bytes, int | None]) -> Any:
    upload = device.begin(frame).upload
    pieces = [
        edge_pb2.UploadChunk(
            upload=upload, offset=offset, data=data, crc32=zlib.crc32(data) if crc is None else crc
        )
        for offset, data, crc in chunks
    ]
    return device.stub.Upload(iter(pieces), timeout=20)


def code_of(work: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        work()
    return error.value.code(), error.value.details()


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_an_upload_goes_on_where_it_was_cut(one: Any, chunks: int) -> None:
    gateway, device, frame = one
    status = device.begin(frame)
    file = gateway.parts.spool.path(status.upload)

    def cut() -> Iterator[Any]:
        yield from itertools.islice(chunks_of(frame, status), chunks)
        until = time.monotonic() + 20.0
        while time.monotonic() < until:  # the server reads each of them
            if file.exists() and file.stat().st_size == chunks * 1024:
                break
            time.sleep(0.01)
        raise Died

    with pytest.raises(grpc.RpcError):
        device.stub.Upload(cut(), timeout=CALL_S)
    for _ in range(100):
        if device.begin(frame).committed == chunks * 1024:
            break
        time.sleep(0.1)  # the server notices the end of a stream in its own time
    assert device.begin(frame).committed == chunks * 1024
    sent = device.upload(frame)
    assert (sent.committed, sent.state) == (len(frame), edge_pb2.UploadStatus.COMPLETE)
    assert device.commit(frame).accepted
    assert gateway.parts.store.rows("SELECT count(*) AS n FROM counted") == [{"n": 1}]


def test_what_is_there_already_is_ignored(one: Any) -> None:
    _, device, frame = one
    first = (0, frame[:1024], None)
    assert raw(device, frame, first, first, (512, frame[512:1536], None)).committed == 1536


def test_gaps_damage_and_excess_are_refused(one: Any) -> None:
    _, device, frame = one
    raw(device, frame, (0, frame[:1024], None))
    gap = code_of(lambda: raw(device, frame, (2048, frame[2048:3072], None)))
    assert gap == (Code.OUT_OF_RANGE, "chunk at 2048: bytes 1024 to 2048 are missing")
    damaged = code_of(lambda: raw(device, frame, (1024, frame[1024:2048], 7)))
    assert damaged[0] == Code.DATA_LOSS
    assert "CRC-32" in damaged[1]
    large = code_of(lambda: raw(device, frame, (1024, bytes(1025), None)))
    assert large == (Code.INVALID_ARGUMENT, "chunk: 1025 bytes, at most 1024 allowed")
    long = frame[1024:] + bytes(1024)
    pieces = [(1024 + i, long[i : i + 1024], None) for i in range(0, len(long), 1024)]
    beyond = code_of(lambda: raw(device, frame, *pieces))
    assert beyond[0] == Code.INVALID_ARGUMENT
    assert "beyond the" in beyond[1]
    assert device.send(frame).accepted  # none of it did any harm


def test_another_digest_is_refused_and_the_upload_begins_again(one: Any) -> None:
    _, device, frame = one
    wrong = bytes([frame[0] ^ 1]) + frame[1:]
    pieces = [(i, wrong[i : i + 1024], None) for i in range(0, len(wrong), 1024)]
    assert code_of(lambda: raw(device, frame, *pieces))[0] == Code.DATA_LOSS
    assert device.begin(frame).committed == 0
    assert device.send(frame).accepted


def test_sizes_and_digests_that_cannot_be_are_refused(one: Any) -> None:
    _, device, frame = one

    def begin(size: int, sha: bytes) -> Any:
        request = edge_pb2.BeginUploadRequest(task=device.task.id, sha256=sha, size=size)
        return device.stub.BeginUpload(request, timeout=20)

    for size in (0, device.task.max_upload_bytes + 1, 1 << 63):
        code, text = code_of(lambda size=size: begin(size, bytes(32)))  # type: ignore[misc]
        assert code == Code.INVALID_ARGUMENT
        assert "size: expected 1 to" in text
    assert code_of(lambda: begin(len(frame), b"x"))[0] == Code.INVALID_ARGUMENT
    assert code_of(lambda: device.stub.Upload(iter([]), timeout=20))[0] == Code.INVALID_ARGUMENT


def test_nothing_is_counted_before_it_is_there(one: Any) -> None:
    _, device, frame = one
    device.begin(frame)
    assert code_of(lambda: device.commit(frame))[0] == Code.OUT_OF_RANGE
    other = wire.encode(delta_of(spec_of(800), 5))
    assert code_of(lambda: device.commit(other))[0] == Code.NOT_FOUND


def test_a_delta_is_counted_once_however_often_it_comes(one: Any) -> None:
    gateway, device, frame = one
    for _ in range(3):
        assert device.send(frame).accepted
    other = wire.encode(delta_of(spec_of(800), 5))
    assert device.begin(other).state == edge_pb2.UploadStatus.NOT_WANTED
    assert not device.commit(other).accepted
    assert gateway.parts.store.rows("SELECT count(*) AS n FROM counted") == [{"n": 1}]


def test_a_new_delta_takes_the_place_of_one_not_yet_counted(one: Any) -> None:
    gateway, device, frame = one
    raw(device, frame, (0, frame[:1024], None))
    other = wire.encode(delta_of(spec_of(800), 5))
    assert device.send(other).accepted
    assert len(list(gateway.folder.spool.iterdir())) == 1


def test_the_later_of_two_writers_goes_on(one: Any) -> None:
    gateway, device, frame = one
    upload = device.begin(frame).upload
    spool = gateway.parts.spool
    early = spool.open(upload, device.name)
    early.add(0, frame[:1024], zlib.crc32(frame[:1024]))
    late = spool.open(upload, device.name)
    with pytest.raises(Exception, match="a later call writes it"):
        early.add(1024, frame[1024:2048], zlib.crc32(frame[1024:2048]))
    late.add(0, frame, zlib.crc32(frame))
    late.checkpoint()
    early.close()
    late.close()
    assert late.complete
    assert device.commit(frame).accepted


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_killed_server_loses_nothing_and_counts_nothing_twice(
    tmp_path: Path, chunks: int
) -> None:
    """SIGKILL while an upload is under way, and once more after the commit."""
    spec = spec_of(1200)
    folder = new_gateway(tmp_path / "g", spec, cohort=1, min_cohort=1, limits=SMALL)
    frame = wire.encode(delta_of(spec, 0))
    with serve(folder) as server:
        (device,) = enrol_many(folder, server, 1)
        device.check_in()
        opener = opener_of(folder)
        row = open_round(opener, adapter_of(spec))
        task = device.check_in().task.id
        if chunks:
            with pytest.raises(Died):
                device.upload(frame, die_after=chunks)
        server.kill()
    with serve(folder) as server:
        assert patiently(device.check_in).task.id == task
        status = device.begin(frame)
        assert status.committed % 1024 == 0
        assert status.committed <= chunks * 1024
        assert device.send(frame).accepted
        server.kill()
    with serve(folder) as server:
        assert patiently(lambda: device.commit(frame)).accepted
        row = ended(opener.store, row)
        assert server.stop() == 0
    device.hang_up()
    assert (row["state"], row["clients"], row["examples"]) == ("closed", 1, 10)
    sent = wire.decode_delta((folder.results / row["result"]).read_bytes(), spec)
    assert hashlib.sha256(wire.encode(sent)).digest() == hashlib.sha256(frame).digest()
    opener.store.close()


def test_a_server_killed_while_it_ends_a_round_ends_it_again(
    fleet: Fleet, adapter: Adapter
) -> None:
    gateway, devices = fleet(2, cohort=99)
    row = open_round(gateway.opener, adapter)
    for seed, device in enumerate(devices):
        device.check_in()
        device.send(wire.encode(delta_of(adapter.spec, seed)))
    with gateway.parts.store.writing() as db:
        db.execute("UPDATE rounds SET state = 'closing'")
    row = ended(gateway.parts.store, row)
    assert (row["state"], row["clients"]) == ("closed", 2)
