"""What a run came to, and [clock]: from its table to journeys of a population."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.client.data.records import Records
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError
from anabranch.server.evaluation import initial_adapter
from anabranch.simulations import engines
from anabranch.simulations.clock.flops import Work
from anabranch.simulations.clock.log import RoundTimes, Row, log_of
from anabranch.simulations.clock.outcome import outcome, time_to
from anabranch.simulations.clock.pace import Pace
from anabranch.simulations.clock.table import ClockTable, build_journeys
from anabranch.simulations.population.client import Conduct
from anabranch.simulations.population.clients import Partition, PopulationClients
from tests.simulations.clock.virtual import AlwaysOnline, devices_of
from tests.simulations.rig import config

ROW = Row(
    client=0, kind=0, round=1, sent_at=0.0, download_s=1.0, compute_s=2.0, upload_s=1.0,
    arrived_at=4.0, bytes_down=100, bytes_up=10, joules=12.0, grams=0.5, steps=3, planned=3,
    outcome=0, merged_in=1, computed=True,
)  # fmt: skip
WORK = Work(prefix=0.0, forward=1e9, backward=2e9)


def row(**fields: Any) -> Row:
    return dataclasses.replace(ROW, **fields)


def times(number: int, *, own: float | None = None, clients: float | None = None) -> RoundTimes:
    return RoundTimes(
        round=number,
        started_at=10.0 * (number - 1),
        merged_at=10.0 * number - 2,
        ended_at=10.0 * number,
        coordinator={} if own is None else {"accuracy": own},
        client={} if clients is None else {"accuracy": clients},
    )


def test_an_outcome_by_hand() -> None:
    """Four requests of 4 s: merged, late, dropped after 2 s, surplus; and an evaluation of 2 s."""
    log = log_of(
        [
            row(),
            row(client=1, outcome=2, merged_in=0, computed=False),
            row(client=2, outcome=3, merged_in=0, computed=False, compute_s=1.0, upload_s=0.0,
                arrived_at=math.nan, bytes_up=0, joules=6.0, grams=0.25),
            row(client=1, outcome=1, merged_in=0),
            row(client=3, kind=1, outcome=7, merged_in=0, computed=False, compute_s=0.0),
        ]
    )  # fmt: skip
    devices = devices_of(
        4, kind=[0, 0, 1, 1], kinds=("phone", "hospital"), region=[0, 1, 1, 1],
        regions=("world", "at", "de"),
    )  # fmt: skip
    found = outcome(log, [times(1, own=0.5), times(2, own=0.8)], devices, [0.5, 0.75, 0.9])

    summary = found.summary()
    assert summary.pop("wasted_share") == pytest.approx(10 / 14)
    assert summary == {
        "virtual_seconds": 20.0,
        "rounds": 2,
        "metric": "accuracy",
        "time_to": {"0.5": 8.0, "0.75": 18.0, "0.9": None},
        "answers": {"merged": 1, "surplus": 1, "late": 1, "dropped": 1},
        "device_seconds": 14.0,
        "wasted": {"surplus": 4 / 14, "late": 4 / 14, "dropped": 2 / 14},
        "bytes_down": 500,
        "bytes_up": 40,
        "bytes_wasted": 320,
        "joules": 54.0,
        "joules_wasted": 30.0,
        "co2_grams": 2.25,
        "co2_grams_by_region": {"world": 0.5, "at": 1.75},
        "evaluation": {"seconds": 2.0, "joules": 12.0},
        "participation": {
            "gini": 0.75,
            "jain": 0.25,
            "never": 0.75,
            "by_class": {
                "phone": {
                    "clients": 2, "share_of_clients": 0.5, "share_of_merged": 1.0, "never": 0.5,
                },
                "hospital": {
                    "clients": 2, "share_of_clients": 0.5, "share_of_merged": 0.0, "never": 1.0,
                },
            },
        },
        "trained": 2,
        "trained_in_vain": 1,
    }  # fmt: skip
    assert found.round_table() == {
        "round": [1, 2],
        "started_at": [0.0, 10.0],
        "merged_at": [8.0, 18.0],
        "ended_at": [10.0, 20.0],
        "asked": [4, 0],
        "merged": [1, 0],
        "accuracy": [0.5, 0.8],
    }
    words = found.message_table()
    assert words["kind"].tolist() == ["train"] * 4 + ["evaluate"]
    assert words["outcome"].tolist() == ["merged", "late", "dropped", "surplus", "evaluated"]
    json.dumps(found.summary())


def test_metrics_of_the_clients_are_there_when_the_round_has_ended() -> None:
    assert time_to([times(1, clients=0.9)], "accuracy", 0.9) == 10.0
    assert time_to([times(1, clients=0.9, own=0.1)], "accuracy", 0.9) is None
    assert time_to([times(1, own=0.9)], "f1", 0.1) is None


def test_of_nothing_there_is_nothing() -> None:
    found = outcome(log_of([]), [], devices_of(2), [0.5])

    assert (found.seconds, found.device_seconds, found.wasted_share) == (0.0, 0.0, 0.0)
    assert found.time_to == {0.5: None}
    assert found.participation["never"] == 1.0
    json.dumps(found.summary())


# [clock]


def built(table: ClockTable, run: RunConfig | None = None, **options: Any) -> Pace:
    fields: dict[str, Any] = {"work": WORK, "sizes": np.array([5, 6])} | options
    journeys = build_journeys(
        table, devices_of(2), AlwaysOnline(), run or config(), seed=3, **fields
    )
    return journeys.pace


def test_a_table_says_how_fast_clients_are() -> None:
    table = msgspec.toml.decode(
        'overhead_s = 0.5\nprefix = "run"\nspeed_sigma = 0.2\nflops_per_record = 9e6\n',
        type=ClockTable,
    )
    pace = built(table)

    assert (pace.overhead_s, pace.prefix, pace.speed_sigma) == (0.5, "run", 0.2)
    assert (pace.work.prefix, pace.work.forward, pace.work.backward) == (0.0, 3e6, 6e6)
    assert (pace.deadline_s, pace.batch_size, pace.seed) == (60.0, 32, 3)
    assert built(ClockTable()).work == WORK
    assert built(ClockTable(flops_per_record=3.0), work=None).work.step == 3.0


def test_what_is_missing_or_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 clients and 2 devices"):
        built(ClockTable(), sizes=np.array([5, 6, 7]))
    with pytest.raises(ConfigError, match=r"clock.flops_per_record: expected a number"):
        built(ClockTable(), work=None)
    with pytest.raises(ConfigError, match=r"clock.partial_work needs the adapter's spec"):
        built(ClockTable(partial_work=True))
    private = msgspec.convert(
        msgspec.to_builtins(config())
        | {"privacy": {"epsilon": 3.0}, "training": {"local_steps": 3}},
        RunConfig,
    )
    with pytest.raises(ConfigError, match=r"partial_work does not go with \[privacy\]"):
        built(ClockTable(partial_work=True), private, spec=initial_adapter(private).spec)
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.toml.decode("deadline_s = 5", type=ClockTable)


@pytest.mark.parametrize("engine", ["sequential", "cohort"])
def test_clients_do_the_steps_that_the_clock_gives_them(
    engine: engines.Engine, tmp_path: Path
) -> None:
    """8 records in batches of 2, 2 epochs: 8 steps of 2 s for the slow one, who has 10 s."""
    run = msgspec.convert(
        msgspec.to_builtins(config(rounds=2, deadline_s=10.0, holdout=0.0))
        | {"training": {"batch_size": 2, "local_epochs": 2}},
        RunConfig,
    )
    rng = np.random.default_rng(0)
    records = Records(rng.normal(size=(16, 1)).astype(np.float32), rng.integers(0, 2, 16))
    partition = Partition(np.arange(16), np.array([0, 8, 16]), np.zeros(2, np.int64))
    start = initial_adapter(run)
    devices = devices_of(2, gflops=[1.0, 4.0])
    journeys = build_journeys(
        ClockTable(partial_work=True, flops_per_record=1e9),
        devices,
        AlwaysOnline(),
        run,
        None,
        0,
        sizes=partition.sizes,
        spec=start.spec,
    )
    clients = PopulationClients(
        records, partition, tmp_path, conduct=Conduct(step_limit=journeys.pace)
    )
    result = engines.run(engine, run, clients, start, run_name="toy-1", journeys=journeys)

    for report in result.history:
        assert [one.steps for _, one in sorted(report.trained.items())] == [4, 8]
    log = journeys.log()
    assert log["steps"].tolist() == [4, 8, 4, 8]
    assert log["compute_s"].tolist() == [8.0, 4.0, 8.0, 4.0]
    assert [one.merged_at - one.started_at for one in journeys.rounds()] == [8.0, 8.0]
