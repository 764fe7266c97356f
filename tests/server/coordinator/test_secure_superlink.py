"""Secure sums over a real SuperLink, among real joined sites: processes, TLS, policies, rosters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from anabranch.protocols import wire
from anabranch.protocols.config import parse
from anabranch.server.evaluation import initial_adapter
from anabranch.simulations import engines
from tests.faults.killing import Kill, storm
from tests.faults.rig import Rig
from tests.runs import table_text, write_table
from tests.secure_cases import furthest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SITES = ("east", "north", "south")
TOML = table_text(
    ("rounds = 2", "rounds = 2\nquorum = 3\ndeadline_s = 60.0"),
    extra="[secure_aggregation]\nminimum = 3\nvalue_bits = 28\ndeadline_s = 30.0\n",
)

KILLS = (
    Kill("site", "renamed *kept/*"),
    Kill("site", "call Told.secure"),
    Kill("site", "called Told.secure", 2),
    Kill("site", "call Told.secure", 3),
    Kill("site", "renamed *given/*"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("records")
    return {name: write_table(folder / f"{name}.csv", seed=i) for i, name in enumerate(SITES)}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("secure") / "rig", SITES)
    try:
        rig.gather(lambda name: data[name])
        yield rig
    finally:
        rig.close()


def test_joined_sites_sum_what_they_average_in_the_clear(
    rig: Rig, data: dict[str, Path], tmp_path: Path
) -> None:
    run = rig.begin(TOML)
    entry = rig.over(run, 180.0)
    assert entry.state == "finished", f"{entry.detail}\n{rig.tails()}"

    config = parse(TOML.encode(), source="run.toml")
    clear = msgspec.structs.replace(config, secure_aggregation=None)
    folders = {}
    for name, records in data.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "site.toml").write_text(f'name = "{name}"\ndata = "{records}"\n')
    plain = engines.run("sequential", clear, folders, initial_adapter(clear), run_name="plain")

    assert furthest(wire.decode_adapter(rig.adapter(run)), plain.adapter) < 1e-3
    sums = [one for one in rig.events(run) if one["kind"] == "secure_sum"]
    assert [one["survivors"] for one in sums] == [list(SITES)] * 2
    trained = [one for one in rig.events(run) if one["kind"] == "site_trained"]
    assert len(trained) == 6
    assert all("num_examples" not in one and "loss" not in one for one in trained)
    for name in SITES:
        given = json.loads((rig.site(name) / "secure" / "given" / run).read_text())
        assert list(given) == ["1", "2"]
        kinds = [json.loads(line)["kind"] for line in _lines(rig.site(name) / "audit.jsonl")]
        assert kinds.count("update-masked") == 2
        assert kinds.count("peer-pinned") == 1


@pytest.mark.long
def test_whoever_is_killed_in_a_sum_the_others_open_it_and_no_update_is_in_two(rig: Rig) -> None:
    """Two of three open a sum. Killed before it has given its update, a site is not in it."""
    run = rig.begin(
        table_text(
            ("rounds = 2", "rounds = 8\nquorum = 3\ndeadline_s = 60.0"),
            extra="[secure_aggregation]\nminimum = 2\nthreshold = 0.5\ncolluding = 0.0\n"
            "deadline_s = 30.0\n",
        )
    )

    result = storm(rig, run, KILLS, seed=5)

    assert (result.kills, result.doubled) == (len(KILLS), 0)
    sums = [one for one in rig.events(run) if one["kind"] == "secure_sum"]
    opened = {one["round"]: one["survivors"] for one in sums if one["opened"]}
    assert sorted(opened) == list(range(1, 9))
    assert all(len(survivors) >= 2 for survivors in opened.values())
    assert sum(3 - len(survivors) for survivors in opened.values()) <= len(KILLS)
    assert sum(one["kind"] == "site_trained" for one in rig.events(run)) == 3 * 8
    for name in SITES:
        given = json.loads((rig.site(name) / "secure" / "given" / run).read_text())
        sums_of = [number for number, survivors in opened.items() if name in survivors]
        assert {str(number) for number in sums_of} <= given.keys()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
