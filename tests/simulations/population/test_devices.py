"""Devices: drawn by the class's law, from tables whose every number says its source."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import ConfigError
from anabranch.simulations.population.devices import Devices, uniform_devices
from anabranch.simulations.population.devices_table import (
    DeviceClass,
    DevicesTable,
    Preset,
    require_consistent,
)
from anabranch.simulations.population.generator import TABLE, generate, preset, sources
from anabranch.simulations.population.regions import TABLE as REGIONS
from anabranch.simulations.population.regions import co2_grams, region_of, regions

PRESETS: list[Preset] = ["phones", "hospitals"]


def phone(**changes: object) -> DeviceClass:
    return msgspec.convert({"share": 1.0, "gflops": 10.0} | changes, DeviceClass)


@pytest.mark.parametrize("name", PRESETS)
def test_every_number_of_a_preset_says_where_it_is_from(name: Preset) -> None:
    said = sources(name)
    classes = preset(name)
    numbers = {
        f"{kind}.{field}"
        for kind, one in classes.items()
        for field, value in msgspec.to_builtins(one).items()
        if isinstance(value, float) and value != getattr(DeviceClass(share=1.0, gflops=1.0), field)
    }

    assert numbers <= said.keys()
    assert all(len(text) > 20 for text in said.values())


def test_the_preset_file_has_no_number_outside_a_sourced_one() -> None:
    file = msgspec.toml.decode(TABLE.read_bytes())
    for one in file["presets"].values():
        fields = [v for kind in one["classes"].values() for v in kind.values()]
        for value in (*fields, *one["regions"].values()):
            assert isinstance(value, str | bool) or set(value) == {"value", "source"}
            if isinstance(value, dict):
                assert value["source"].partition(":")[0] in file["sources"]


def test_every_region_says_its_year_and_source() -> None:
    comments = [line for line in REGIONS.read_text("utf-8").splitlines() if line.startswith("#")]
    for region in regions().values():
        assert 2020 <= region.year <= 2030
        assert any(line.split()[1:2] == [region.source] for line in comments), region
        assert 0 < region.g_per_kwh < 1000
        assert -12 <= region.utc_offset_h <= 14


def test_carbon_dioxide_is_energy_times_intensity() -> None:
    assert co2_grams(3.6e6, "world") == 481.0
    np.testing.assert_allclose(co2_grams([0.0, 7.2e6], "fr"), [0.0, 112.0])
    with pytest.raises(ConfigError, match=r"region 'atlantis' is not in the table.*world, ar"):
        co2_grams(1.0, "atlantis")


@given(seed=st.integers(0, 2**31), clients=st.integers(0, 60))
def test_the_seed_alone_decides_what_is_generated(seed: int, clients: int) -> None:
    once, again = (generate(preset("phones"), clients, seed) for _ in range(2))

    assert len(once.devices) == len(once.habits) == clients
    assert once.devices.gflops.tolist() == again.devices.gflops.tolist()
    assert once.devices.region.tolist() == again.devices.region.tolist()
    assert once.devices.utc_offset_h.tolist() == [
        region_of(once.devices.regions[k]).utc_offset_h for k in once.devices.region
    ]


def test_classes_have_their_shares_medians_and_spreads() -> None:
    classes = {
        "fast": phone(
            share=3.0,
            gflops=40.0,
            speed_spread=0.5,
            uplink_mbps=8.0,
            bandwidth_spread=0.9,
            regions={"de": 1.0, "us": 3.0},
        ),
        "slow": phone(gflops=5.0, memory_gb=2.0, dropout=0.1),
    }
    devices = generate(classes, 20_000, 1).devices
    fast = devices.kind == devices.kinds.index("fast")

    assert fast.mean() == pytest.approx(0.75, abs=0.015)
    assert np.median(devices.gflops[fast]) == pytest.approx(40.0, rel=0.03)
    assert np.log(devices.gflops[fast]).std() == pytest.approx(0.5, rel=0.03)
    assert np.median(devices.uplink_bps[fast]) == pytest.approx(8e6, rel=0.05)
    assert np.log(devices.uplink_bps[fast]).std() == pytest.approx(0.9, rel=0.03)
    us = devices.region == devices.regions.index("us")
    assert us[fast].mean() == pytest.approx(0.75, abs=0.02)
    assert set(devices.gflops[~fast].tolist()) == {5.0}
    assert set(devices.memory_bytes[~fast].tolist()) == {2_000_000_000}
    assert devices.dropout[~fast].tolist() == pytest.approx([0.1] * int((~fast).sum()))
    assert set(devices.region[~fast].tolist()) == {devices.regions.index("world")}


def test_ranks_are_those_of_the_classes_and_none_if_no_class_has_one() -> None:
    classes = {"big": phone(), "small": phone(max_rank=4)}
    made = generate(classes, 50, 0)

    assert made.max_ranks is not None
    assert made.max_ranks.tolist() == [[0, 4][k] for k in made.devices.kind]
    assert generate({"big": phone()}, 50, 0).max_ranks is None


def test_devices_are_taken_in_the_order_asked_for() -> None:
    devices = generate(preset("phones"), 10, 0).devices
    taken = devices.take(np.array([7, 7, 0]))

    assert taken.gflops.tolist() == [float(devices.gflops[k]) for k in (7, 7, 0)]
    assert taken.kinds == devices.kinds


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gflops", [1.0, 0.0], "gflops is 0 for a device, expected > 0"),
        ("compute_watts", [1.0, -2.0], "compute_watts is -2 for a device, expected >= 0"),
        ("uplink_bps", [1.0, np.nan], "uplink_bps holds a number that is not finite"),
        ("downlink_bps", [1.0], r"downlink_bps has shape \(1,\), expected \(2,\)"),
        ("dropout", [0.0, 1.0], r"dropout is outside \[0, 1\)"),
        ("utc_offset_h", [0.0, 15.0], "utc_offset_h is outside"),
    ],
)
def test_numbers_no_device_can_have_are_refused(
    field: str, value: list[float], message: str
) -> None:
    good = uniform_devices(2)
    fields = {name: getattr(good, name) for name in Devices.__dataclass_fields__}
    with pytest.raises(ConfigError, match=message):
        Devices(**fields | {field: np.array(value, np.float32)})


def test_an_index_beyond_the_classes_is_refused() -> None:
    good = uniform_devices(2)
    fields = {name: getattr(good, name) for name in Devices.__dataclass_fields__}
    with pytest.raises(ConfigError, match=r"kind holds 3, expected an index into \['device'\]"):
        Devices(**fields | {"kind": np.array([0, 3], np.int16)})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (DevicesTable(), "exactly one of preset, classes and trace, got none"),
        (DevicesTable(preset="phones", trace="x.csv"), "got preset and trace: remove all but one"),
        (DevicesTable(preset="phones", trace_format="fedscale"), "trace_format: there is no trace"),
        (DevicesTable(trace="x", trace_format="fedscale"), "gflop_per_sample: a FedScale trace"),
        (DevicesTable(trace="x", gflop_per_sample=1.0), 'only trace_format = "fedscale" has it'),
        (DevicesTable(preset="phones", availability_format="flash"), "availability_format: there"),
        (DevicesTable(preset="phones", period_s=10.0), "period_s: only a file of intervals"),
        (DevicesTable(preset="phones", rows="in-order"), "rows: there is no trace"),
        (
            DevicesTable(preset="phones", availability="x.csv", start_hour_utc=3.0),
            "start_hour_utc: the times of an availability file are virtual times",
        ),
        (
            DevicesTable(classes={"a": phone(availability="hours", opens=9.0, closes=9.0)}),
            "classes.a: opens 9, expected less than closes 9",
        ),
        (DevicesTable(classes={"a": phone(regions={"xx": 1.0})}), "region 'xx' is not in"),
    ],
)
def test_contradictions_are_refused_with_the_fix(table: DevicesTable, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_consistent(table)
