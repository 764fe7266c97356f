"""onnxruntime for JavaScript, from npm, and MiniLM in a signed bundle."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import read_adapter, trainable_parameters
from anabranch.edge.export.bundle import Request, make_bundle
from anabranch.edge.runtime.bundle_manifest import Precision
from anabranch.edge.runtime.trust import load_private, new_key
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Column, Contract, Federation, Lora, Model, Task

ROOT = Path(__file__).resolve().parents[3]
BROWSER = ROOT / "examples" / "browser"
LABELS = ("negative", "positive")
ANY: dict[Precision, float] = {
    "int8": 1.0,
    "int4": 1.0,
}  # of an untrained head, accuracy says nothing


@dataclass(frozen=True)
class Signed:
    """A bundle's folder and the public key that signed it (hex)."""

    folder: Path
    key: str


@pytest.fixture(scope="session")
def node_packages() -> Path:
    """Return a folder with node_modules as examples/browser locks them; npm installs it once."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed: JavaScript runtimes cannot be tested here")
    folder = ROOT / ".node"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = (BROWSER / "package-lock.json").read_bytes()
        done = folder / "installed.json"
        if not done.exists() or done.read_bytes() != wanted:
            for name in ("package.json", "package-lock.json"):
                shutil.copy(BROWSER / name, folder / name)
            # The binary of onnxruntime-node lies in its package; its script would fetch CUDA.
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            done.write_bytes(wanted)
    return folder


@pytest.fixture(scope="session")
def sentences(shared_data: Path) -> tuple[list[str], np.ndarray]:
    """Return 200 real sentences and their labels."""
    lines = (shared_data / "sst2" / "stsa.binary.test").read_text().splitlines()[:400:2]
    return [line[1:].strip() for line in lines], np.array([int(line[0]) for line in lines])


@pytest.fixture(scope="session")
def minilm_bundle(
    tmp_path_factory: pytest.TempPathFactory, sentences: tuple[list[str], np.ndarray]
) -> Signed:
    """Return a bundle of MiniLM with an adapter of rank 8 on q and v, of small random values."""
    folder = tmp_path_factory.mktemp("minilm")
    config = RunConfig(
        name="sentiment",
        task=Task(kind="text-classification", labels=LABELS),
        data=Contract(columns={"text": Column(type="text"), "label": Column(type="label")}),
        model=Model(base="minilm", max_tokens=64),
        lora=Lora(rank=8, targets=("query", "value")),
        federation=Federation(rounds=1),
    )
    classifier = load_classifier(config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(classifier).values():
            parameter.normal_(std=0.02, generator=rng)
    texts, labels = sentences
    key = new_key(folder / "key.pem").hex()
    make_bundle(
        classifier,
        read_adapter(classifier),
        config,
        folder / "bundle",
        request=Request(name="sentiment", version=1, artifacts=False, tolerance=ANY),
        inputs=texts[:32],
        labels=labels[:32],
        signing_key=load_private(folder / "key.pem"),
    )
    return Signed(folder / "bundle", key)
