"""Agents of a device at work: what a gateway offers them, what they measure, what they leave."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import task
from anabranch.edge.runtime.bundle_manifest import MANIFEST, SIGNATURE
from anabranch.edge.runtime.conditions import Network, Readings
from anabranch.edge.runtime.device_file import Conditions
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.loop import Agent
from anabranch.edge.runtime.spool import Spool
from anabranch.edge.runtime.transport import Gateway
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Training, Uplink
from anabranch.protocols.wire import encode
from tests.edge.gateways import FakeGateway

TRAINING = Training(batch_size=4, local_steps=6)
GOOD = Readings(
    battery=None,
    charging=None,
    temperature_c=30.0,
    network=Network.unmetered,
    idle=True,
    local=datetime(2026, 1, 1, 3, 0),
)


@dataclass
class FakeSensors:
    readings: Readings = GOOD
    later: list[Readings] = field(default_factory=list)

    def read(self) -> Readings:
        return self.later.pop(0) if self.later else self.readings


def write_data(path: Path, seed: int = 0, count: int = 24) -> Path:
    """Write records that a bundle of a tabular classifier takes."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, 5)).astype(np.float32)
    np.savez(path, inputs=inputs, labels=rng.integers(0, 3, count))
    return path


def offer(fake: FakeGateway, made: tuple[Path, Any], /, **changes: Any) -> edge_pb2.Task:
    """Let the gateway offer a task at the next check-in."""
    folder, adapter = made
    manifest = json.loads((folder / MANIFEST).read_bytes())
    given: dict[str, Any] = {
        "id": "t-1",
        "run": "r-1",
        "round": 1,
        "bundle": manifest["name"],
        "bundle_version": manifest["version"],
        "manifest": fake.put((folder / MANIFEST).read_bytes(), MANIFEST),
        "signature": fake.put((folder / SIGNATURE).read_bytes(), SIGNATURE),
        "adapter": fake.put(encode(adapter), "adapter"),
        "training": msgspec.json.encode(TRAINING),
        "part": msgspec.json.encode(Part()),
        "uplink": msgspec.json.encode(Uplink()),
        "seed": 7,
        "deadline_unix": int(time.time()) + 3600,
        "chunk_bytes": 1024,
        "max_upload_bytes": 1 << 20,
    }
    one = edge_pb2.Task(**(given | changes))
    fake.replies.append(edge_pb2.CheckInReply(task=one))
    return one


def agent_of(gateway: Gateway, home: Home, data: Path | None, **fields: Any) -> Agent:
    said: list[str] = []
    values: dict[str, Any] = {"conditions": Conditions(), "sensors": FakeSensors()} | fields
    agent = Agent(home=home, gateway=gateway, data=data, say=said.append, **values)
    agent.said = said  # type: ignore[attr-defined]
    return agent


def delta_bytes(fake: FakeGateway) -> bytes:
    (one,) = fake.uploads.values()
    return bytes(one)


def nothing_left(home: Home) -> bool:
    state = list((home.folder / "training").rglob("*.*"))
    return task.remembered(home) is None and not Spool(home.spool).entries() and not state


def killed(agent: Agent, owner: Any, where: str, *, after: bool) -> None:
    """Let the agent work until it dies, before or after it has called this once."""
    real = getattr(owner, where)

    def dying(*arguments: Any, **named: Any) -> Any:
        if after:
            real(*arguments, **named)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, where, dying)
        with pytest.raises(KeyboardInterrupt):
            agent.run(once=True)
