"""A gateway that lies about a secure sum, devices that lie to it, and a process that dies."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from anabranch.edge.gateway import secure, summing
from anabranch.edge.gateway.server import Gateway, start
from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import sync
from anabranch.edge.runtime.device_file import DEVICE_FILE, read_device
from anabranch.edge.runtime.peer import announced
from anabranch.edge.runtime.secure_task import require_allowed
from anabranch.edge.runtime.spool import Spool
from anabranch.edge.runtime.summing import Sum, require_not_given
from anabranch.edge.runtime.transport import GatewayRefused, NotAdmitted
from anabranch.edge.runtime.trust import new_key
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import DataError, DeviceError, PolicyError, ProtocolError
from tests.edge.phones import (
    SPEC,
    Made,
    begin,
    called,
    deltas_of,
    require_mean,
    result,
    trained,
    until,
    until_over,
)
from tests.gateway_cases import ended, row_of

TOLD = edge_pb2.Capabilities(runtime="test", engines=["joint"], examples=10)


def sum_of(gateway: Gateway, row: Any) -> dict[str, Any]:
    found = gateway.parts.store.row("SELECT * FROM sums WHERE round = ?", row["id"])
    assert found is not None
    return found


def test_a_gateway_that_is_started_anew_before_the_masks_makes_a_new_sum(
    phones: Made, adapter: Adapter
) -> None:
    gateway, devices = phones(4)
    row, deltas = trained(gateway, adapter, devices)
    until_over(devices, gateway, until("share", devices))
    gateway.close(grace_s=0.1)
    with start(gateway.folder.folder) as again:
        until_over(devices, again)
        require_mean(result(again, row), deltas)
        assert sum_of(again, row)["attempts"] == 2


@pytest.mark.parametrize("stage", ["mask", "agree", "reveal"])
def test_a_gateway_that_is_started_anew_after_that_asks_nobody_again(
    phones: Made, adapter: Adapter, stage: str
) -> None:
    gateway, devices = phones(4)
    row, _ = trained(gateway, adapter, devices)
    until_over(devices, gateway, until(stage, devices))
    for _ in range(3):
        gateway.closer.due()
    assert sum_of(gateway, row)["state"] == "masked"
    gateway.close(grace_s=0.1)
    with start(gateway.folder.folder) as again:
        until_over(devices, again)
        row = ended(again.parts.store, row)
    assert (row["state"], row["result"]) == ("refused", None)
    assert "they give one a round" in row["reason"]
    assert not any(phone.word and phone.word.accepted for phone in devices)


def test_a_device_that_is_started_anew_in_a_sum_has_dropped_out(
    phones: Made, adapter: Adapter
) -> None:
    gateway, devices = phones(5, secure={"threshold": 0.6})
    row, deltas = trained(gateway, adapter, devices)
    until_over(devices, gateway, until("mask", devices))
    lost = devices[4]
    assert lost.sum is not None
    lost.sum = Sum(lost.home, lost.sum.task, lost.sum.entry, lost.sum.spool)
    lost.step()
    running = gateway.parts.sums._running[row["id"]]

    def late() -> None:
        if running.aggregation.waiting() <= {lost.name}:
            running.until = 0.0

    until_over(devices, gateway, late=late)
    require_mean(result(gateway, row), deltas[:4])
    assert lost.word is not None
    assert (lost.word.accepted, lost.word.reason) == (False, "lost at stage mask")


def test_a_second_sum_of_the_same_round_is_refused(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(4)
    row, _ = trained(gateway, adapter, devices)
    until_over(devices, gateway)
    result(gateway, row)
    gateway.closer.due()  # waits for the turn that ended the round
    with gateway.parts.store.writing() as db:  # the same deltas, without one of them
        db.execute("UPDATE rounds SET state = 'open', result = NULL")
        db.execute("UPDATE sums SET state = 'collecting'")
        db.execute("UPDATE tasks SET state = 'trained', touched = 0")
    for phone in devices[:3]:
        assert phone.sum is not None
        again = Sum(phone.home, phone.sum.task, phone.sum.entry, phone.sum.spool)  # a new process
        phone.sum, phone.word = again, None
    called(devices[:3])
    gateway.parts.sums.file = msgspec.structs.replace(gateway.file, cohort=3)
    gateway.closer.due()
    for phone in devices[:3]:
        with pytest.raises(
            PolicyError, match="has given its delta of round 1 of run 'run' to a secure sum"
        ):
            phone.step()


def test_what_is_given_is_on_the_disk_before_the_masked_vector_leaves(
    phones: Made, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, devices = phones(4)
    trained(gateway, adapter, devices)
    until_over(devices, gateway, until("mask", devices))
    for _ in range(3):
        gateway.closer.due()
    phone = devices[0]
    seen: list[str] = []

    def stage(request: edge_pb2.StageRequest) -> edge_pb2.StageReply:
        if request.stage == "mask":
            with pytest.raises(PolicyError):
                require_not_given(phone.home, "run", 1)
        seen.append(request.stage)
        return call(request)

    call = phone.gateway.stage
    monkeypatch.setattr(phone.gateway, "stage", stage)
    require_not_given(phone.home, "run", 1)
    phone.step()
    assert "mask" in seen
    assert phone.home.sums.stat().st_mode & 0o777 == 0o600
    phone.home.sums.write_bytes(b"{")
    with pytest.raises(DeviceError, match="without it no secure sum is joined"):
        require_not_given(phone.home, "other", 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "0" * 64),
        ("config", "0" * 64),
        ("run", "another"),
        ("round", 2),
        ("limit", 2.0),
        ("minimum", 2),
        ("threshold", 0.9),
        ("colluding", 0.0),
        ("group", 2),
    ],
)
def test_other_terms_than_those_of_the_task_are_refused(
    phones: Made, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    gateway, devices = phones(3)

    def lying(*arguments: Any) -> Any:
        terms, roster = honest(*arguments)
        return msgspec.structs.replace(terms, **{field: value}), roster

    honest = secure.terms_of
    monkeypatch.setattr(summing, "terms_of", lying)
    trained(gateway, adapter, devices)
    called(devices)
    gateway.closer.due()
    for phone in devices:
        with pytest.raises(ProtocolError, match=f"secure sum: {field} .*nothing is sent"):
            phone.step()


def test_what_is_no_request_is_refused(
    phones: Made, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, devices = phones(3)
    trained(gateway, adapter, devices)
    phone = devices[0]
    for stage, content in (("advertise", b"{}"), ("advertise", b"\xff"), ("open", b"{}")):
        asked = edge_pb2.SumRequest(stage=stage, content=content)
        monkeypatch.setattr(
            phone.gateway, "stage", lambda request, a=asked: edge_pb2.StageReply(request=a)
        )
        with pytest.raises(ProtocolError, match="secure sum: "):
            phone.step()
    monkeypatch.setattr(phone.gateway, "stage", lambda request: edge_pb2.StageReply())
    with pytest.raises(ProtocolError, match="neither word nor time"):
        phone.step()


def test_a_delta_beyond_the_range_is_refused_before_the_sum(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(3, secure={"range": 0.5})
    begin(gateway, adapter)
    assert devices[0].ask()
    with pytest.raises(DataError, match=r"beyond the range of \+-0.5 of the secure sum"):
        devices[0].train(deltas_of(SPEC, 1)[0])


# What devices do to the gateway


@pytest.mark.parametrize("what", ["delta", "adapter"])
def test_what_was_damaged_on_the_disk_is_in_no_sum(
    phones: Made, adapter: Adapter, what: str
) -> None:
    gateway, devices = phones(3)
    trained(gateway, adapter, devices)
    phone = devices[0]
    (path,) = (phone.home.spool if what == "delta" else phone.home.cache).iterdir()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    called(devices)
    gateway.closer.due()
    with pytest.raises(DeviceError, match=f"{what}: damaged on this device's disk"):
        phone.step()


def test_a_delta_is_not_taken_in_the_clear(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(3)
    begin(gateway, adapter)
    phone = devices[0]
    assert phone.ask()
    assert phone.task is not None
    frame = wire.encode(deltas_of(SPEC, 1)[0])
    spool = Spool(phone.home.spool)
    entry = spool.put(phone.task.id, frame, examples=5, steps=3, deadline_unix=2**40)
    verdict = sync.send(phone.gateway, spool, entry)
    assert (verdict.accepted, "none is uploaded" in verdict.reason) == (False, True)
    commit = edge_pb2.CommitRequest(task=phone.task.id, upload="0" * 32, sha256=bytes(32))
    assert not phone.gateway.commit(commit).accepted
    assert not list(gateway.folder.spool.iterdir())


def test_bad_answers_change_nothing(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(4)
    row, deltas = trained(gateway, adapter, devices)
    called(devices)
    gateway.closer.due()
    phone, other = devices[:2]
    assert phone.task is not None
    assert other.sum is not None
    asked = phone.gateway.stage(edge_pb2.StageRequest(task=phone.task.id)).request
    stolen = other.sum._answer(asked)
    assert stolen is not None
    for reply, words in (
        (b"{}", "reply: "),
        (b"\xff", "reply: "),
        (stolen.reply, "sent the advert of"),
    ):
        request = edge_pb2.StageRequest(task=phone.task.id, stage="advertise", reply=reply)
        with pytest.raises(GatewayRefused, match=words):
            phone.gateway.stage(request)
    for stage in ("reveal", "open", "share"):  # out of turn: not taken, and told what is asked
        late = edge_pb2.StageRequest(task=phone.task.id, stage=stage, reply=b"{}")
        assert phone.gateway.stage(late).request.stage == "advertise"
    with pytest.raises(GatewayRefused, match="none of this name for this device"):
        other.gateway.stage(edge_pb2.StageRequest(task=phone.task.id))
    until_over(devices, gateway)
    require_mean(result(gateway, row), deltas)


def test_a_masked_vector_is_resumed_and_taken_once(
    phones: Made, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, devices = phones(4)
    row, deltas = trained(gateway, adapter, devices)
    phone = devices[0]
    call, upload, calls = phone.gateway.stage, phone.gateway.upload, []

    def twice(request: edge_pb2.StageRequest) -> edge_pb2.StageReply:
        call(request)  # its answer is lost
        return call(request)

    def cut(chunks: Any) -> edge_pb2.UploadStatus:
        calls.append(1)
        return upload(chunks if len(calls) > 1 else [next(iter(chunks))])

    monkeypatch.setattr(phone.gateway, "stage", twice)
    monkeypatch.setattr(phone.gateway, "upload", cut)
    until_over(devices, gateway)
    require_mean(result(gateway, row), deltas)
    assert not list(gateway.folder.spool.iterdir())


def test_who_is_late_with_its_masked_vector_is_told_why(
    phones: Made, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, devices = phones(3)
    trained(gateway, adapter, devices)
    until_over(devices, gateway, until("mask", devices))
    phone = devices[0]
    call = phone.gateway.begin_upload

    def late(request: edge_pb2.BeginUploadRequest) -> edge_pb2.UploadStatus:
        with gateway.parts.store.writing() as db:
            db.execute("UPDATE rounds SET state = 'refused', reason = 'the time was up'")
        return call(request)

    monkeypatch.setattr(phone.gateway, "begin_upload", late)
    phone.step()
    assert phone.word is not None
    assert (phone.word.accepted, phone.word.reason) == (False, "the time was up")


def test_the_gateway_pins_a_devices_key(phones: Made) -> None:
    gateway, (one, two) = phones(2, cohort=3)
    assert set(gateway.parts.store.peers()) == {one.name, two.name}
    assert one.home.peer_key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(GatewayRefused, match="did not sign"):  # a proof of another device
        sync.check_in(one.gateway, TOLD, peer=announced(two.home))
    one.home.peer_key.unlink()
    new_key(one.home.peer_key)
    with pytest.raises(NotAdmitted, match="this device has another one here"):
        one.ask()


def test_a_device_without_a_key_gets_no_task(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(3)
    with gateway.parts.store.writing() as db:
        db.execute("DELETE FROM peers WHERE device = ?", (devices[0].name,))
    begin(gateway, adapter)
    got = sync.check_in(devices[0].gateway, TOLD)
    assert not isinstance(got, edge_pb2.Task)
    assert devices[1].ask()


def test_a_revoked_device_is_in_no_sum(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(4, cohort=3)
    row, deltas = trained(gateway, adapter, devices[:3])
    called(devices[:2])
    gateway.parts.store.revoke(devices[2].name, 1.0)
    with pytest.raises(NotAdmitted, match="revoked"):
        devices[2].step()
    assert devices[3].ask()
    extra = deltas_of(SPEC, 4)[3]
    assert devices[3].ask(examples=extra.num_examples)
    devices[3].train(extra)
    left = [devices[0], devices[1], devices[3]]
    until_over(left, gateway)
    require_mean(result(gateway, row), [deltas[0], deltas[1], extra])
    assert row_of(gateway.parts.store, row)["clients"] == 3


# What the device's owner asks for


def test_the_owners_floors_stand_above_the_gateways_terms(phones: Made, adapter: Adapter) -> None:
    gateway, (phone, *_) = phones(3)
    begin(gateway, adapter)
    assert phone.ask()
    assert phone.task is not None
    file = phone.home.folder / DEVICE_FILE
    for text, words in (
        ("minimum = 4", "minimum = 3, and"),
        ("threshold = 0.9", "threshold = 0.66"),
        ("colluding = 0.2", "colluding = 0.1, and"),
        ("required = true", "roster: it is not signed"),
    ):
        file.write_text(f"[secure_aggregation]\n{text}\n")
        floors = read_device(phone.home.folder).secure_aggregation
        with pytest.raises(PolicyError, match=words):
            require_allowed(phone.task, floors, phone.home)
    plain = edge_pb2.Task(id="t")
    with pytest.raises(PolicyError, match="asks for the delta itself"):
        require_allowed(plain, floors, phone.home)


@pytest.mark.parametrize("floor", ["minimum = 20", "threshold = 0.9", "colluding = 0.3"])
def test_floors_that_are_raised_in_the_middle_of_a_sum_count(
    phones: Made, adapter: Adapter, floor: str
) -> None:
    gateway, devices = phones(3)
    trained(gateway, adapter, devices)
    until_over(devices, gateway, until("mask", devices))
    for _ in range(3):
        gateway.closer.due()
    for phone in devices:
        (phone.home.folder / DEVICE_FILE).write_text(f"[secure_aggregation]\n{floor}\n")

        with pytest.raises(PolicyError, match=r"of device\.toml asks for"):
            phone.step()

        assert phone.sum is not None
        assert phone.sum._member is not None
        assert phone.sum._member.stage == "mask"  # still: nothing was answered
