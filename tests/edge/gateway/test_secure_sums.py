"""Secure sums between a gateway and its devices: real gRPC, the devices' own code."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import pytest

from anabranch.edge.gateway.server import start
from anabranch.edge.gateway.store import Store
from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime.transport import GatewayUnavailable
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.tables import Federation
from tests.edge.phones import (
    SPEC,
    Made,
    called,
    deltas_of,
    give_up_on,
    ready,
    require_mean,
    result,
    time_is_up,
    trained,
    until,
    until_over,
)
from tests.gateway_cases import ended, open_round


def test_the_sum_is_the_mean_of_all_records(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(4)
    row, deltas = trained(gateway, adapter, devices)
    until_over(devices, gateway)
    assert [phone.word and phone.word.accepted for phone in devices] == [True] * 4
    got = result(gateway, row)
    require_mean(got, deltas)
    assert got.steps == 3
    assert not list(gateway.folder.spool.iterdir())
    frames = {wire.encode(delta) for delta in deltas}
    files = [path.read_bytes() for path in gateway.folder.folder.rglob("*") if path.is_file()]
    assert not any(frame[100:400] in data for frame in frames for data in files)


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "agree", "reveal"])
def test_a_dropout_at_any_stage_costs_its_own_delta_at_most(
    phones: Made, adapter: Adapter, stage: str
) -> None:
    gateway, devices = phones(5, secure={"threshold": 0.6})
    row, deltas = trained(gateway, adapter, devices)
    called(devices)  # they say that they have trained
    lost = devices[-1]
    alive = until(stage, [lost])
    until_over(devices, gateway, alive, late=lambda: give_up_on([lost], gateway, row))
    got = result(gateway, row)
    counted = 5 if stage in ("agree", "reveal") else 4  # its masked vector was there
    require_mean(got, deltas[:counted])
    assert [bool(phone.word and phone.word.accepted) for phone in devices[:4]] == [True] * 4
    clients = gateway.parts.store.row("SELECT clients FROM rounds")
    assert clients == {"clients": counted}


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "agree", "reveal"])
def test_below_the_threshold_nothing_is_opened_and_the_round_says_why(
    phones: Made, adapter: Adapter, stage: str
) -> None:
    gateway, devices = phones(4)
    row, _ = trained(gateway, adapter, devices)
    called(devices)
    lost = devices[2:]
    alive = until(stage, lost)
    until_over(devices, gateway, alive, late=lambda: give_up_on(lost, gateway, row))
    row = ended(gateway.parts.store, row)
    assert (row["state"], row["result"]) == ("refused", None)
    assert "secure sum: " in row["reason"]
    assert f"(lost: 2 at {stage})" in row["reason"]
    assert [phone.word and phone.word.accepted for phone in devices[:2]] == [False] * 2
    assert not gateway.folder.results.exists()


def test_a_masked_vector_is_sent_once_though_the_answer_was_lost(
    phones: Made, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, devices = phones(3)
    row, deltas = trained(gateway, adapter, devices)
    until_over(devices, gateway, until("mask", devices))
    phone = devices[0]
    call, upload = phone.gateway.stage, phone.gateway.upload
    gone: list[str] = []
    sent: list[int] = []

    def lost(request: edge_pb2.StageRequest) -> edge_pb2.StageReply:
        reply = call(request)
        if request.stage == "mask" and not gone:
            gone.append(request.stage)
            raise GatewayUnavailable("its answer is lost")
        return reply

    def counted(chunks: Iterable[edge_pb2.UploadChunk]) -> edge_pb2.UploadStatus:
        sent.append(1)
        return upload(chunks)

    monkeypatch.setattr(phone.gateway, "stage", lost)
    monkeypatch.setattr(phone.gateway, "upload", counted)
    with pytest.raises(GatewayUnavailable):
        phone.step()
    until_over(devices, gateway)
    require_mean(result(gateway, row), deltas)
    assert sent == [1]


def test_too_few_devices_have_trained(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(4)
    row, _ = trained(gateway, adapter, devices[:2])
    called(devices[:2])
    time_is_up(gateway, row)
    row = ended(gateway.parts.store, row)
    assert row["state"] == "refused"
    assert "2 devices have trained and are there, and a secure sum takes 3" in row["reason"]


def test_a_sum_takes_min_cohort_devices_as_any_round_does(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(5, min_cohort=4)
    row, _ = trained(gateway, adapter, devices[:3])
    called(devices[:3])
    time_is_up(gateway, row)
    reason = ended(gateway.parts.store, row)["reason"]
    assert "3 devices have trained and are there, and a secure sum takes 4" in reason


def test_with_uniform_weights_all_devices_count_the_same(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(3)
    federation = Federation(rounds=10, method="fedavg", deadline_s=600.0, weighting="uniform")
    row = open_round(gateway.opener, adapter, federation=federation)
    deltas = deltas_of(SPEC, 3)
    ready(devices, deltas)
    until_over(devices, gateway)
    got = result(gateway, row)
    assert got.num_examples == 5 + 6 + 7
    for name, array in got.arrays.items():
        expected = np.mean([delta.arrays[name] for delta in deltas], axis=0)
        np.testing.assert_allclose(array, expected, atol=1e-6)


def test_no_more_records_go_up_than_were_announced(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(3)
    row, _ = trained(gateway, adapter, devices)
    with gateway.parts.store.writing() as db:
        db.execute("UPDATE rounds SET described = 4")
    until_over(devices, gateway)
    assert result(gateway, row).num_examples == 4


def test_a_sum_begins_without_the_cohort_when_its_time_comes(
    phones: Made, adapter: Adapter
) -> None:
    gateway, devices = phones(5)
    row, deltas = trained(gateway, adapter, devices[:3])
    called(devices[:3])
    assert gateway.closer.due() == []
    time_is_up(gateway, row)
    until_over(devices[:3], gateway)
    require_mean(result(gateway, row), deltas)


def test_no_stage_goes_on_beyond_the_rounds_deadline(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(4)
    row, _ = trained(gateway, adapter, devices[:3])
    called(devices[:3])
    deadline = time.time() + 10.0  # less than a stage takes
    with gateway.parts.store.writing() as db:
        db.execute("UPDATE rounds SET deadline = ?", (deadline,))
    gateway.closer.due()
    assert gateway.parts.sums._running[row["id"]].until <= deadline


def test_devices_may_call_again_first_when_a_gateway_was_away(
    phones: Made, adapter: Adapter
) -> None:
    gateway, devices = phones(3)
    row, deltas = trained(gateway, adapter, devices)
    called(devices[:2])
    gateway.close(grace_s=0.1)
    store = Store(gateway.folder.state)
    with store.writing() as db:  # its time to begin a sum has passed, and nobody was heard
        db.execute("UPDATE rounds SET deadline = ?", (time.time() + 5 * 20.0,))
        db.execute("UPDATE tasks SET touched = 0")
    store.close()
    with start(gateway.folder.folder) as again:
        assert again.closer.due() == []
        until_over(devices, again)
        require_mean(result(again, row), deltas)


def test_who_is_away_when_the_sum_begins_is_not_asked(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(5)
    row, deltas = trained(gateway, adapter, devices[:4])
    called(devices[:4])
    with gateway.parts.store.writing() as db:
        db.execute("UPDATE tasks SET touched = 0 WHERE device = ?", (devices[3].name,))
    time_is_up(gateway, row)
    until_over(devices[:3], gateway)
    require_mean(result(gateway, row), deltas[:3])
    devices[3].step()
    word = devices[3].word
    assert word is not None
    assert (word.accepted, word.reason) == (False, "it was not there when the sum was made")
