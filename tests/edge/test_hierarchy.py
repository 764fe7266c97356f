"""The whole hierarchy as its operators start it: a SuperLink, a site, a gateway with three devices.

Every party is a process of its own; the devices have another Python, without torch. Site and
gateway are members of secure sums, each stage answered by another process: Flower starts one for
each message. The adapter at the end is compared with weighted means over the same records in this
process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.client.app import open_site
from anabranch.client.flower import SiteLike
from anabranch.edge.gateway.config import GatewayFolder
from anabranch.edge.gateway.replies import seed_of
from anabranch.edge.gateway.store import Row, Store
from anabranch.edge.runtime.bundle import Bundle, open_bundle
from anabranch.edge.runtime.data import read_records
from anabranch.edge.runtime.joint import open_engine
from anabranch.edge.runtime.training import train
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.messages import Assignment, Evaluated, Trained
from anabranch.server.evaluation import initial_adapter
from anabranch.simulations import engines
from benchmarks.edge.gateway_load import Server, serve
from tests.edge.test_device import device, needs_device
from tests.ports import free_port
from tests.runs import write_site
from tests.simulations.superlink import SuperLink, wait_for

pytestmark = [pytest.mark.slow, needs_device]

RUN = """
name = "hierarchy"
seed = 3

[task]
kind = "text-classification"
labels = ["bone", "heart"]

[data.columns]
text = {{ type = "text" }}
label = {{ type = "label" }}

[model]
base = "{base}"
max_tokens = 24

[lora]
rank = 3

[training]
batch_size = 4
local_epochs = 2
learning_rate = 0.01

[federation]
rounds = 2
quorum = 2
deadline_s = 120

[secure_aggregation]
minimum = 2
threshold = 0.5
colluding = 0.0
value_bits = 24
"""
BONE, HEART = "acute fracture of the left femur", "chronic heart failure"
WORDS = ["acute", "chronic", "left", "right", "with", "and", "type", "infarction"]
COUNTS = (12, 7, 5)  # records of the devices
TOLERANCE = 1e-4  # the device has another build of onnxruntime; measured: 1e-6


def records(count: int, seed: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        text, label = ((BONE, "bone"), (HEART, "heart"))[i % 2]
        rows.append((f"{rng.choice(WORDS)} {text} {rng.choice(WORDS)}", label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


def anabranch(*words: str | Path) -> dict[str, Any]:
    """Run `anabranch … --json` and return what it prints."""
    command = [sys.executable, "-m", "anabranch.cli.main", *map(str, words), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@dataclass
class Phone:
    """A device's folder and records."""

    home: Path
    data: Path

    def does(self, verb: str, *, expect: int = 0) -> subprocess.CompletedProcess[str]:
        once = ["--once"] if verb == "sync" else []
        done = device(self.home, verb, *once, "--ignore-conditions", "--data", str(self.data))
        assert done.returncode == expect, done.stderr
        return done

    @property
    def name(self) -> str:
        """What the gateway calls it."""
        return str(json.loads((self.home / "gateway.json").read_text())["device"])


@dataclass
class Place:
    """A gateway's folder, its serving process, and its devices."""

    folder: GatewayFolder
    bundle: Path
    key: bytes
    phones: list[Phone]
    store: Store = field(init=False)
    server: Server = field(init=False)

    def __post_init__(self) -> None:
        self.store = Store(self.folder.state)
        self.server = serve(self.folder)

    def restart(self) -> None:
        """Start it again."""
        self.server = serve(self.folder)

    def row(self, number: int) -> Row | None:
        return self.store.row("SELECT * FROM rounds WHERE number = ?", number)

    def counted(self, number: int) -> dict[str, Row]:
        """Return the counted deltas of a round by device."""
        rows = self.store.rows(
            "SELECT counted.*, tasks.device FROM counted JOIN tasks ON tasks.id = counted.task "
            "JOIN rounds ON rounds.id = counted.round WHERE number = ?",
            number,
        )
        assert len({row["device"] for row in rows}) == len(rows)
        return {row["device"]: row for row in rows}

    def wait_for_round(self, number: int) -> None:
        wait_for(lambda: self.row(number) is not None, 90)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.__exit__()
        self.store.close()


