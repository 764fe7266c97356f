"""Two hundred devices, among them slow, dead, repeating and lying ones; a server that is killed;
a network of 4 Mbit/s that loses 3 % of its packets and takes 200 ms.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from anabranch.edge.gateway.config import Limits
from anabranch.protocols import wire
from anabranch.protocols.adapter import Delta
from anabranch.protocols.spec import AdapterSpec
from benchmarks.edge.gateway_devices import Device, Died, enrol_many, patiently
from benchmarks.edge.gateway_load import (
    adapter_of,
    delta_of,
    new_gateway,
    opener_of,
    serve,
    spec_of,
)
from tests.gateway_cases import ended, open_round
from tests.network import Link, Network, NotPermitted

pytestmark = pytest.mark.slow

DEVICES = 200
KINDS = ("slow", "dead", "twice", "liar", *["plain"] * 6)
MEMORY_MB = 150  # above the idle server: 64 threads, two deltas being checked, one sum


def lie(spec: AdapterSpec, number: int) -> bytes:
    """Return what a device should not send."""
    frames = (
        wire.encode(delta_of(spec_of(1600), number)),
        wire.encode(delta_of(spec, number), codec="fp16"),
        wire.encode(delta_of(spec, number, examples=123_456)),
        bytes(5000),
    )
    return frames[number % len(frames)]


def take_part(device: Device, number: int, spec: AdapterSpec) -> str:
    """Take part as one of KINDS does; return the gateway's last word."""
    kind = KINDS[number % len(KINDS)]
    if patiently(device.check_in, 200).WhichOneof("outcome") != "task":
        return "no task"
    frame = lie(spec, number) if kind == "liar" else wire.encode(delta_of(spec, number))
    try:
        if kind == "dead":
            patiently(lambda: device.upload(frame, die_after=2), 200)
        pause = 0.02 if kind == "slow" else 0.0
        patiently(lambda: device.upload(frame, pause_s=pause), 200)
        if kind == "twice":
            patiently(lambda: device.upload(frame), 200)
            patiently(lambda: device.commit(frame), 200)
        return "counted" if patiently(lambda: device.commit(frame), 200).accepted else "refused"
    except Died:
        return "dead"
    finally:
        device.hang_up()


def test_two_hundred_devices_and_a_server_killed_three_times(tmp_path: Path) -> None:
    spec = spec_of(200_000)
    honest = [n for n in range(DEVICES) if KINDS[n % len(KINDS)] not in ("dead", "liar")]
    folder = new_gateway(
        tmp_path / "g",
        spec,
        cohort=len(honest),
        min_cohort=len(honest),
        over_selection=1.5,
        limits={"enrolments_a_minute": 10_000, "calls_a_minute": 10_000},
    )
    server = serve(folder)
    try:
        idle, peak = server.peak_mb(), 0.0
        fleet = enrol_many(folder, server, DEVICES)
        for device in fleet:
            device.check_in()
            device.hang_up()
        opener = opener_of(folder)
        began = time.perf_counter()
        row = open_round(opener, adapter_of(spec))
        done: list[str] = []
        lock = threading.Lock()

        def work(number: int) -> str:
            word = take_part(fleet[number], number, spec)
            with lock:
                done.append(word)
            return word

        with ThreadPoolExecutor(24) as pool:
            words = pool.map(work, range(DEVICES))
            for so_many in (20, 80, 140):
                while len(done) < so_many:
                    time.sleep(0.01)
                peak = max(peak, server.peak_mb())
                server.kill()
                server = serve(folder)
            said = list(words)
        row = ended(opener.store, row)
        seconds = time.perf_counter() - began
        peak = max(peak, server.peak_mb())
        assert server.stop() == 0
    finally:
        server.__exit__()
    expected = {"dead": "dead", "liar": "refused"}
    assert said == [expected.get(KINDS[n % len(KINDS)], "counted") for n in range(DEVICES)]
    assert (row["state"], row["clients"]) == ("closed", len(honest))
    assert opener.store.rows("SELECT count(*) AS n FROM counted") == [{"n": len(honest)}]
    mean = wire.decode_delta((folder.results / row["result"]).read_bytes(), spec)
    _require_mean(mean, [delta_of(spec, n) for n in honest])
    assert peak - idle < MEMORY_MB
    opener.store.close()
    sys.stderr.write(
        f"\n{DEVICES} devices, {spec.num_values} values: {len(honest) / seconds:.1f} devices/s, "
        f"peak {peak:.0f} MB, idle {idle:.0f} MB\n"
    )


def _require_mean(mean: Delta, deltas: list[Delta]) -> None:
    for name, array in mean.arrays.items():
        expected = np.mean([d.arrays[name] for d in deltas], axis=0, dtype=np.float64)
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7)


def test_a_flood_of_calls_is_refused_and_the_server_goes_on(tmp_path: Path) -> None:
    """More streams than calls: the rest hears RESOURCE_EXHAUSTED at once, nobody waits for ever."""
    spec = spec_of(50_000)
    settings = Limits(calls=4, calls_a_minute=10_000, calls_at_once=64)
    folder = new_gateway(tmp_path / "g", spec, cohort=8, min_cohort=8, limits=settings)
    with serve(folder) as server:
        fleet = enrol_many(folder, server, 8)
        for device in fleet:
            patiently(device.check_in)
        opener = opener_of(folder)
        row = open_round(opener, adapter_of(spec))
        for device in fleet:
            patiently(device.check_in)
        codes: list[grpc.StatusCode] = []

        def send(number: int) -> bool:
            frame = wire.encode(delta_of(spec, number))
            try:
                fleet[number].upload(frame, pause_s=0.1)
            except grpc.RpcError as error:
                codes.append(error.code())
            return bool(patiently(lambda: fleet[number].send(frame), 200).accepted)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(send, range(8)))
        row = ended(opener.store, row)
        assert (row["state"], row["clients"]) == ("closed", 8)
        assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for device in fleet:
            device.hang_up()
        opener.store.close()


def test_a_slow_lossy_network_loses_nothing() -> None:
    """4 Mbit/s, 3 % of the packets lost, 200 ms, in each direction."""
    try:
        with Network() as network:
            far, near = network.machine(), network.machine(Link(4e6, 0.03, 0.2))
            what = "--devices 12 --values 25000 --at-once 6"
            command = [sys.executable, "-m", "benchmarks.edge.gateway_load", *what.split()]
            command += ["--host", far.address, "--prefix", " ".join(far.prefix)]
            run = subprocess.run(
                [*near.prefix, *command], capture_output=True, text=True, timeout=240
            )
    except NotPermitted as error:
        pytest.skip(f"not permitted here: {error}")
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert (found["counted"], found["clients"]) == (12, 12)
    assert network.lost > 0
    assert network.carried > 12 * found["delta_mb"] * 1e6
    sys.stderr.write(f"\n{network.carried} bytes, {network.lost} packets lost: {found}\n")
