"""Tasks, lying devices, cohorts: what is counted and what is not."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.edge.gateway.config import Limits
from anabranch.edge.generated import edge_pb2
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Federation, Privacy, Training
from benchmarks.edge.gateway_load import delta_of, spec_of
from tests.gateway_cases import ended, open_round, row_of

Fleet = Callable[..., Any]


def test_a_device_has_one_task_in_a_round(fleet: Fleet, adapter: Adapter) -> None:
    gateway, devices = fleet(5, cohort=3, over_selection=1.0)
    assert devices[0].check_in().retry.min_seconds == 60
    open_round(gateway.opener, adapter)
    tasks = [device.check_in().task.id for device in devices]
    assert [bool(task) for task in tasks] == [True] * 3 + [False] * 2
    assert devices[0].check_in().task.id == tasks[0]
    devices[1].stub.Abort(edge_pb2.AbortRequest(task=tasks[1], reason="battery"), timeout=10)
    assert devices[3].check_in().task.id  # the place is free
    assert devices[1].check_in().WhichOneof("outcome") == "retry"


def test_a_dead_devices_place_is_given_to_another(fleet: Fleet, adapter: Adapter) -> None:
    gateway, (one, two) = fleet(
        2, cohort=1, min_cohort=1, over_selection=1.0, limits=Limits(lease_s=0.05)
    )
    open_round(gateway.opener, adapter)
    assert one.check_in().task.id
    time.sleep(0.06)
    assert two.check_in().task.id


def lies(spec: AdapterSpec) -> dict[str, tuple[bytes, str]]:
    honest = delta_of(spec, 0)
    nan = bytearray(wire.encode(honest))
    nan[-36:-32] = np.float32(np.nan).tobytes()
    nan[-32:] = hashlib.sha256(nan[:-32]).digest()
    return {
        "another adapter": (wire.encode(delta_of(spec_of(416), 0)), "delta is of adapter"),
        "another part": (wire.encode(delta_of(spec, 0, part=Part(factors="B"))), "delta is of"),
        "another codec": (wire.encode(honest, codec="fp16"), "delta is in fp16"),
        "an adapter": (wire.encode(Adapter(spec, dict(honest.arrays))), "expected kind 'delta'"),
        "NaN": (bytes(nan), "NaN"),
        "noise": (b"noise" * 100, "expected magic"),
        "too many examples": (wire.encode(delta_of(spec, 0, examples=999)), "examples"),
    }


def test_lying_devices_are_refused_and_the_round_goes_on(fleet: Fleet, adapter: Adapter) -> None:
    cases = lies(adapter.spec)
    gateway, devices = fleet(len(cases) + 2, cohort=99)
    row = open_round(gateway.opener, adapter)
    for device, (frame, words) in zip(devices, cases.values(), strict=False):
        device.check_in()
        device.upload(frame)
        reply = device.commit(frame, examples=999 if "examples" in words else None)
        assert (reply.accepted, words in reply.reason) == (False, True), reply.reason
        assert device.check_in().WhichOneof("outcome") == "retry"  # no second try in this round
    assert not list(gateway.folder.spool.iterdir())
    for seed, device in enumerate(devices[-2:]):
        device.check_in()
        assert device.send(wire.encode(delta_of(adapter.spec, seed))).accepted
    gateway.closer.due(now=row["deadline"])
    assert (
        row_of(gateway.parts.store, row)["state"],
        row_of(gateway.parts.store, row)["clients"],
    ) == ("closed", 2)


def test_a_huge_delta_is_clipped(fleet: Fleet, adapter: Adapter) -> None:
    gateway, devices = fleet(3, clipping_norm=1.0, cohort=99)
    row = open_round(gateway.opener, adapter)
    for seed, device in enumerate(devices):
        device.check_in()
        delta = delta_of(adapter.spec, seed).times(1e30 if seed == 0 else 1.0)
        assert device.send(wire.encode(delta)).accepted
    gateway.closer.due(now=row["deadline"])
    frame = (gateway.folder.results / row_of(gateway.parts.store, row)["result"]).read_bytes()
    assert wire.decode_delta(frame, adapter.spec).norm() <= 1.0 + 1e-6


def test_the_order_of_arrival_changes_no_bit(fleet: Fleet, adapter: Adapter) -> None:
    gateway, devices = fleet(4, cohort=99)
    frames = [wire.encode(delta_of(adapter.spec, seed, examples=10)) for seed in range(4)]
    results = []
    for number, order in enumerate(([0, 1, 2, 3], [3, 1, 0, 2]), start=1):
        row = open_round(gateway.opener, adapter, number)
        for device, which in zip(devices, order, strict=True):
            device.check_in()
            assert device.send(frames[which]).accepted
        gateway.closer.due(now=row["deadline"])
        results.append(row_of(gateway.parts.store, row)["result"])
    assert results[0] == results[1]


def test_below_the_minimum_cohort_nothing_leaves(fleet: Fleet, adapter: Adapter) -> None:
    gateway, devices = fleet(3, min_cohort=3)
    row = open_round(gateway.opener, adapter)
    for seed, device in enumerate(devices[:2]):
        device.check_in()
        assert device.send(wire.encode(delta_of(adapter.spec, seed))).accepted
    gateway.closer.due(now=row["deadline"])
    row = row_of(gateway.parts.store, row)
    assert (row["state"], row["result"]) == ("refused", None)
    assert "2 devices sent a delta that counts, min_cohort = 3" in row["reason"]
    assert not gateway.folder.results.exists()
    late = devices[2]
    assert late.check_in().WhichOneof("outcome") == "retry"


def test_what_comes_late_is_not_wanted(fleet: Fleet, adapter: Adapter) -> None:
    gateway, devices = fleet(3, cohort=2)
    row = open_round(gateway.opener, adapter)
    frames = [wire.encode(delta_of(adapter.spec, seed)) for seed in range(3)]
    for device in devices:
        device.check_in()
    devices[2].upload(frames[2])
    for device, frame in zip(devices[:2], frames, strict=False):
        device.send(frame)
    ended(gateway.parts.store, row)
    reply = devices[2].commit(frames[2])
    assert (reply.accepted, reply.reason) == (False, "the round has ended")
    assert devices[2].begin(frames[2]).state == edge_pb2.UploadStatus.NOT_WANTED


def test_a_private_task_names_its_mechanism(fleet: Fleet, adapter: Adapter) -> None:
    gateway, (device, small) = fleet(2, record_privacy={"records": 10})
    private: dict[str, Any] = {
        "privacy": Privacy(epsilon=8, delta=1e-4),
        "training": Training(local_steps=3, batch_size=2),
        "federation": Federation(rounds=2, method="ffa", deadline_s=600),
    }
    open_round(gateway.opener, adapter, part=Part(factors="B"), **private)
    small.examples = 9
    assert small.check_in().WhichOneof("outcome") == "retry"
    task = device.check_in().task
    assert task.privacy.sample_rate == pytest.approx(0.2)
    assert (task.privacy.clipping_norm, task.privacy.delta) == (1.0, 1e-4)
    assert task.privacy.noise_multiplier > 0
    assert msgspec.json.decode(task.part) == {"factors": "B", "ranks": None, "dense": True}
    part = Part(factors="B")
    wrong = delta_of(adapter.spec, 0, part=part)
    frame = wire.encode(type(wrong)(wrong.spec, wrong.arrays, 10, part=part, steps=99))
    device.upload(frame)
    refused_reply = device.commit(frame)
    assert not refused_reply.accepted
