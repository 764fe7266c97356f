from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from anabranch.client.flower import client_app
from anabranch.client.models import Models
from anabranch.client.site import Site
from anabranch.protocols import wire
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.server.app import app, coordinate
from anabranch.simulations.grid import InProcessGrid
from tests.runs import table_text, write_table
from tests.simulations.rig import ToySite, adapter, app_of


def grid() -> InProcessGrid:
    sites = [ToySite("a", 30, step=1.0), ToySite("b", 10, step=5.0)]
    return InProcessGrid(app_of(sites), ["a", "b"])


def run_file(tmp_path: Path, *replacements: tuple[str, str]) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(table_text(*replacements))
    return file


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_run_leaves_configuration_events_checkpoints_and_summary(tmp_path: Path) -> None:
    file, output = run_file(tmp_path), tmp_path / "out"

    with grid() as g:
        result = coordinate(g, file, output, first=lambda config: adapter())

    assert (output / "run.toml").read_bytes() == file.read_bytes()
    kinds = [event["kind"] for event in events(output)]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_finished"
    frame = (output / "checkpoints" / "round-0002.adapter").read_bytes()
    kept = wire.decode_adapter(frame, result.adapter.spec)
    np.testing.assert_array_equal(kept.arrays["head.weight"], np.full((3, 5), 4.0))
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["rounds"], summary["best_round"], summary["seed"]) == (2, 2, 3)
    assert summary["num_examples"]["a"] == 30
    assert summary["run"] == events(output)[0]["run"]


def test_with_records_of_its_own_the_coordinator_chooses_and_releases(
    tmp_path: Path, table_sites: dict[str, Path]
) -> None:
    own = write_table(tmp_path / "own.csv", n=60, seed=5)
    names = sorted(table_sites)
    app = client_app(lambda context: Site(table_sites[str(context.node_config["site"])], Models()))

    with InProcessGrid(app, names) as g:
        coordinate(g, run_file(tmp_path), tmp_path / "out", validation=own, test=own)

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["accuracy"]["federated"] > 0.5
    assert summary["release"]["int8_bytes"] > 0
    assert (tmp_path / "out" / "release" / "manifest.json").is_file()
    assert (tmp_path / "out" / "report.html").is_file()


def test_records_of_a_coordinator_without_a_whole_model_are_refused(tmp_path: Path) -> None:
    file = run_file(tmp_path, ("rounds = 2", 'rounds = 2\nmethod = "fedsa"'))
    own = write_table(tmp_path / "own.csv", n=60, seed=5)

    with grid() as g, pytest.raises(ConfigError, match=r"test: .*fedsa.*holdout above 0"):
        coordinate(g, file, tmp_path / "out", test=own)
    assert not (tmp_path / "out").exists()


def test_two_runs_of_one_file_have_two_identities(tmp_path: Path) -> None:
    file = run_file(tmp_path)
    for name in ("one", "two"):
        with grid() as g:
            coordinate(g, file, tmp_path / name, first=lambda config: adapter())

    one, two = (events(tmp_path / name)[0] for name in ("one", "two"))
    assert one["run"] != two["run"]
    assert one["config"] == two["config"]


def test_a_run_that_fails_says_so_in_its_events(tmp_path: Path) -> None:
    file = run_file(tmp_path, ("rounds = 2", "rounds = 2\nquorum = 3"))

    with grid() as g, pytest.raises(RunError, match="3 sites are needed"):
        coordinate(g, file, tmp_path / "out", first=lambda config: adapter(), connect_s=0.05)

    last = events(tmp_path / "out")[-1]
    assert (last["kind"], last["error"]) == ("run_failed", "RunError")
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path) -> None:
    with grid() as g, pytest.raises(ConfigError, match=r"run\.toml: No such file"):
        coordinate(g, tmp_path / "run.toml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_server_app_needs_a_run_and_an_output(tmp_path: Path) -> None:
    context = Context(
        run_id=1,
        node_id=1,
        node_config={},
        state=RecordDict(),
        run_config={"run": str(run_file(tmp_path)), "output": ""},
    )
    with grid() as g, pytest.raises(ConfigError, match="'output' is missing; give it a path"):
        app(g, context)