@contextmanager
def place_of(folder: Path, run: Path, validation: Path) -> Iterator[Place]:
    """Yield a gateway made by the commands of docs/gateway.md, with three devices."""
    key = folder / "signing.key"
    anabranch("edge", "keygen", key)
    bundle = folder / "bundle"
    plain = ["--no-artifacts", "--precision", "fp32"]
    anabranch("edge", "export", run, bundle, "--key", key, "--records", validation, *plain)
    port, enroll_port = free_port(), free_port()
    ports = ["--port", str(port), "--enroll-port", str(enroll_port)]
    cohort = ["--cohort", "3", "--min-cohort", "2"]
    host, signed = ["--name", "north", "--host", "127.0.0.1"], ["--key", f"{key}.pub"]
    gateway = folder / "gateway"
    made = ["edge", "gateway", "init", str(gateway), *host, *ports, *cohort]
    anabranch(*made, "--bundle", bundle, *signed)
    tokens = anabranch("edge", "gateway", "token", gateway, "--count", "3")["tokens"]
    phones = []
    for i, count in enumerate(COUNTS):
        rows = records(count, seed=10 + i)
        phones.append(Phone(folder / f"phone-{i}", write_csv(folder / f"phone-{i}.csv", rows)))
    public = bytes.fromhex(Path(f"{key}.pub").read_text().strip())
    with Place(GatewayFolder(gateway), bundle, public, phones) as place:
        for phone, token in zip(phones, tokens, strict=True):
            done = device(phone.home, "enroll", token)
            assert done.returncode == 0, done.stderr
            assert "no task now" in phone.does("sync").stderr  # says how many records there are
        yield place


def first_round(place: Place) -> None:
    """All three take part; the gateway is killed when the first delta is counted."""
    one, two, three = place.phones
    assert "accepted" in one.does("sync").stderr
    two.does("pull")
    place.server.kill()
    away = two.does("sync", expect=1)  # trains offline; the delta waits
    assert "trained" in away.stderr
    place.restart()
    assert "accepted" in two.does("sync").stderr
    assert "no task now" in one.does("sync").stderr
    assert set(place.counted(1)) == {one.name, two.name}
    assert "accepted" in three.does("sync").stderr


def second_round(place: Place) -> None:
    """The third takes its task and is never seen again."""
    one, two, three = place.phones
    three.does("pull")
    for phone in (one, two):
        assert "accepted" in phone.does("sync").stderr
    with place.store.writing() as db:  # its time is up, and the third has not come
        db.execute("UPDATE rounds SET deadline = ? WHERE number = 2", (time.time(),))
    wait_for(lambda: (place.row(2) or {})["state"] == "closed", 60)


@dataclass
class Means:
    """What the gateway should have sent, computed here: a SiteLike."""

    place: Place
    bundle: Bundle
    name: str = "north"
    max_rank: int | None = None

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        pass

    def sizes(self, config: RunConfig) -> tuple[Sized, Sized]:
        return range(sum(COUNTS)), ()

    def train(self, assignment: Assignment, adapter: Adapter) -> tuple[Trained, bytes]:
        began, counted = time.monotonic(), self.place.counted(assignment.round)
        deltas = [
            self._delta(phone, counted[phone.name]["task"], assignment, adapter)
            for phone in self.place.phones
            if phone.name in counted
        ]
        total = sum(delta.num_examples for delta in deltas)
        arrays = {
            name: np.sum(
                [d.arrays[name].astype(np.float64) * d.num_examples / total for d in deltas], axis=0
            ).astype(np.float32)
            for name in deltas[0].arrays
        }
        steps = max(delta.steps for delta in deltas)
        mean = Delta(adapter.spec, arrays, total, part=assignment.part, steps=steps)
        seconds = time.monotonic() - began
        trained = Trained(site=self.name, num_examples=total, steps=steps, seconds=seconds)
        return trained, wire.encode(mean)

    def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
        raise NotImplementedError

    def _delta(self, phone: Phone, task: str, ask: Assignment, adapter: Adapter) -> Delta:
        data = read_records(phone.data, self.bundle.manifest, self.bundle.tokenizer)
        with closing(open_engine(self.bundle)) as engine:
            engine.set_params(adapter.arrays)
            seed = seed_of(ask.config.seed, task)
            return train(engine, data, ask.config.training, seed=seed, part=ask.part).delta


