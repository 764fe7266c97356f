from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anabranch.edge.gateway.authority import Authority
from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import sync
from anabranch.edge.runtime.backoff import Window
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.spool import Entry, Spool
from anabranch.edge.runtime.sync import capabilities, check_in, count_records, send
from anabranch.edge.runtime.transport import GatewayUnavailable
from anabranch.protocols.errors import DataError, ProtocolError
from tests.edge.gateways import FakeGateway, State, gateway_of, new_authority

FRAME = bytes(i * i % 251 for i in range(5000))  # five chunks of 1024 bytes


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return new_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def fake(authority: Authority) -> FakeGateway:
    return FakeGateway(authority)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def entry(spool: Spool) -> Entry:
    return spool.put("t-1", FRAME, examples=7, steps=3, deadline_unix=2**40)


def received(fake: FakeGateway) -> bytes:
    (upload,) = fake.uploads.values()
    return bytes(upload)


def test_a_delta_is_sent_and_committed(fake: FakeGateway, spool: Spool, entry: Entry) -> None:
    with gateway_of(fake) as gateway:
        verdict = send(gateway, spool, entry)
    assert verdict.accepted
    assert verdict.window == Window(min_s=60, max_s=180)
    assert received(fake) == FRAME
    assert fake.received == [(0, 1024), (1024, 1024), (2048, 1024), (3072, 1024), (4096, 904)]
    assert spool.entries() == [entry]  # the caller removes it


@pytest.mark.parametrize("chunks", range(5))
def test_a_server_that_stops_at_any_chunk_and_comes_back(
    chunks: int, fake: FakeGateway, spool: Spool, entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.cut = chunks
    with gateway_of(fake) as gateway:
        monkeypatch.setattr(gateway, "upload", _lost(gateway.upload))
        with pytest.raises(KeyboardInterrupt):
            send(gateway, spool, entry)
    with gateway_of(fake) as gateway:
        assert send(gateway, Spool(spool.folder), entry).accepted
    assert received(fake) == FRAME
    assert sum(length for _, length in fake.received) == len(FRAME)  # no byte was sent twice
    assert len(fake.committed) == 1


def _lost(upload: Any) -> Any:
    def call(chunks: Any) -> None:
        with pytest.raises(GatewayUnavailable):
            upload(chunks)
        raise KeyboardInterrupt

    return call


def test_goes_on_by_itself_when_a_stream_breaks(
    fake: FakeGateway, spool: Spool, entry: Entry
) -> None:
    fake.cut = 3
    with gateway_of(fake) as gateway:
        assert send(gateway, spool, entry).accepted
    assert received(fake) == FRAME


def test_sent_twice_counts_once(fake: FakeGateway, spool: Spool, entry: Entry) -> None:
    with gateway_of(fake) as gateway:
        assert send(gateway, spool, entry).accepted
        assert send(gateway, spool, entry).accepted
    assert len(fake.committed) == 1
    assert len(fake.received) == 5


def test_a_lost_answer_to_a_commit_counts_once(
    fake: FakeGateway, spool: Spool, entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gateway_of(fake) as gateway:
        real = gateway.commit

        def lost(request: edge_pb2.CommitRequest) -> None:
            real(request)
            raise GatewayUnavailable("lost")

        with monkeypatch.context() as patch:
            patch.setattr(gateway, "commit", lost)
            with pytest.raises(GatewayUnavailable):
                send(gateway, spool, entry)
        assert send(gateway, spool, entry).accepted
    assert len(fake.committed) == 1


def test_a_refusal_is_the_last_word(fake: FakeGateway, spool: Spool, entry: Entry) -> None:
    fake.verdict = (False, "NaN")
    with gateway_of(fake) as gateway:
        verdict = send(gateway, spool, entry)
    assert (verdict.accepted, verdict.reason) == (False, "NaN")


def test_what_is_not_wanted_is_not_sent(fake: FakeGateway, spool: Spool, entry: Entry) -> None:
    fake.forged = {"state": State.NOT_WANTED, "reason": "the round has ended"}
    with gateway_of(fake) as gateway:
        verdict = send(gateway, spool, entry)
    assert (verdict.accepted, verdict.reason) == (False, "the round has ended")
    assert fake.received == []


@pytest.mark.parametrize("forged", [{"committed": 5001}, {"state": State.STATE_UNSPECIFIED}])
def test_nonsense_is_refused_and_the_delta_stays(
    forged: dict[str, Any], fake: FakeGateway, spool: Spool, entry: Entry
) -> None:
    fake.forged = forged
    with gateway_of(fake) as gateway, pytest.raises(ProtocolError, match="the gateway says"):
        send(gateway, spool, entry)
    assert spool.entries() == [entry]


def test_a_gateway_without_progress_is_given_up(
    fake: FakeGateway, spool: Spool, entry: Entry
) -> None:
    fake.forged = {"committed": 0, "state": State.OPEN, "chunk_bytes": 1 << 31}
    with gateway_of(fake) as gateway, pytest.raises((ProtocolError, GatewayUnavailable)):
        send(gateway, spool, entry)
    assert spool.entries() == [entry]
    assert len(fake.received) <= 5


def test_a_delta_that_changed_on_the_disk_is_not_sent(
    fake: FakeGateway, spool: Spool, entry: Entry
) -> None:
    path = next(spool.folder.glob("*.delta"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with gateway_of(fake) as gateway:
        verdict = send(gateway, spool, entry)
    assert (verdict.accepted, verdict.reason) == (False, "damaged on this device's disk")
    assert fake.uploads == {}


def test_check_in(fake: FakeGateway, tmp_path: Path) -> None:
    told = capabilities(Home(tmp_path), 12)
    with gateway_of(fake) as gateway:
        assert check_in(gateway, told) == Window(min_s=60, max_s=180)
        fake.replies = [edge_pb2.CheckInReply(task=edge_pb2.Task(id="t-9"))]
        got = check_in(gateway, told, resume="t-8")
        assert isinstance(got, edge_pb2.Task)
        assert got.id == "t-9"
        fake.replies = [edge_pb2.CheckInReply()]
        with pytest.raises(ProtocolError, match="neither a task nor a time"):
            check_in(gateway, told)
    assert fake.asked[1].resume_task == "t-8"
    assert fake.asked[0].capabilities.examples == 12
    assert "joint" in fake.asked[0].capabilities.engines
    assert fake.asked[0].capabilities.memory_bytes > 0


def test_abort_says_why_in_few_words(fake: FakeGateway) -> None:
    with gateway_of(fake) as gateway:
        sync.abort(gateway, "t-1", "x" * 1000)
    assert fake.aborted == [("t-1", "x" * 200)]


def test_records_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\nb"}) + "\n\n" + "{}\n")
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",x\nb,y\n\n')
    (tmp_path / "none.csv").write_text("")
    np.savez(tmp_path / "a.npz", inputs=np.zeros((4, 2), np.float32), labels=np.zeros(4, int))
    counts = {path.name: count_records(path) for path in tmp_path.iterdir()}
    assert counts == {"a.jsonl": 2, "a.csv": 2, "none.csv": 0, "a.npz": 4}


def test_other_files_are_not_counted(tmp_path: Path) -> None:
    for name, content in (("a.txt", b"x"), ("b.npz", b"x"), ("c.csv", b"\xff\xfe\xff")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            count_records(tmp_path / name)
    with pytest.raises(DataError, match="nowhere"):
        count_records(tmp_path / "nowhere.csv")
