from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.edge.runtime.conditions import Network
from anabranch.edge.runtime.sensors import (
    CpuSeconds,
    SystemSensors,
    default_interface,
    others_share,
)

HEADER = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def supply(name: str, **values: str) -> dict[str, str]:
    return {f"sys/class/power_supply/{name}/{key}": value for key, value in values.items()}


def route(interface: str) -> dict[str, str]:
    line = f"{interface}\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0"
    return {"proc/net/route": HEADER + line}


def test_nothing_is_there(tmp_path: Path) -> None:
    now = SystemSensors(tmp_path).read()
    assert (now.battery, now.charging, now.temperature_c, now.network) == (None,) * 4


@pytest.mark.parametrize(
    ("supplies", "battery", "charging"),
    [
        ({"BAT0": {"capacity": "71", "status": "Discharging"}}, 0.71, False),
        ({"BAT0": {"capacity": "71", "status": "Charging"}}, 0.71, True),
        ({"BAT0": {"capacity": "100", "status": "Full"}}, 1.0, True),
        ({"BAT0": {"capacity": "50", "status": "Unknown"}}, 0.5, None),
        ({"BAT0": {"status": "Charging"}}, 0.0, True),
        ({"BAT0": {"capacity": "80", "scope": "Device"}}, None, None),
        ({"BAT0": {"capacity": "80", "present": "0"}}, None, None),
        ({"BAT0": {"capacity": "80"}, "BAT1": {"capacity": "20"}}, 0.2, None),
        ({"BAT0": {"capacity": "80", "status": "Discharging"}, "AC": {"online": "1"}}, 0.8, True),
        ({"BAT0": {"capacity": "80", "status": "Discharging"}, "AC": {"online": "0"}}, 0.8, False),
        ({"AC": {"online": "1"}}, None, True),
    ],
)
def test_power(
    supplies: dict[str, dict[str, str]],
    battery: float | None,
    charging: bool | None,
    tmp_path: Path,
) -> None:
    for name, values in supplies.items():
        kind = "Mains" if name == "AC" else "Battery"
        write(tmp_path, supply(name, type=kind, **values))
    now = SystemSensors(tmp_path).read()
    assert (now.battery, now.charging) == (battery, charging)


def test_the_hottest_plausible_sensor_counts(tmp_path: Path) -> None:
    temps = {"thermal_zone0": "41500", "thermal_zone1": "-274000", "thermal_zone2": "38000",
             "thermal_zone3": "", "thermal_zone4": "999000"}  # fmt: skip
    write(tmp_path, {f"sys/class/thermal/{name}/temp": text for name, text in temps.items()})
    write(tmp_path, {"sys/class/thermal/cooling_device0/type": "Fan"})
    assert SystemSensors(tmp_path).read().temperature_c == 41.5


@pytest.mark.parametrize(
    ("interface", "answer", "network"),
    [
        ("eth0", "no", Network.unmetered),
        ("eth0", "no (guessed)", Network.unmetered),
        ("wlan0", "yes", Network.metered),
        ("wlan0", "yes (guessed)", Network.metered),
        ("wlan0", "unknown", None),
        ("wlan0", None, None),
        ("wwan0", None, Network.metered),
        ("wwan0", "no", Network.unmetered),
    ],
)
def test_network(
    interface: str, answer: str | None, network: Network | None, tmp_path: Path
) -> None:
    asked: list[str] = []

    def run(command: list[str]) -> str | None:
        asked.append(command[-1])
        return answer

    sensors = SystemSensors(write(tmp_path, route(interface)), run=run)
    assert sensors.read().network == network
    assert asked == [interface]


def test_no_default_route_is_offline(tmp_path: Path) -> None:
    lan = "eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0"
    write(tmp_path, {"proc/net/route": HEADER + lan})
    assert SystemSensors(tmp_path).read().network is Network.offline


def test_a_default_route_of_ipv6_alone(tmp_path: Path) -> None:
    zero = "0" * 32
    lines = [
        f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo",
        f"{zero} 00 {zero} 00 {zero} 00000400 00000001 00000000 00000003     eth1",
    ]
    write(tmp_path, {"proc/net/route": HEADER, "proc/net/ipv6_route": "\n".join(lines)})
    assert default_interface(tmp_path / "proc/net") == "eth1"


def test_own_work_is_no_load() -> None:
    before = CpuSeconds(total=100.0, busy=40.0, own=10.0)
    assert others_share(before, CpuSeconds(total=104.0, busy=43.0, own=13.0)) == 0.0
    assert others_share(before, CpuSeconds(total=104.0, busy=43.0, own=12.0)) == 0.25
    assert others_share(before, CpuSeconds(total=104.0, busy=40.0, own=11.0)) == 0.0
    assert others_share(before, before) is None


def test_this_machine_can_be_read() -> None:
    now = SystemSensors().read()
    assert now.idle in (True, False)
    assert now.battery is None or 0 <= now.battery <= 1
    assert now.local.tzinfo is not None
