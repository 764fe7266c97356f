"""Trace files: read as what they are, and refused when they are anything else."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import AnabranchError, DataError
from anabranch.simulations.population import traces
from anabranch.simulations.population.plain_pickle import read_plain_pickle

HOUR = 3600.0
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


class Attack:
    """What a pickle can do: it names a function and its arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, Any]:
        return self._call


@given(value=PLAIN, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_come_back_from_every_protocol(value: Any, protocol: int) -> None:
    assert read_plain_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "hostile",
    [
        Attack(os.system, "touch pwned"),
        Attack(eval, "open('pwned', 'w')"),
        {1: {"computation": Attack(exec, "open('pwned', 'w')")}},
        collections.OrderedDict(a=1),
        np.float64(1.0),
        Path("pwned"),
        object,
        len,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_pickle_that_names_anything_is_refused_and_nothing_is_run(
    hostile: Any, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace").write_bytes(pickle.dumps(hostile, protocol))

    with pytest.raises(DataError, match=r"trace: a pickle with \w+, .*nothing was run"):
        traces.read_fedscale_devices(tmp_path / "trace", 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04r\xff\xff\xff\xffN.",  # LONG_BINPUT: a memo of 2^32 entries
        b"\x80\x04N",  # no STOP
        b"\x80\x04.",  # nothing on the stack
        b"\x80\x04h\x05.",  # GET of what was never stored
        b"\x80\x04K\x01K\x02s.",  # SETITEM on a number
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",  # a text of 2^63 bytes
        b"\x80\x04P1\n.",  # a persistent id
        b"",
    ],
    ids=["memo", "cut", "empty-stack", "unknown-memo", "setitem", "long-text", "persid", "empty"],
)
def test_broken_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_plain_pickle(data)


@given(data=st.binary(max_size=60))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        read_plain_pickle(b"\x80\x04" + data)


@pytest.mark.parametrize("as_pickle", [True, False])
def test_fedscale_devices(tmp_path: Path, as_pickle: bool) -> None:
    entries = {
        1: {"computation": 162.0, "communication": 5648.1},
        2: {"computation": 20, "communication": 100},
    }
    data = pickle.dumps(entries) if as_pickle else json.dumps(entries).encode()
    (tmp_path / "capacity").write_bytes(data)
    found = traces.read_fedscale_devices(tmp_path / "capacity", 0.6)

    assert found.devices.gflops.tolist() == pytest.approx([0.6 / 0.162, 30.0])
    assert found.devices.uplink_bps.tolist() == pytest.approx([5_648_100, 100_000])
    assert found.devices.kinds == ("fedscale",)
    assert found.max_ranks.tolist() == [0, 0]


def test_fedscale_intervals(tmp_path: Path) -> None:
    entries = {
        7: {"duration": 9, "active": [0, 50, 95], "inactive": [10, 40, 120], "finish_time": 100},
        8: {"active": [], "inactive": [], "finish_time": 60, "model": "phone"},
    }
    (tmp_path / "behave").write_bytes(pickle.dumps(entries))
    found = traces.read_fedscale_intervals(tmp_path / "behave")

    assert found.spans == [[(0.0, 10.0), (95.0, 100.0)], []]
    assert found.periods == [100.0, 60.0]
    online = found.of(np.array([1, 0, 0]))
    assert online.online(np.arange(3), 205.0).tolist() == [False, True, True]


FLASH = """2020-02-03 22:00:00\tscreen_lock
2020-02-03 22:05:00\tbattery_charged_on
2020-02-03 22:10:00\twifi
2020-02-03 23:00:00\t83.0%
2020-02-04 06:30:00\tscreen_unlock
2020-02-04 06:35:00\tscreen_lock
2020-02-04 06:40:00\tbattery_charged_off
2020-02-09 23:00:00\tbattery_charged_on
2020-02-10 01:00:00\t4G
"""


def test_flash_intervals(tmp_path: Path) -> None:
    """Monday, 3 February 2020; the Sunday night goes over the end of the week."""
    (tmp_path / "states.json").write_text(json.dumps({"a": {"messages": FLASH, "model": "x"}}))
    found = traces.read_flash_intervals(tmp_path / "states.json")
    day = 24 * HOUR

    assert found.spans == [
        [
            (0.0, HOUR),
            (22 * HOUR + 600, day + 6.5 * HOUR),
            (day + 6.5 * HOUR + 300, day + 6.5 * HOUR + 600),
            (6 * day + 23 * HOUR, 7 * day),
        ]
    ]
    assert found.periods == [traces.WEEK]
    assert found.of(np.array([0])).online_until(0, 6 * day + 23.5 * HOUR) == 7 * day + HOUR


def test_our_own_devices_as_csv_and_toml(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(
        "kind,gflops,uplink_bps,downlink_bps,region,max_rank\n"
        "phone,8.5,4e6,2e7,in,4\n"
        "server,500,1e8,1e8,,0\n"
    )
    (tmp_path / "d.toml").write_text(
        '[[devices]]\nkind = "phone"\ngflops = 8.5\nuplink_bps = 4e6\ndownlink_bps = 2e7\n'
        'region = "in"\nmax_rank = 4\n'
        '[[devices]]\nkind = "server"\ngflops = 500\nuplink_bps = 1e8\ndownlink_bps = 1e8\n'
    )
    for name in ("d.csv", "d.toml"):
        found = traces.read_devices(tmp_path / name)
        assert [found.devices.kinds[k] for k in found.devices.kind] == ["phone", "server"]
        assert found.devices.gflops.tolist() == [8.5, 500.0]
        assert found.devices.utc_offset_h.tolist() == [5.5, 0.0]
        assert [found.devices.regions[k] for k in found.devices.region] == ["in", "world"]
        assert found.max_ranks.tolist() == [4, 0]


def test_our_own_intervals(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("device,begin_s,end_s\n1,50,60\n1,0,10\n1,10,20\n")
    found = traces.read_intervals(path, 2, 100.0)

    assert found.spans == [[], [(0.0, 20.0), (50.0, 60.0)]]
    assert found.of(np.array([1])).next_online(0, 70.0) == 100.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind,gflops,uplink_bps\nphone,1,1\n", "row 1: .*downlink_bps"),
        ("kind,gflops,uplink_bps,downlink_bps\nphone,fast,1,1\n", r"row 1: .*\$\.gflops"),
        ("kind,gflops,uplink_bps,downlink_bps,colour\np,1,1,1,red\n", "row 1: .*colour"),
        ("kind,gflops,uplink_bps,downlink_bps\np,1,1\n", "row 1: expected as many cells"),
        ("kind,gflops,uplink_bps,downlink_bps\n", "no device; expected one row per device"),
        ("kind,gflops,uplink_bps,downlink_bps\np,0,1,1\n", "gflops is 0 for a device"),
        ("kind,gflops,uplink_bps,downlink_bps,region\np,1,1,1,xx\n", "region 'xx' is not in"),
    ],
)
def test_bad_device_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(AnabranchError, match=message):
        traces.read_devices(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2,0,1", "row 1: device 2, expected 0 to 1"),
        ("0,5,5", "row 1: expected 0 <= begin_s < end_s <= 100"),
        ("0,5,101", "row 1: expected 0 <= begin_s < end_s <= 100"),
        ("0,x,1", "row 1: expected numbers in the columns"),
        ("0,nan,1", "row 1: expected 0 <= begin_s"),
    ],
)
def test_bad_interval_files_are_refused(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(f"device,begin_s,end_s\n{row}\n")
    with pytest.raises(DataError, match=message):
        traces.read_intervals(tmp_path / "a.csv", 2, 100.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[1, 2]", "nothing was run"),
        (b"{}", "expected a dictionary with one entry per device"),
        (b'{"1": 5}', "device '1': expected a dictionary, got int"),
        (b'{"1": {"computation": 5}}', "device '1': expected computation and communication"),
        (b'{"1": {"computation": true, "communication": 1}}', "expected computation and"),
        (b'{"1": {"computation": NaN, "communication": 1}}', "expected computation and"),
    ],
)
def test_bad_fedscale_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(DataError, match=message):
        traces.read_fedscale_devices(tmp_path / "t", 1.0)


def test_bad_behaviour_and_state_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"1": {"active": [0], "inactive": ["x"], "finish_time": 5}}')
    with pytest.raises(DataError, match="device '1': expected active, inactive"):
        traces.read_fedscale_intervals(path)
    path.write_text(json.dumps({"u": {"messages": "yesterday\twifi"}}))
    with pytest.raises(DataError, match="device 'u': time data 'yesterday'"):
        traces.read_flash_intervals(path)
    path.write_text(json.dumps({"u": {"messages": "2020-02-03 22:00:00 wifi"}}))
    with pytest.raises(DataError, match="no tab between time and state"):
        traces.read_flash_intervals(path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        traces.read_devices(tmp_path / "nowhere.csv")


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda p: (float(p[0]), float(p[1])))
    )
)
def test_merging_keeps_what_is_covered_and_leaves_gaps(spans: list[tuple[float, float]]) -> None:
    union = traces.merged(spans)

    for at in np.arange(0.0, 51.0, 0.5):
        assert any(b <= at < e for b, e in spans) == any(b <= at < e for b, e in union)
    assert all(a[1] < b[0] for a, b in pairwise(union))
