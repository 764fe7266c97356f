"""The example app under a real SuperLink, against the same run in this process."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from anabranch.protocols import wire
from anabranch.protocols.config import parse
from anabranch.server.evaluation import initial_adapter
from anabranch.simulations import engines
from tests.runs import table_text, write_table
from tests.simulations.superlink import SuperLink, end_group, superlink, wait_for


@pytest.mark.slow
def test_a_superlink_gives_the_same_adapter_as_this_process(
    tmp_path: Path, table_sites: dict[str, Path]
) -> None:
    text = table_text(("rounds = 2", "rounds = 2\nquorum = 2"))
    (tmp_path / "run.toml").write_text(text)
    output = tmp_path / "runs" / "first"

    test = write_table(tmp_path / "test.csv", n=50, seed=4)

    with superlink(tmp_path, table_sites) as link:
        paths = f"run='{tmp_path / 'run.toml'}' output='{output}' test='{test}'"
        shown = link.run(f"{paths} connect-seconds=90.0")

    assert (output / "summary.json").exists(), shown
    assert (output / "release" / "manifest.json").exists(), shown
    config = parse(text, source="run.toml")
    here = engines.run("sequential", config, table_sites, initial_adapter(config), run_name="here")
    frame = (output / "checkpoints" / "round-0002.adapter").read_bytes()
    there = wire.decode_adapter(frame, here.adapter.spec)
    for name, array in here.adapter.arrays.items():
        np.testing.assert_allclose(there.arrays[name], array, rtol=0, atol=1e-5)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["sites"]["oncology"]["num_examples"] == 24
    assert summary["sites"]["cardiology"]["rounds"] == 2


@pytest.mark.slow
def test_sites_are_summed_where_flower_starts_a_process_for_each_message(
    tmp_path: Path, table_sites: dict[str, Path]
) -> None:
    text = table_text(
        ("rounds = 2", "rounds = 1\nquorum = 2"),
        extra="\n[secure_aggregation]\nminimum = 2\nthreshold = 0.5\ncolluding = 0.0\n"
        "value_bits = 24\n",
    )
    (tmp_path / "run.toml").write_text(text)
    output = tmp_path / "runs" / "first"

    with superlink(tmp_path, table_sites) as link:
        shown = link.run(f"run='{tmp_path / 'run.toml'}' output='{output}' connect-seconds=90.0")

    assert (output / "summary.json").exists(), shown
    config = parse(text, source="run.toml")
    clear = msgspec.structs.replace(config, secure_aggregation=None)
    here = engines.run("sequential", clear, table_sites, initial_adapter(config), run_name="here")
    frame = (output / "checkpoints" / "round-0001.adapter").read_bytes()
    there = wire.decode_adapter(frame, here.adapter.spec)
    for name, array in here.adapter.arrays.items():
        np.testing.assert_allclose(there.arrays[name], array, rtol=0, atol=1e-5)
    log = (output / "events.jsonl").read_text()
    (summed,) = [e for e in map(json.loads, log.splitlines()) if e["kind"] == "secure_sum"]
    assert (summed["opened"], summed["survivors"]) == (True, ["cardiology", "oncology"])


@pytest.mark.slow
def test_a_client_that_is_killed_in_a_round_is_named_and_the_run_goes_on(
    tmp_path: Path, table_sites: dict[str, Path]
) -> None:
    text = table_text(
        ("rounds = 2", "rounds = 1\nquorum = 1\ncohort = 2\ndeadline_s = 45.0"),
    )
    (tmp_path / "run.toml").write_text(text)
    output = tmp_path / "runs" / "first"
    log = output / "events.jsonl"

    with SuperLink(tmp_path) as link:
        link.node(table_sites["cardiology"])
        victim = link.node(table_sites["oncology"])
        run = link.start_run(
            f"run='{tmp_path / 'run.toml'}' output='{output}' connect-seconds=120.0"
        )
        wait_for(lambda: "Receiving: train message" in link.log("oncology"), 150)
        end_group(victim, kindly=False)
        run.wait(150)
        shown = link.log("flwr-run")

    assert (output / "summary.json").exists(), shown
    events = [json.loads(line) for line in log.read_text().splitlines()]
    (failed,) = [event for event in events if event["kind"] == "site_failed"]
    assert failed["site"] == "oncology"
    assert (failed["reason"], failed["message"]) in [
        ("deadline", "no answer within 45 s"),
        ("flower", "Flower error 5: the node is unavailable"),
    ]
    (aggregated,) = [event for event in events if event["kind"] == "round_aggregated"]
    assert aggregated["sites"] == ["cardiology"]


def test_every_process_is_ended_even_when_the_test_fails(tmp_path: Path) -> None:
    class Boom(Exception):
        pass

    link = SuperLink(tmp_path)

    def fail() -> None:
        with link:
            link.node(tmp_path)
            assert len(link.alive()) == 2
            raise Boom

    with pytest.raises(Boom):
        fail()
    assert link.alive() == []