def expected(place: Place, config: RunConfig, site: Path, run: str) -> Adapter:
    """Return the adapter of the same run in this process."""
    bundle = open_bundle(place.bundle, trusted=[place.key])
    makers: dict[Path, Callable[[], SiteLike]] = {
        site: lambda: open_site(site),
        place.folder.folder: lambda: Means(place, bundle),
    }
    sites = {"hospital": site, "north": place.folder.folder}
    start = initial_adapter(config)
    return engines.run(
        "sequential", config, sites, start, run_name=run, open_site=lambda folder: makers[folder]()
    ).adapter


def test_a_site_and_a_gateway_of_three_devices_train_one_adapter(
    tmp_path: Path, tiny_bert: Path
) -> None:
    text = RUN.format(base=tiny_bert)
    run = tmp_path / "run.toml"
    run.write_text(text)
    validation = write_csv(tmp_path / "validation.csv", records(20, seed=1))
    table = write_csv(tmp_path / "h.csv", records(16, 2))
    site = write_site(tmp_path / "hospital", "hospital", table)
    output = tmp_path / "runs" / "first"
    with place_of(tmp_path, run, validation) as place:
        with SuperLink(tmp_path) as link:
            link.node(site)
            link.node(place.folder.folder, "gateway")
            process = link.start_run(f"run='{run}' output='{output}' connect-seconds=90.0")
            place.wait_for_round(1)
            first_round(place)
            place.wait_for_round(2)
            second_round(place)
            process.wait(150)
            shown = link.log("flwr-run")
        assert (output / "summary.json").exists(), shown
        rounds = [place.row(number) or {} for number in (1, 2)]
        assert [row["clients"] for row in rounds] == [3, 2]
        assert [row["examples"] for row in rounds] == [sum(COUNTS), sum(COUNTS[:2])]
        dead = place.phones[2].name
        assert dead not in place.counted(2)
        events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
        merged = [event for event in events if event["kind"] == "round_aggregated"]
        assert [event["sites"] for event in merged] == [["hospital", "north"]] * 2
        assert [event["num_examples"] for event in merged] == [16 + 24, 16 + 19]
        assert "site_failed" not in {event["kind"] for event in events}
        assert place.server.stop() == 0
        config = parse(text, source="run.toml")
        clear = msgspec.structs.replace(config, secure_aggregation=None)
        same = write_site(tmp_path / "same", "hospital", table)  # it has answered nothing yet
        here = expected(place, clear, same, next(e["run"] for e in events if "run" in e))
        sums = [event for event in events if event["kind"] == "secure_sum"]
        assert [event["survivors"] for event in sums] == [["hospital", "north"]] * 2
    frame = (output / "checkpoints" / "round-0002.adapter").read_bytes()
    there, start = wire.decode_adapter(frame, here.spec), initial_adapter(config)
    for name, array in here.arrays.items():
        np.testing.assert_allclose(there.arrays[name], array, rtol=0, atol=TOLERANCE)
    apart = max(np.abs(there.arrays[name] - here.arrays[name]).max() for name in here.arrays)
    sys.stderr.write(f"\nlargest difference {apart:.1e}\n")
    moved = max(np.abs(there.arrays[name] - start.arrays[name]).max() for name in start.arrays)
    assert moved > 1e-2
