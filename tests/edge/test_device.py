"""A device and a gateway, both real: enrol, pull, train, send, aggregate; the device has no torch.

ANABRANCH_EDGE_PYTHON names the interpreter of the device; without one the tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.edge.gateway.operator import gateway_file, invite, make_gateway
from anabranch.edge.gateway.server import Gateway, start
from anabranch.edge.gateway.upstream import GatewaySite
from anabranch.protocols.config import RunConfig
from anabranch.protocols.messages import Assignment, Trained
from anabranch.protocols.tables import Federation, Training
from anabranch.protocols.wire import decode_delta
from tests.edge.bundles import TRUSTED, write_bundle
from tests.ports import free_port

PYTHON = Path(
    os.environ.get("ANABRANCH_EDGE_PYTHON")
    or Path(__file__).parents[2] / ".venv-edge" / "bin" / "python"
)
needs_device = pytest.mark.skipif(not PYTHON.exists(), reason="no ANABRANCH_EDGE_PYTHON")
DEVICE = """
import sys
from anabranch.cli.main import run
code = run(sys.argv[1:])
assert "torch" not in sys.modules, (sys.modules["torch"], sys.path)
sys.exit(code)
"""
TEXTS = [("acute fracture of femur", "bone"), ("chronic heart failure", "heart")] * 6


def device(home: Path, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `anabranch edge VERB` on the device."""
    command = [str(PYTHON), "-c", DEVICE, "edge", verb, *arguments, "--home", str(home)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "NONE"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment
    )


@pytest.fixture
def config(make_config: Callable[..., RunConfig]) -> RunConfig:
    return make_config(
        "text",
        training=Training(batch_size=4, local_epochs=2),
        federation=Federation(rounds=2, deadline_s=60.0),
    )


@pytest.fixture
def gateway(
    tmp_path: Path, config: RunConfig, make_classifier: Callable[..., Classifier]
) -> Iterator[Gateway]:
    bundle = tmp_path / "bundle"
    write_bundle(
        bundle, make_classifier("text"), config, precisions=("fp32",), with_artifacts=False
    )
    port, enroll_port = free_port(), free_port()
    file = gateway_file(
        "north",
        ["127.0.0.1"],
        port=port,
        enroll_port=enroll_port,
        bundles=[str(bundle)],
        bundle_keys=[key.hex() for key in TRUSTED],
        cohort=2,
        min_cohort=2,
        retry_s=1,
    )
    make_gateway(tmp_path / "gateway", file)
    with start(tmp_path / "gateway") as gateway:
        yield gateway


def write_data(path: Path, label: int) -> Path:
    rows = [{"text": text, "label": name} for text, name in TEXTS[label:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@needs_device
def test_two_devices_train_a_round_and_the_gateway_sends_their_mean(
    tmp_path: Path,
    gateway: Gateway,
    config: RunConfig,
    make_classifier: Callable[..., Classifier],
) -> None:
    homes = [tmp_path / "one", tmp_path / "two"]
    data = [write_data(tmp_path / f"{i}.jsonl", i) for i in range(2)]
    for home, token in zip(homes, invite(tmp_path / "gateway", count=2), strict=True):
        done = device(home, "enroll", token)
        assert done.returncode == 0, done.stderr
        assert (home / "device.key").stat().st_mode & 0o777 == 0o600
    for home, file in zip(homes, data, strict=True):  # says how many records there are
        done = device(home, "sync", "--once", "--ignore-conditions", "--data", str(file))
        assert done.returncode == 0, done.stderr
        assert "no task now" in done.stderr

    adapter = read_adapter(make_classifier("text"))
    site, answer = GatewaySite(tmp_path / "gateway"), []
    ask = Assignment(run="r-1", round=1, config=config)
    asking = threading.Thread(target=lambda: answer.append(site.train(ask, adapter)))
    asking.start()
    try:
        for home, file in zip(homes, data, strict=True):
            done = device(home, "pull", "--ignore-conditions", "--data", str(file))
            assert done.returncode == 0, done.stderr
            assert len(list((home / "bundles").glob("*/1/manifest.json"))) == 1
            done = device(
                home, "sync", "--once", "--ignore-conditions", "--data", str(file), "--json"
            )
            assert done.returncode == 0, done.stderr
            assert "accepted" in done.stderr
            state: dict[str, Any] = json.loads(done.stdout)
            assert state["task"] is None
            assert state["waiting"] == []
    finally:
        asking.join(60)
    trained, frame = answer[0]
    assert isinstance(trained, Trained)
    assert trained.num_examples == len(TEXTS) + len(TEXTS) - 1
    delta = decode_delta(frame, adapter.spec)
    assert np.isfinite(delta.norm())
    assert delta.norm() > 0


@needs_device
def test_a_token_is_good_for_one_device(tmp_path: Path, gateway: Gateway) -> None:
    (token,) = invite(tmp_path / "gateway")
    assert device(tmp_path / "one", "enroll", token).returncode == 0
    again = device(tmp_path / "one", "enroll", token)
    assert again.returncode == 1
    assert "--force enrols it anew" in again.stderr
    other = device(tmp_path / "two", "enroll", token)
    assert other.returncode == 1
    assert "used already" in other.stderr
    assert [path.name for path in (tmp_path / "two").iterdir()] == [".agent.lock"]
    assert msgspec.json.decode((tmp_path / "one" / "gateway.json").read_bytes())["device"]
