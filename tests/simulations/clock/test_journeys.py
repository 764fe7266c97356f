"""One message at a time: when its answer is there, what it cost, and who is spared."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.flower import (
    pack_assignment,
    pack_evaluated,
    pack_trained,
    payload_bytes,
)
from anabranch.protocols import wire
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import RunError
from anabranch.protocols.messages import Assignment, Evaluated, Trained
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Uplink
from anabranch.simulations.clock.flops import Work
from anabranch.simulations.clock.journeys import DeviceJourneys
from anabranch.simulations.clock.payload import Payloads
from anabranch.simulations.grid import begin_run, number
from anabranch.simulations.virtual_grid import Bookkeeping
from tests.simulations.clock.virtual import Windows, devices_of, journeys_of, name
from tests.simulations.rig import SPEC, adapter, config

WORK = Work(prefix=2e9, forward=1e9, backward=2e9)
SPEEDS = st.floats(0.1, 50.0)
RUN = config(deadline_s=100.0)


def request(kind: str = "train", round: int = 1, part: Part | None = None) -> Message:
    begin_run()
    assignment = Assignment(run="toy-1", round=round, config=RUN, part=part or Part())
    content = pack_assignment(assignment, wire.encode(adapter()))
    message = Message(content, 1001, kind, group_id=str(round))
    number(message)
    return message


def one(
    journeys: DeviceJourneys, now: float = 0.0, **message: Any
) -> tuple[float | None, dict[str, Any]]:
    """Send one message to client 0; return what comes of it, and its row."""
    due = journeys.answered_at(0, request(**message), now)
    table = journeys.log().table()
    return due, {key: column[-1] for key, column in table.items()}


def of(
    records: int = 10, *, work: Work = WORK, pace: dict[str, Any] | None = None, **devices: Any
) -> DeviceJourneys:
    options = {
        key: devices.pop(key)
        for key in ("availability", "seed", "held", "memory_factor", "heartbeat_s")
        if key in devices
    }
    return journeys_of(
        RUN,
        [records],
        devices=devices_of(1, **devices),
        pace={"work": work, **(pace or {})},
        **options,
    )


# Laws


@settings(max_examples=60, deadline=None)
@given(
    slow=st.tuples(SPEEDS, SPEEDS, SPEEDS),
    faster=st.tuples(*[st.floats(1.0, 8.0)] * 3),
    sigma=st.sampled_from([0.0, 0.7]),
    dropout=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 9),
    partial=st.booleans(),
)
def test_a_faster_device_never_finishes_later_nor_with_fewer_steps(
    slow: tuple[float, float, float],
    faster: tuple[float, float, float],
    sigma: float,
    dropout: float,
    seed: int,
    partial: bool,
) -> None:
    pace = {"speed_sigma": sigma, "network_sigma": sigma, "partial_work": partial, "seed": seed}
    pace |= {"bytes_down": 4000, "bytes_up": 2000}

    def travel(speed: tuple[float, ...]) -> dict[str, Any]:
        gflops, up, down = speed
        fields: dict[str, Any] = {
            "gflops": gflops,
            "uplink_bps": 1e4 * up,
            "downlink_bps": 1e4 * down,
        }
        return one(of(pace=pace, dropout=dropout, seed=seed, **fields))[1]

    before = travel(slow)
    after = travel(tuple(a * b for a, b in zip(slow, faster, strict=True)))
    assert after["steps"] >= before["steps"]
    if not partial:
        assert not after["arrived_at"] > before["arrived_at"]  # NaN: both gave up
        assert math.isnan(after["arrived_at"]) == math.isnan(before["arrived_at"])


@settings(max_examples=60, deadline=None)
@given(
    gflops=SPEEDS,
    bps=st.floats(1e3, 1e8),
    records=st.integers(1, 400),
    begin=st.floats(0, 50),
    width=st.floats(1, 200),
    seed=st.integers(0, 9),
)
def test_nothing_lies_in_the_past_and_what_is_told_is_what_is_written(
    gflops: float, bps: float, records: int, begin: float, width: float, seed: int
) -> None:
    windows = Windows([(begin, begin + width), (begin + width + 20, 1e9)])
    fields: dict[str, Any] = {"gflops": gflops, "uplink_bps": bps, "downlink_bps": bps}
    fields["dropout"] = 0.3
    journeys = of(records, availability=windows, seed=seed, **fields)
    due, row = one(journeys, now=30.0)

    spent = row["download_s"] + row["compute_s"] + row["upload_s"]
    assert due is not None
    assert due >= 30.0
    if row["outcome"] in ("dropped", "offline"):
        assert math.isnan(row["arrived_at"])
        assert due >= 130.0  # heard of at the deadline, or when it is back
        assert due >= windows.next_online(0, 30.0 + spent)
    else:
        assert due == row["arrived_at"] == pytest.approx(30.0 + spent)
        assert (row["outcome"] == "late") == (due > 130.0)
    assert spent <= max(0.0, windows.online_until(0, 30.0) - 30.0) + 1e-9
    assert row["joules"] == pytest.approx(4 * row["compute_s"] + 2 * (spent - row["compute_s"]))
    assert row["grams"] == pytest.approx(row["joules"] / 3.6e6 * 481)


@settings(max_examples=60, deadline=None)
@given(gflops=st.floats(0.5, 20.0), bps=st.floats(1e3, 1e6), records=st.integers(1, 999))
def test_partial_work_is_in_time_whenever_one_step_is(
    gflops: float, bps: float, records: int
) -> None:
    fields: dict[str, Any] = {"gflops": gflops, "uplink_bps": bps, "downlink_bps": bps}
    sizes = {"bytes_down": 4000, "bytes_up": 2000}  # more than there are
    journeys = of(records, pace={"partial_work": True, **sizes}, **fields)
    _, row = one(journeys)
    fits = journeys.pace.steps(0, 1, int(row["planned"]))

    assert row["steps"] == max(1, fits) == journeys.pace(name(0), 1, int(row["planned"]))
    assert row["steps"] <= row["planned"]
    if fits:
        assert row["arrived_at"] <= 100.0
    whole = of(records, **fields)
    if one(whole)[0] <= 100.0 - 8 * 6000 / bps:  # type: ignore[operator]
        assert row["steps"] == row["planned"]


# Examples


def test_a_journey_by_hand() -> None:
    """64 records of 2 + 3 GFLOP at 4 GFLOP/s; a message of b bytes at 8 kbit/s, 1 s each way."""
    journeys = of(64, gflops=4.0, uplink_bps=8e3, downlink_bps=8e3, pace={"overhead_s": 1.0})
    message = request()
    due = journeys.answered_at(0, message, 5.0)
    log = journeys.log()

    assert log["bytes_down"].tolist() == [payload_bytes(message.content)]
    assert log["download_s"].tolist() == [1 + payload_bytes(message.content) / 1000]
    assert log["compute_s"].tolist() == [64 * 5 / 4]
    assert log["upload_s"].tolist() == [1 + log["bytes_up"][0] / 1000]
    assert due == 5 + log.seconds[0]
    assert (log["steps"][0], log["planned"][0]) == (2, 2)


@pytest.mark.parametrize(
    ("prefix", "seconds"), [("round", [5, 5]), ("run", [5, 3]), ("use", [5, 5])]
)
def test_a_frozen_prefix_is_computed_once_a_round_once_a_run_or_with_every_use(
    prefix: str, seconds: list[int]
) -> None:
    journeys = of(1, pace={"prefix": prefix})
    for turn in (1, 2):
        journeys.answered_at(0, request(round=turn), 0.0)

    assert journeys.log()["compute_s"].tolist() == seconds


def test_an_epoch_more_costs_no_second_prefix_unless_nothing_is_kept() -> None:
    once, every = of(10), of(10, pace={"prefix": "use"})
    assert once.pace.compute_s(0, 1, 3) == 10 * 2 + 30 * 3
    assert every.pace.compute_s(0, 1, 3) == 30 * 5
    private = of(100, pace={"private": True})
    assert private.pace.compute_s(0, 1, 7) == 100 * 2 + 7 * 32 * 3  # batches of 32 in the mean


def test_an_evaluation_costs_forward_passes_over_the_held_out_records() -> None:
    journeys = of(held=np.array([7]), uplink_bps=64.0)
    _, row = one(journeys, kind="evaluate")

    assert (row["kind"], row["outcome"], row["steps"]) == ("evaluate", "evaluated", 0)
    assert row["compute_s"] == 7 * 3
    assert (row["bytes_up"], row["upload_s"]) == (256, 32.0)


def test_who_is_there_is_asked_at_no_cost() -> None:
    journeys = of(gflops=1e-6)
    assert journeys.answered_at(0, request(kind="query.describe"), 9.0) == 9.0
    assert len(journeys.log()) == 0


def test_another_servers_messages_cost_what_they_weigh() -> None:
    begin_run()
    values = np.zeros(1000, np.float32)
    content = RecordDict({"weights": ArrayRecord({"w": Array(values)})})
    message = Message(content, 1001, "train", group_id="")
    number(message)
    journeys = of()
    journeys.answered_at(0, message, 0.0)
    log = journeys.log()

    assert payload_bytes(content) >= 4000
    assert log["bytes_down"][0] == log["bytes_up"][0] == payload_bytes(content)
    assert log["round"][0] == 0


@pytest.mark.parametrize(
    "uplink", [Uplink(), Uplink(codec="int8"), Uplink(codec="top-k", keep=0.3)]
)
@pytest.mark.parametrize("part", [Part(), Part(factors="B"), Part(ranks=(1,))])
def test_an_answer_has_the_bytes_it_is_said_to_have(uplink: Uplink, part: Part) -> None:
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in part.shapes(SPEC).items()}
    delta = Delta(SPEC, arrays, num_examples=123, part=part, steps=17)
    report = Trained(
        site=name(3), num_examples=123, steps=17, seconds=0.123456789, loss=0.123456789
    )
    frame = wire.encode(delta, codec=uplink.codec, keep=uplink.keep, rng=rng)
    said = Payloads(uplink).of(request(part=part).content, trains=True)[1]

    assert said == pytest.approx(payload_bytes(pack_trained(report, frame)), abs=128)
    metrics = Evaluated(site=name(3), num_examples=10, metrics={"accuracy": 0.123456789})
    assert payload_bytes(pack_evaluated(metrics)) <= 256


def test_heartbeats_tell_later_who_came_and_who_left() -> None:
    windows = Windows([(7.0, 40.0)])
    at_once, late = of(availability=windows), of(availability=windows, heartbeat_s=30.0)

    assert [list(at_once.reachable(t)) for t in (0, 6.9, 7, 39, 40)] == [[], [], [0], [0], []]
    assert [at_once.next_change(t) for t in (0, 6.9, 7, 39)] == [7.0, 7.0, 40.0, 40.0]
    assert [list(late.reachable(t)) for t in (0, 7, 29, 30, 45, 60)] == [[], [], [], [0], [0], []]
    assert [late.next_change(t) for t in (0, 7, 29, 30, 45)] == [30.0, 30.0, 30.0, 60.0, 60.0]
    assert math.isinf(late.next_change(60))


def test_among_many_clients_every_heartbeat_may_be_a_change() -> None:
    asked: list[float] = []

    class Watched(Windows):
        def next_change(self, at: float) -> float:
            asked.append(at)
            return super().next_change(at)

    windows = Watched(*[[(7.0 + i, 1e5)] for i in range(300)])
    journeys = journeys_of(RUN, [1] * 300, availability=windows, heartbeat_s=1.0)
    changes = [journeys.next_change(float(now)) for now in range(250)]

    assert changes == [max(7.0, now + 1.0) for now in range(250)]
    assert asked == [0.0, 100.0, 200.0]
    assert [len(journeys.reachable(float(now))) for now in (0, 7, 106, 306)] == [0, 1, 100, 300]


@given(beat=st.floats(0.01, 100), now=st.floats(0, 1e6))
def test_the_next_heartbeat_is_never_now(beat: float, now: float) -> None:
    journeys = of(availability=Windows([(now, now + 1e-3), (2e6, 3e6)]), heartbeat_s=beat)
    assert journeys.next_change(now) > now


def test_who_left_since_the_last_heartbeat_is_offline_at_no_cost() -> None:
    windows = Windows([(0.0, 35.0), (500.0, 1e6)])
    journeys = of(availability=windows, heartbeat_s=30.0)

    assert list(journeys.reachable(40.0)) == [0]
    due, row = one(journeys, now=40.0)
    assert (row["outcome"], row["joules"], row["bytes_down"]) == ("offline", 0.0, 0)
    assert due == 500.0


def test_who_never_comes_back_is_never_heard_of_again() -> None:
    journeys = of(availability=Windows([(0.0, 35.0)]))
    assert one(journeys, now=10.0)[0] is None


def test_replies_of_those_who_are_spared() -> None:
    slow, small = (
        of(gflops=0.01),
        of(memory_bytes=1000, work=Work(prefix=0, forward=1, backward=2, fixed_bytes=3_000_000)),
    )
    for journeys in (slow, small, of()):
        assert isinstance(journeys, Bookkeeping)
    late, refused, fine = request(), request(), request()
    slow.answered_at(0, late, 0.0)
    small.answered_at(0, refused, 0.0)
    healthy = of()
    healthy.answered_at(0, fine, 0.0)

    reply = slow.spared(0, late)
    assert reply is not None
    assert reply.error.reason == "late"
    said = small.spared(0, refused)
    assert said is not None
    assert b"training needs 3 MB of memory" in payload(said)
    assert healthy.spared(0, fine) is None
    healthy.hear("round_started", 0.0, {"round": 1})
    healthy.hear("round_aggregated", 9.0, {"round": 1, "sites": [], "ages": {}})
    over = healthy.spared(0, fine)
    assert over is not None
    assert over.has_error()
    healthy.hear("round_started", 9.0, {"round": 1})  # the coordinator lost that round
    assert healthy.spared(0, fine) is None


def payload(reply: Message) -> bytes:
    data = reply.content.config_records["message"]["json"]
    assert isinstance(data, bytes)
    return data


def test_a_pace_goes_to_other_processes_and_knows_its_clients() -> None:
    journeys = of(pace={"partial_work": True})
    copy = pickle.loads(pickle.dumps(journeys.pace))  # noqa: S301 - our own
    assert copy(name(0), 3, 9) == journeys.pace(name(0), 3, 9)
    for stranger in (name(1), "bergen", "client-", "client--1"):
        with pytest.raises(RunError, match="is not one of the 1 clients of the clock"):
            journeys.pace.client(stranger)
    named = of(pace={"index": {"bergen": 0}})
    assert named.pace.client("bergen") == 0
