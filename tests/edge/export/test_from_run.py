"""From a run's folder to a bundle: only what was released, measured on the records given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from anabranch.client.data.records import load_records
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.edge.export.bundle import Request
from anabranch.edge.export.from_run import export_run
from anabranch.edge.runtime.bundle import open_bundle
from anabranch.edge.runtime.manifest import MANIFEST
from anabranch.edge.runtime.trust import new_key
from anabranch.protocols import wire
from anabranch.protocols.config import parse
from anabranch.protocols.errors import BundleError, ConfigError, DataError, ReleaseError
from anabranch.server.card import RunFacts
from anabranch.server.release import make_release
from tests.runs import table_text, write_table

FACTS = RunFacts(run="run-1", base_name="mlp", rounds=2, best_round=1, sites=("north", "south"))
REQUEST = Request(name="", version=2, precisions=("fp32",), artifacts=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its test records and a key."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "run").mkdir()
    (folder / "run" / "run.toml").write_text(table_text())
    config = parse(table_text(), source="run.toml")
    records = load_records(write_table(folder / "test.csv", n=80, seed=7), config)
    classifier = load_classifier(config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5, generator=rng)
    make_release(
        classifier,
        read_adapter(classifier),
        config,
        folder / "run" / "release",
        inputs=records.inputs,
        labels=records.labels,
        facts=FACTS,
    )
    new_key(folder / "key")
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def export(folder: Path, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "request": REQUEST, "records": folder / "test.csv", "key": folder / "key"
    }  # fmt: skip
    return export_run(folder / "run", folder / "bundle", **(fields | changes))


def refuse(folder: Path, error: type[Exception], match: str, **changes: Any) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=match):
        export(folder, **changes)
    assert sorted(folder.rglob("*")) == before


def test_the_bundle_is_the_release_measured_on_the_records(copy: Path) -> None:
    stages: list[str] = []
    public = new_key(copy / "other")
    manifest = export(copy, key=copy / "other", on_stage=stages.append)
    released = json.loads((copy / "run" / "release" / MANIFEST).read_text())
    bundle = open_bundle(copy / "bundle", trusted=[public])
    assert bundle.manifest == manifest
    assert (manifest.name, manifest.version) == ("tiny", 2)  # the run's own name
    assert manifest.adapter == released["adapter"] == wire.digest(wire.encode(bundle.adapter))
    assert manifest.config == released["config"]
    assert set(manifest.columns) == {"a", "b", "y"}
    assert manifest.measured["fp32"].records == 80
    assert manifest.measured["fp32"].accuracy == pytest.approx(
        released["metrics"]["fp32_accuracy"], abs=1e-9
    )
    assert stages == ["exporting", "comparing engines", "measuring accuracy", "measuring memory"]


@pytest.mark.parametrize("name", ["onnx/model.onnx", "adapter/adapter_model.safetensors"])
def test_a_changed_release_is_refused(copy: Path, name: str) -> None:
    path = copy / "run" / "release" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refuse(copy, ReleaseError, name)


def test_another_adapter_with_a_manifest_to_match_is_refused(copy: Path) -> None:
    from anabranch.client.tuning.peft_folder import read_peft, write_peft
    from anabranch.edge.runtime.manifest import entry
    from anabranch.protocols.adapter import Adapter

    release = copy / "run" / "release"
    spec = load_classifier(parse(table_text(), source="run.toml")).spec
    arrays = read_peft(release / "adapter", spec).arrays
    shutil.rmtree(release / "adapter")
    changed = {name: array + np.float32(1) for name, array in arrays.items()}
    write_peft(release / "adapter", Adapter(spec, changed), base_name="mlp", labels=("no", "yes"))
    manifest = json.loads((release / MANIFEST).read_text())
    for path in (release / "adapter").iterdir():
        found = entry(path)
        manifest["files"][f"adapter/{path.name}"] = {"sha256": found.sha256, "bytes": found.bytes}
    (release / MANIFEST).write_text(json.dumps(manifest))
    refuse(copy, ReleaseError, "is not the adapter that the release's manifest names")


def test_a_changed_run_toml_is_refused(copy: Path) -> None:
    path = copy / "run" / "run.toml"
    path.write_text(path.read_text().replace("seed = 3", "seed = 4"))
    refuse(copy, ReleaseError, r"run.toml is not the configuration that was released: restore")


def test_a_run_without_run_toml_or_release_is_refused(copy: Path) -> None:
    shutil.move(copy / "run" / "release", copy / "away")
    refuse(copy, ReleaseError, "release")
    (copy / "run" / "run.toml").unlink()
    refuse(copy, ConfigError, r"run.toml: No such file")


def test_records_of_something_else_are_refused(copy: Path) -> None:
    refuse(copy, DataError, r"none\.csv: no such file", records=copy / "none.csv")
    (copy / "bad.csv").write_text("a,b,y\n1,2,perhaps\n")
    refuse(copy, DataError, r"bad\.csv: .*\n  y: unknown label", records=copy / "bad.csv")


def test_a_key_that_cannot_sign_is_refused_before_anything_is_read(copy: Path) -> None:
    shutil.rmtree(copy / "run")
    refuse(copy, BundleError, "nokey: cannot be read", key=copy / "nokey")
    (copy / "open").write_bytes((copy / "key").read_bytes())
    (copy / "open").chmod(0o644)
    refuse(copy, BundleError, r"mode 0644.*chmod 600", key=copy / "open")
    (copy / "ec").write_bytes(
        generate_private_key(SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (copy / "ec").chmod(0o600)
    refuse(copy, BundleError, "expected an Ed25519 key", key=copy / "ec")


def test_an_existing_bundle_is_left_alone(copy: Path) -> None:
    (copy / "bundle").mkdir()
    (copy / "bundle" / "mine").write_text("1")
    refuse(copy, ReleaseError, "bundle exists already: move it away")
