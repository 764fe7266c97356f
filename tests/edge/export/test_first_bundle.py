"""A bundle before there is a release: of what every run of a run.toml starts from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anabranch.edge.export.bundle import Request
from anabranch.edge.export.from_run import export_run
from anabranch.edge.gateway.published import Shelf
from anabranch.edge.runtime.bundle import open_bundle
from anabranch.edge.runtime.trust import new_key
from anabranch.protocols.config import parse
from anabranch.protocols.errors import ConfigError
from anabranch.server.evaluation import initial_adapter
from tests.runs import table_text, write_table

REQUEST = Request(name="", version=1, precisions=("fp32",), artifacts=False)


def test_the_bundle_of_a_run_toml_holds_its_first_adapter_and_fits_its_runs(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run.toml"
    run.write_text(table_text())
    config = parse(table_text(), source="run.toml")
    public = new_key(tmp_path / "key")
    data = write_table(tmp_path / "validation.csv", n=30)
    target = tmp_path / "bundle"
    export_run(run, target, request=REQUEST, records=data, key=tmp_path / "key")
    bundle, start = open_bundle(target, trusted=[public]), initial_adapter(config)
    assert bundle.manifest.config == config.digest()
    for name, array in start.arrays.items():
        np.testing.assert_array_equal(bundle.adapter.arrays[name], array)
    shelf = Shelf([target], [public], tmp_path / "files")
    assert shelf.fitting(start.spec, config.task.labels).key == "tiny/1"
    other = parse(table_text(("rank = 3", "rank = 2")), source="run.toml")
    with pytest.raises(ConfigError, match="tiny/1 has another rank, tensors"):
        shelf.fitting(initial_adapter(other).spec, config.task.labels)
    with pytest.raises(ConfigError, match="tiny/1 has another labels"):
        shelf.fitting(start.spec, ("a", "b"))
