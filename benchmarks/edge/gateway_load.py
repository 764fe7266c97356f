"""One round of a gateway whose devices send a delta that is made up.

    python -m benchmarks.edge.gateway_load --devices 200 --values 1000000

prints one line: devices per second (enrolment apart), the server's peak memory. Tests use the
same gateways and deltas.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.edge.gateway.asking import Opener
from anabranch.edge.gateway.config import GatewayFile, GatewayFolder
from anabranch.edge.gateway.config import Limits as GatewayLimits
from anabranch.edge.gateway.operator import make_gateway
from anabranch.edge.gateway.published import Shelf
from anabranch.edge.gateway.store import Store
from anabranch.edge.runtime.bundle_manifest import ADAPTER, MANIFEST, SIGNATURE, Limits, Manifest
from anabranch.edge.runtime.manifest import File
from anabranch.edge.runtime.trust import public_bytes, sign
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.messages import Assignment
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Column, Contract, Federation, Lora, Model, Task, Training
from benchmarks.edge.gateway_devices import HOST, Device, enrol_many, patiently

LABELS = ("no", "yes")


def spec_of(values: int) -> AdapterSpec:
    """Return a spec of about `values` values: one adapted layer of rank 8, and a bias."""
    width = max(1, values // 16)
    tensors = (
        ("head.bias", (len(LABELS),)),
        ("layer.lora_A.weight", (8, width)),
        ("layer.lora_B.weight", (width, 8)),
    )
    return AdapterSpec(
        base="a" * 64, tokenizer="", rank=8, alpha=16, targets=("layer",), tensors=tensors
    )


def config_of(**tables: Any) -> RunConfig:
    """Return a run's configuration; `tables` replace those here."""
    given: dict[str, Any] = {
        "name": "load",
        "task": Task(kind="tabular-classification", labels=LABELS),
        "data": Contract(columns={"x": Column(type="number"), "y": Column(type="label")}),
        "model": Model(base="mlp"),
        "federation": Federation(rounds=10, method="fedavg", deadline_s=600),
        "lora": Lora(rank=8, targets=("layer",)),
        "training": Training(local_steps=3, batch_size=8),
    }
    return RunConfig(**(given | tables))


def adapter_of(spec: AdapterSpec, seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in spec.tensors}
    return Adapter(spec, arrays)


def delta_of(
    spec: AdapterSpec, seed: int, *, examples: int = 10, part: Part | None = None
) -> Delta:
    rng = np.random.default_rng(1000 + seed)
    part = Part() if part is None else part
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in part.shapes(spec).items()}
    return Delta(spec, arrays, examples, part=part, steps=3)


def write_bundle(folder: Path, spec: AdapterSpec, key: Ed25519PrivateKey, version: int = 1) -> Path:
    """Write a signed bundle that holds an adapter and nothing to run."""
    folder.mkdir(parents=True)
    frame = wire.encode(adapter_of(spec))
    (folder / ADAPTER).write_bytes(frame)
    sha = hashlib.sha256(frame).hexdigest()
    manifest = Manifest(
        name="codes",
        version=version,
        created="2026-01-01T00:00:00Z",
        task="tabular-classification",
        labels=LABELS,
        inputs=("features",),
        shape=(1,),
        spec=spec,
        adapter=sha,
        config="c" * 64,
        training=Training(),
        graphs={},
        artifacts=False,
        measured={},
        limits=Limits(memory_bytes=1 << 30, max_records=64, max_tokens=1),
        versions={},
        files={ADAPTER: File(bytes=len(frame), sha256=sha)},
    )
    data = msgspec.json.encode(manifest)
    (folder / MANIFEST).write_bytes(data)
    (folder / SIGNATURE).write_bytes(sign(data, key))
    return folder


def new_gateway(folder: Path, spec: AdapterSpec, **settings: Any) -> GatewayFolder:
    """Make a gateway's folder that serves one bundle, on ports that are free."""
    key = Ed25519PrivateKey.generate()
    write_bundle(folder.parent / f"{folder.name}-bundle", spec, key)
    port, enroll_port = free_ports(2)
    given: dict[str, Any] = {
        "name": "north",
        "hosts": (HOST, "127.0.0.1"),
        "address": "127.0.0.1",
        "port": port,
        "enroll_port": enroll_port,
        "bundles": (str(folder.parent / f"{folder.name}-bundle"),),
        "bundle_keys": (public_bytes(key).hex(),),
        "cohort": 3,
        "min_cohort": 2,
    }
    make_gateway(folder, msgspec.convert(given | settings, GatewayFile))
    return GatewayFolder(folder)


