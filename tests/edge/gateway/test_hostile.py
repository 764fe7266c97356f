"""Devices that race against themselves, calls that never say anything, disks that are full."""

from __future__ import annotations

import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from anabranch.edge.gateway.closing import AGAIN_S, Closer
from anabranch.edge.gateway.config import ClientPrivacy, Limits
from anabranch.edge.gateway.limits import today
from anabranch.edge.gateway.operator import gateway_file, invite, revoke
from anabranch.edge.gateway.refusals import Denied, Exhausted
from anabranch.edge.gateway.store import Store, make_store
from anabranch.edge.generated import edge_pb2
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import ConfigError
from benchmarks.edge.gateway_devices import HOST, Device, enrol_many, patiently
from benchmarks.edge.gateway_load import delta_of
from tests.gateway_cases import open_round, row_of

Fleet = Callable[..., Any]
SERVICE = "/anabranch.edge.v1.EdgeGateway"


def closed(gateway: Any, row: Any) -> Any:
    gateway.closer.due(now=row["deadline"])
    return row_of(gateway.parts.store, row)


# What is counted stays: a device that races against itself cannot take the round down.


def test_a_refused_commit_does_not_remove_a_delta_that_was_counted_meanwhile(
    fleet: Fleet, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, (device,) = fleet(1, min_cohort=1, cohort=9)
    row = open_round(gateway.opener, adapter)
    device.check_in()
    frame = wire.encode(delta_of(adapter.spec, 0))
    device.upload(frame)
    rounds = gateway.parts.rounds
    check = rounds._check

    def late(row: Any, task: Any, path: Path, examples: int, steps: int) -> None:
        if examples == 999:
            assert device.commit(frame).accepted
        check(row, task, path, examples, steps)

    monkeypatch.setattr(rounds, "_check", late)
    assert not device.commit(frame, examples=999).accepted
    row = closed(gateway, row)
    assert (row["state"], row["clients"], row["reason"]) == ("closed", 1, "")


def test_a_new_announcement_does_not_remove_a_delta_that_was_counted_meanwhile(
    fleet: Fleet, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, (device,) = fleet(1, min_cohort=1, cohort=9)
    row = open_round(gateway.opener, adapter)
    device.check_in()
    frame, other = (wire.encode(delta_of(adapter.spec, seed)) for seed in (0, 1))
    device.upload(frame)
    rounds = gateway.parts.rounds
    announce = rounds._announce

    def late(name: str, task: str, upload: str, sha: bytes, size: int, due: str) -> None:
        assert device.commit(frame).accepted
        announce(name, task, upload, sha, size, due)

    begin = edge_pb2.BeginUploadRequest(task=device.task.id, sha256=bytes(32), size=len(other))
    monkeypatch.setattr(rounds, "_announce", late)
    with pytest.raises(grpc.RpcError) as error:
        device.stub.BeginUpload(begin, timeout=10)
    assert error.value.code() == grpc.StatusCode.ABORTED
    row = closed(gateway, row)
    assert (row["state"], row["clients"], row["reason"]) == ("closed", 1, "")


# Calls that are begun and never say anything.


def silent(channel: grpc.Channel, method: str, timeout: float | None, ends: threading.Event) -> Any:
    def nothing() -> Iterator[bytes]:
        ends.wait(30)
        yield from ()

    return channel.stream_unary(method).future(nothing(), timeout=timeout)


def settled(done: Callable[[], bool], wait_s: float = 10.0) -> None:
    """Wait until the server has seen what was sent; whoever asks finds out if it has not."""
    until = time.monotonic() + wait_s
    while not done() and time.monotonic() < until:
        time.sleep(0.01)


def test_silent_calls_do_not_keep_others_from_enrolling(serving: Any) -> None:
    gateway = serving()
    authority = gateway.parts.authority.pem
    credentials, ends = grpc.ssl_channel_credentials(authority), threading.Event()
    with grpc.secure_channel(f"{HOST}:{gateway.enroll_port}", credentials) as channel:
        methods = [f"{SERVICE}/Enroll"] * 7 + ["/grpc.health.v1.Health/Check"]
        calls = [silent(channel, method, None, ends) for method in methods]
        settled(lambda: all(call.done() for call in calls))
        (text,) = invite(gateway.folder.folder)
        device = patiently(
            lambda: Device.enrol(text, gateway.enroll_port, gateway.port, authority=authority)
        )
        device.check_in()
        device.hang_up()
        ends.set()
        assert {call.code() for call in calls} == {grpc.StatusCode.INVALID_ARGUMENT}


def test_a_devices_silent_calls_count_before_they_say_anything(fleet: Fleet) -> None:
    gateway, (bad, good) = fleet(2, limits=Limits(calls=5, calls_at_once=3))
    ends = threading.Event()
    bad.stub  # noqa: B018  # connects
    methods = ["CheckIn", "Commit", "BeginUpload", "Fetch", "Enroll"]
    calls = [silent(bad.channels[0], f"{SERVICE}/{method}", 20.0, ends) for method in methods]
    now = gateway.parts.quotas._now
    settled(lambda: now.get(bad.name) == 3 and sum(call.done() for call in calls) == 2)
    good.check_in()
    with pytest.raises(grpc.RpcError) as error:
        bad.check_in()
    assert "3 at once" in error.value.details()
    ends.set()
    codes = {call.code() for call in calls}
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT}
    bad.check_in()
    assert gateway.parts.quotas._now == {}


@pytest.mark.parametrize("method", ["CheckIn", "Fetch", "Upload"])
def test_what_is_no_message_is_refused_in_one_line_of_the_log(
    fleet: Fleet, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, (device,) = fleet(1)
    caplog.set_level("INFO")
    call = device.channels[0].unary_unary(f"{SERVICE}/{method}")
    with pytest.raises(grpc.RpcError) as error:
        call(b"\xff\xff\xff", timeout=10)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "no message of the protocol" in error.value.details()
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


# Quotas


def test_bytes_that_are_there_already_count_as_well(fleet: Fleet, adapter: Adapter) -> None:
    gateway, (device,) = fleet(1, limits=Limits(chunk_bytes=1024), min_cohort=1)
    open_round(gateway.opener, adapter)
    device.check_in()
    frame = wire.encode(delta_of(adapter.spec, 0))
    upload = device.begin(frame).upload
    data = frame[:1024]
    chunk = edge_pb2.UploadChunk(upload=upload, offset=0, data=data, crc32=zlib.crc32(data))
    device.stub.Upload(iter([chunk] * 10), timeout=10)
    assert gateway.parts.store.traffic(device.name, today()) == 10 * 1024


def test_downloads_at_the_same_time_share_the_bytes_of_a_day(
    fleet: Fleet, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anabranch.edge.gateway import service

    monkeypatch.setattr(service, "COUNT_EVERY", 1024)
    gateway, (device,) = fleet(1, limits=Limits(chunk_bytes=1024, bytes_a_day=3000), min_cohort=1)
    open_round(gateway.opener, adapter)
    device.check_in()
    request = edge_pb2.FetchRequest(sha256=device.task.adapter.sha256)
    served = gateway.parts
    calls = service.Service(served)
    streams: list[Any] = [calls._chunks(device.name, request) for _ in range(3)]
    with pytest.raises(Exhausted, match="midnight"):
        _ = [next(stream) for _ in range(3) for stream in streams]
    for stream in streams:
        stream.close()
    assert served.store.traffic(device.name, today()) <= 3000 + 3 * 1024


def test_a_download_ends_when_the_device_is_revoked(
    fleet: Fleet, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anabranch.edge.gateway import service

    monkeypatch.setattr(service, "COUNT_EVERY", 1024)
    gateway, (device,) = fleet(1, limits=Limits(chunk_bytes=1024), min_cohort=1)
    open_round(gateway.opener, adapter)
    device.check_in()
    request = edge_pb2.FetchRequest(sha256=device.task.adapter.sha256)
    chunks = service.Service(gateway.parts)._chunks(device.name, request)
    next(chunks)
    revoke(gateway.folder.folder, device.name)
    with pytest.raises(Denied, match="revoked"):
        next(chunks)


@pytest.mark.parametrize(
    ("limits", "rule"),
    [
        ({"call_s": 60.0}, "call_s"),
        ({"chunk_bytes": 1 << 20}, "message_bytes"),
        ({"message_bytes": 4096}, "message_bytes"),
    ],
)
def test_limits_that_no_device_can_keep_are_refused(limits: dict[str, float], rule: str) -> None:
    """A device gives a transfer 300 s, and a chunk travels in one message."""
    with pytest.raises(ConfigError, match=rule):
        gateway_file("north", ["localhost"], limits=limits)


# State


def full(db: sqlite3.Connection) -> None:
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_fails_a_change_and_the_next_one_works(tmp_path: Path) -> None:
    make_store(tmp_path / "state.sqlite")
    store = Store(tmp_path / "state.sqlite")
    full(store._db)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.add_token(b"x" * 100_000, 1.0, "label")
    store._db.execute("PRAGMA max_page_count = 100000")
    store.add_token(b"x" * 100_000, 1.0, "label")
    store.close()


class FailingCommit:
    """A connection whose COMMIT fails once, as with a full or failing disk."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db, self.failed = db, False

    def execute(self, query: str, *values: Any) -> Any:
        if query == "COMMIT" and not self.failed:
            self.failed = True
            raise sqlite3.OperationalError("disk I/O error")
        return self.db.execute(query, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.db, name)


def test_a_commit_that_fails_does_not_leave_its_transaction_open(tmp_path: Path) -> None:
    make_store(tmp_path / "state.sqlite")
    store = Store(tmp_path / "state.sqlite")
    store._db = FailingCommit(store._db)  # type: ignore[assignment]
    with pytest.raises(sqlite3.OperationalError, match="I/O"):
        store.add_token(b"one", 1.0, "label")
    store.add_token(b"two", 1.0, "label")
    assert [row["hash"] for row in store.rows("SELECT hash FROM tokens")] == [b"two"]
    store.close()


def test_a_round_that_cannot_be_ended_does_not_hold_up_the_others(
    fleet: Fleet, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, _ = fleet(2, cohort=99)
    gateway.stopping.set()
    gateway.ending.join()
    first, second = (open_round(gateway.opener, adapter, number) for number in (1, 2))
    close = Closer.close

    def failing(self: Closer, row: Any) -> None:
        if row["id"] == first["id"]:
            raise OSError(28, "No space left on device")
        close(self, row)

    monkeypatch.setattr(Closer, "close", failing)
    gateway.closer.due(now=second["deadline"] + 1)
    assert row_of(gateway.parts.store, first)["state"] == "open"
    assert row_of(gateway.parts.store, second)["state"] == "refused"  # nobody came


def test_a_round_that_cannot_be_ended_is_not_tried_again_at_once(
    fleet: Fleet, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is not filled with tracebacks."""
    gateway, _ = fleet(2)
    gateway.stopping.set()
    gateway.ending.join()
    row = open_round(gateway.opener, adapter)
    tried: list[int] = []

    def failing(self: Closer, row: Any) -> None:
        tried.append(row["id"])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Closer, "close", failing)
    for _ in range(5):
        gateway.closer.due(now=row["deadline"] + 1)
    assert len(tried) == 1
    gateway.closer.due(now=row["deadline"] + 1 + AGAIN_S)
    assert len(tried) == 2


def test_frames_that_a_crash_left_are_removed_at_the_next_start(
    fleet: Fleet, adapter: Adapter
) -> None:
    gateway, _ = fleet(2)
    row = open_round(gateway.opener, adapter)
    files = gateway.folder.files
    (files / ("f" * 64)).write_bytes(b"of a round that has ended")
    gateway.closer.recover()
    assert [path.name for path in files.iterdir()] == [row["adapter"]]


# Client-level privacy: what was accounted for is what is done.

PLAN = {"epsilon": 50.0, "population": 4, "noise_multiplier": 2.0, "clipping_norm": 1.0}


@pytest.mark.parametrize(
    "change",
    [{"noise_multiplier": 0.1}, {"sample_rate": 0.9}, None],
    ids=["less noise", "another rate", "no plan"],
)
def test_a_plan_that_was_changed_during_a_round_ends_it_with_nothing(
    fleet: Fleet, adapter: Adapter, change: dict[str, float] | None
) -> None:
    gateway, _ = fleet(2, client_privacy=PLAN)
    gateway.stopping.set()
    gateway.ending.join()
    row = open_round(gateway.opener, adapter)
    plan = None if change is None else msgspec.convert(PLAN | change, ClientPrivacy)
    file = msgspec.structs.replace(gateway.file, client_privacy=plan, min_cohort=1)
    closer = replace(gateway.closer, file=file)
    closer.due(now=row["deadline"])
    row = row_of(gateway.parts.store, row)
    assert (row["state"], row["result"]) == ("refused", None)
    assert "was changed while the round was open" in row["reason"]


def test_a_plan_that_came_during_a_round_ends_it_with_nothing(
    fleet: Fleet, adapter: Adapter
) -> None:
    gateway, _ = fleet(2)
    gateway.stopping.set()
    gateway.ending.join()
    row = open_round(gateway.opener, adapter)
    plan = msgspec.convert(PLAN, ClientPrivacy)
    file = msgspec.structs.replace(gateway.file, client_privacy=plan)
    replace(gateway.closer, file=file).due(now=row["deadline"])
    assert "was changed" in row_of(gateway.parts.store, row)["reason"]


def test_a_private_round_waits_for_every_device_that_may_still_come(
    serving: Any, adapter: Adapter
) -> None:
    gateway = serving(client_privacy=PLAN | {"population": 3})
    devices = enrol_many(gateway.folder, gateway, 3)
    row = open_round(gateway.opener, adapter)
    for seed, device in enumerate(devices[:2]):
        device.check_in()
        assert device.send(wire.encode(delta_of(adapter.spec, seed))).accepted
    revoke(gateway.folder.folder, devices[0].name)
    gateway.closer.due()
    assert row_of(gateway.parts.store, row)["state"] == "open"  # the third had no draw yet
    for device in devices:
        device.hang_up()
