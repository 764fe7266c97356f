"""[population] and [devices] of an experiment file, down to what the engines take."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.errors import ConfigError, DataError
from anabranch.simulations.population.availability import AlwaysOnline, Synthetic
from anabranch.simulations.population.clients import PopulationClients
from anabranch.simulations.population.devices_table import DevicesTable
from anabranch.simulations.population.table import Built, PopulationTable, build_population

RUN = """
name = "notes"
seed = 1

[task]
kind = "text-classification"
labels = ["calm", "urgent"]

[data.columns]
text = { type = "text" }
label = { type = "label" }

[model]
base = "minilm"

[training]
holdout = 0.2

[federation]
rounds = 2
"""
WARDS = ["north", "south", "east"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "ward", "beds"])
        for i in range(120):
            label = ["calm", "urgent"][i % 3 == 0]
            writer.writerow([f"note {'very ' * (i % 7)}{i}", label, WARDS[i % 3], i // 2])
    return tmp_path


def run() -> RunConfig:
    return parse(RUN, source="run.toml")


def build(folder: Path, devices: DevicesTable | None = None, **options: Any) -> Built:
    table = msgspec.convert({"data": "train.csv"} | options, PopulationTable)
    return build_population(table, devices, run(), folder=folder, seed=3)


@pytest.mark.parametrize(
    "options",
    [
        {"partition": "iid", "clients": 10},
        {"partition": "quantity", "clients": 10, "spread": 0.5},
        {"partition": "dirichlet", "clients": 10, "alpha": 0.5, "sizes": "dirichlet"},
        {"partition": "shards", "clients": 10},
        {"partition": "feature", "clients": 10, "bins": 5, "alpha": 0.1},
        {"partition": "feature", "clients": 10, "bins": 5, "column": "beds"},
        {"partition": "natural", "column": "ward"},
    ],
)
def test_every_partition_is_built_from_a_file(folder: Path, options: dict[str, Any]) -> None:
    built, again = build(folder, **options), build(folder, **options)

    assert sorted(built.partition.rows.tolist()) == list(range(120))
    assert built.partition.rows.tolist() == again.partition.rows.tolist()
    assert 10 < built.partition.held.sum() < 40
    assert built.devices is None is built.availability


def test_natural_clients_have_the_records_of_their_value(folder: Path) -> None:
    built = build(folder, partition="natural", column="ward")

    assert built.values == ("east", "north", "south")
    rows = [*built.partition.train(1).tolist(), *built.partition.held_out(1).tolist()]
    assert sorted(rows) == list(range(0, 120, 3))


def test_a_column_orders_the_records_of_a_feature_partition(folder: Path) -> None:
    built = build(
        folder, partition="feature", clients=6, bins=6, column="beds", alpha=1e-3,
        records_per_client=15, reuse=True,
    )  # fmt: skip
    spans = [int(np.ptp(built.partition.train(i))) for i in range(6)]
    assert max(spans) < 40  # of 120: nearly everybody has one stretch


def test_more_clients_than_records(folder: Path) -> None:
    options = {"clients": 500, "partition": "dirichlet", "records_per_client": 20, "reuse": True}
    built = build(folder, DevicesTable(preset="phones"), **options)

    assert built.partition.sizes.tolist() == [16] * 500
    assert built.devices is not None
    assert len(built.devices) == 500
    assert isinstance(built.availability, Synthetic)
    assert built.max_ranks is None


def test_an_own_seed_changes_the_population_and_not_the_run(folder: Path) -> None:
    one = build(folder, clients=10)
    other = build(folder, clients=10, seed=4)

    assert one.partition.rows.tolist() != other.partition.rows.tolist()


def test_a_trace_gives_devices_ranks_and_availability_row_by_row(folder: Path) -> None:
    (folder / "d.csv").write_text(
        "kind,gflops,uplink_bps,downlink_bps,max_rank\na,1,1,1,0\nb,2,1,1,4\nc,3,1,1,0\n"
    )
    (folder / "on.csv").write_text("device,begin_s,end_s\n1,10,20\n2,30,40\n")
    table = DevicesTable(trace="d.csv", availability="on.csv", period_s=100.0)
    built = build(folder, table, clients=8)
    devices, availability = built.devices, built.availability

    assert devices is not None
    assert availability is not None
    assert built.max_ranks is not None
    expected = {1.0: (0, float("inf")), 2.0: (4, 10.0), 3.0: (0, 30.0)}
    for client in range(8):
        rank, first = expected[float(devices.gflops[client])]
        assert (built.max_ranks[client], availability.next_online(client, 0.0)) == (rank, first)


def test_devices_in_order_are_those_of_the_file(folder: Path) -> None:
    rows = "\n".join(f"a,{i + 1},1,1" for i in range(12))
    (folder / "d.csv").write_text(f"kind,gflops,uplink_bps,downlink_bps\n{rows}\n")
    built = build(folder, DevicesTable(trace="d.csv", rows="in-order"), clients=10)
    drawn = build(folder, DevicesTable(trace="d.csv"), clients=10)

    assert built.devices is not None
    assert drawn.devices is not None
    assert built.devices.gflops.tolist() == [float(i + 1) for i in range(10)]
    assert len(set(drawn.devices.gflops.tolist())) == 10
    assert isinstance(built.availability, AlwaysOnline)
    with pytest.raises(DataError, match="12 devices for 13 clients: take fewer"):
        build(folder, DevicesTable(trace="d.csv", rows="in-order"), clients=13)


def test_classes_can_have_the_intervals_of_a_trace(folder: Path) -> None:
    (folder / "on.csv").write_text("device,begin_s,end_s\n1,10,20\n")
    table = DevicesTable(preset="hospitals", availability="on.csv")
    built = build(folder, table, clients=3)

    assert built.availability is not None
    assert built.availability.online(np.arange(3), 15.0).tolist() == [False, True, False]


def test_fedscale_and_flash_files_are_used_together(folder: Path) -> None:
    capacity = {i: {"computation": 10.0 * i, "communication": 1000.0} for i in range(1, 4)}
    (folder / "cap").write_bytes(pickle.dumps(capacity))
    behave = {i: {"active": [0], "inactive": [i], "finish_time": 10} for i in range(1, 6)}
    (folder / "behave").write_bytes(pickle.dumps(behave))
    table = DevicesTable(
        trace="cap",
        trace_format="fedscale",
        gflop_per_sample=0.6,
        availability="behave",
        availability_format="fedscale",
    )
    built = build(folder, table, clients=20)

    assert built.devices is not None
    assert built.availability is not None
    found = {round(v) for v in built.devices.gflops.tolist()}
    assert found == {60, 30, 20}
    assert {built.availability.online_until(i, 0.0) for i in range(20)} <= {1.0, 2.0, 3.0, 4.0, 5.0}


def test_what_is_built_can_be_pickled_for_other_processes(folder: Path) -> None:
    built = build(folder, DevicesTable(preset="phones"), clients=5)
    clients = PopulationClients(built.records, built.partition, folder)
    again = pickle.loads(pickle.dumps((clients, built.availability)))  # noqa: S301

    assert again[0].partition.rows.tolist() == built.partition.rows.tolist()
    assert again[1].next_online(2, 5.0) == built.availability.next_online(2, 5.0)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "iid"}, "population.clients: partition = 'iid' needs a number"),
        ({"clients": 2, "alpha": 1.0}, "alpha: partition = 'iid' does not have it, only dirich"),
        ({"clients": 2, "partition": "dirichlet", "shards": 2}, "shards: partition = 'dirichlet'"),
        ({"clients": 2, "partition": "shards", "sizes": "equal"}, "sizes: partition = 'shards'"),
        ({"partition": "natural"}, "column: a natural partition needs the name of a column"),
        ({"partition": "natural", "column": "bed"}, "no column 'bed', only"),
        ({"clients": 2, "reuse": True}, "records_per_client: reuse = true needs it"),
        (
            {"partition": "natural", "column": "ward", "records_per_client": 3},
            "takes the records as they are",
        ),
        ({"clients": 2, "spread": 0.5}, "spread: equal sizes have none"),
        ({"clients": 2, "partition": "quantity", "sizes": "equal"}, 'sizes: "equal" is partition'),
        ({"clients": 2, "records_per_client": 3, "min_records": 4}, "4 is more than records_per"),
    ],
)
def test_contradictions_are_refused_naming_the_option(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(folder, **options)


def test_a_column_of_words_orders_nothing(folder: Path) -> None:
    with pytest.raises(DataError, match="'ward' is not a column of numbers"):
        build(folder, clients=3, partition="feature", column="ward")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="colour"):
        msgspec.convert({"data": "x.csv", "colour": 1}, PopulationTable)