def free_ports(count: int) -> list[int]:
    """Return so many different TCP ports that nobody listens on now."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


def opener_of(folder: GatewayFolder) -> Opener:
    """Return what the Flower side opens rounds with."""
    file = folder.read()
    keys = [bytes.fromhex(key) for key in file.bundle_keys]
    shelf = Shelf(folder.bundles(file), keys, folder.files)
    return Opener(folder, file, Store(folder.state), shelf)


@dataclass
class Server:
    """`anabranch edge gateway serve` in a process of its own."""

    process: subprocess.Popen[str]
    port: int
    enroll_port: int

    def peak_mb(self) -> float:
        """Return the peak resident memory so far."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in text.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    def kill(self) -> None:
        """End it as a power cut would (SIGKILL)."""
        self.process.kill()
        self.process.wait(30)
        self._drop()

    def stop(self) -> int:
        """End it as a service manager would (SIGTERM); return its exit status."""
        self.process.terminate()
        status = self.process.wait(30)
        self._drop()
        return status

    def _drop(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


def serve(folder: GatewayFolder, prefix: tuple[str, ...] = ()) -> Server:
    """Start the server; return when it listens. `prefix`: a command around it."""
    log = (folder.folder / "serve.log").open("a")
    command = [sys.executable, "-m", "anabranch.cli.main", "edge", "gateway", "serve", "--json"]
    process = subprocess.Popen(
        [*prefix, *command, str(folder.folder)], stdout=subprocess.PIPE, stderr=log, text=True
    )
    log.close()
    text = ""
    for line in process.stdout or ():
        text += line
        if line.startswith("}"):
            break
    if not text:
        process.wait(10)
        raise RuntimeError((folder.folder / "serve.log").read_text()[-2000:])
    return Server(process, **json.loads(text))


def load(
    devices: int,
    values: int,
    *,
    at_once: int = 16,
    host: str = HOST,
    prefix: tuple[str, ...] = (),
) -> dict[str, float]:
    """Return the figures of one round with so many devices and values per delta.

    seconds: from the first check-in to the aggregate, of the whole machine: the devices of the
    load run beside the server. `host` and `prefix`: where the server listens, and a command
    around it, to put it into another network.
    """
    spec = spec_of(values)
    with tempfile.TemporaryDirectory() as where:
        folder = new_gateway(
            Path(where) / "gateway",
            spec,
            cohort=devices,
            min_cohort=devices,
            hosts=(host,),
            address="127.0.0.1" if host == HOST else host,
            limits=GatewayLimits(enrolments_a_minute=10 * devices),
        )
        with serve(folder, prefix) as server:
            idle = server.peak_mb()
            fleet = enrol_many(folder, server, devices, host, at_once=min(at_once, 8))
            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(lambda device: patiently(device.check_in), fleet))
            opener = opener_of(folder)
            assignment = Assignment(run="load", round=1, config=config_of())
            began = time.perf_counter()
            row = opener.open(assignment, adapter_of(spec))
            frame = wire.encode(delta_of(spec, 0))

            def work(device: Device) -> int:
                patiently(device.check_in)
                accepted = patiently(lambda: device.send(frame)).accepted
                device.hang_up()
                return int(accepted)

            with ThreadPoolExecutor(at_once) as pool:
                counted = sum(pool.map(work, fleet))
            while row["state"] in ("open", "closing"):
                time.sleep(0.02)
                row = opener.store.row("SELECT * FROM rounds WHERE id = ?", row["id"]) or row
            seconds = time.perf_counter() - began
            opener.store.close()
            return {
                "devices": devices,
                "values": spec.num_values,
                "counted": counted,
                "clients": row["clients"] or 0,
                "seconds": seconds,
                "devices_per_second": counted / seconds,
                "peak_rss_mb": server.peak_mb(),
                "idle_rss_mb": idle,
                "delta_mb": len(frame) / 1e6,
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--values", type=int, default=1_000_000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--host", default=HOST, help="where the server listens")
    parser.add_argument("--prefix", default="", help="a command around the server")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = load(
        given.devices,
        given.values,
        at_once=given.at_once,
        host=given.host,
        prefix=tuple(given.prefix.split()),
    )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
