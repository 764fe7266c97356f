"""A site trains the part it is asked for, and keeps what the method leaves with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anabranch.client.models import Models
from anabranch.client.site import Site
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.protocols import wire
from anabranch.protocols.adapter import WHOLE, Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import (
    ConfigError,
    IncompatibleAdapter,
    ModelError,
    ProtocolError,
)
from anabranch.protocols.messages import Assignment
from anabranch.protocols.part import Part
from tests.runs import PRIVATE, table_run, write_site, write_table

FEDSA = ("rounds = 2", 'rounds = 2\nmethod = "fedsa"')
SHARED_A = Part(factors="A", dense=False)
SHARED_FACTORS = Part(dense=False)
LOCAL_HEAD = '\n[personal]\nhead = "local"\n'


@pytest.fixture
def site(tmp_path: Path) -> Site:
    data = write_table(tmp_path / "records.csv")
    return Site(write_site(tmp_path / "north", "north", data), Models())


def limited(site: Site, max_rank: int) -> Site:
    file = site.folder / "site.toml"
    file.write_text(file.read_text() + f"max_rank = {max_rank}\n")
    return Site(site.folder, Models())


def start(config: RunConfig, seed: int | None = None) -> Adapter:
    """Return the run's first adapter, or one with random values everywhere."""
    adapter = read_adapter(load_classifier(config))
    if seed is None:
        return adapter
    rng = np.random.default_rng(seed)
    arrays = {
        name: a + rng.normal(0, 0.2, a.shape).astype(np.float32)
        for name, a in adapter.arrays.items()
    }
    return Adapter(adapter.spec, arrays)


def asked(config: RunConfig, part: Part = WHOLE, number: int = 1, run: str = "r1") -> Assignment:
    return Assignment(run=run, round=number, config=config, part=part)


def read(frame: bytes, adapter: Adapter, part: Part) -> Delta:
    return wire.decode_delta(frame, adapter.spec, part)


# Parts


@pytest.mark.parametrize(
    "part",
    [Part(factors="B"), Part(factors="A"), Part(ranks=(0, 2)), Part(factors="B", ranks=(1,))],
    ids=str,
)
@pytest.mark.parametrize("private", [False, True])
def test_the_frame_is_of_the_part_and_says_how_many_steps(
    site: Site, part: Part, private: bool
) -> None:
    config = table_run(("local_epochs = 2", "local_steps = 3"), extra=PRIVATE if private else "")
    adapter = start(config, seed=0)

    report, frame = site.train(asked(config, part), adapter)

    delta = read(frame, adapter, part)
    assert {name: a.shape for name, a in delta.arrays.items()} == part.shapes(adapter.spec)
    assert all(a.any() for a in delta.arrays.values())
    assert delta.steps == report.steps == 3


def test_a_part_costs_less_to_send(site: Site) -> None:
    config = table_run()
    whole, half = (
        site.train(asked(config, part), start(config))[1] for part in (WHOLE, Part(factors="B"))
    )

    assert len(half) < len(whole)


@pytest.mark.parametrize(
    ("part", "rank"), [(WHOLE, 3), (Part(factors="B"), 3), (Part(factors="A", ranks=(0, 1)), 2)]
)
def test_a_part_beyond_the_rank_of_the_machine_is_refused(
    site: Site, part: Part, rank: int
) -> None:
    config = table_run()

    with pytest.raises(ConfigError, match=rf"asked to train rank {rank}, but max_rank = 1 in"):
        limited(site, 1).train(asked(config, part), start(config))


@pytest.mark.parametrize("part", [Part(factors="B", ranks=(2,)), Part(factors="none")])
def test_as_many_ranks_as_the_machine_trains_may_be_any(site: Site, part: Part) -> None:
    config = table_run()
    weak = limited(site, 1)

    _, frame = weak.train(asked(config, part), start(config))

    assert weak.max_rank == 1
    assert read(frame, start(config), part).norm() > 0


def test_a_limit_counts_what_is_kept_too(site: Site) -> None:
    config = table_run(FEDSA)

    with pytest.raises(ConfigError, match="asked to train rank 3, but max_rank = 2"):
        limited(site, 2).train(asked(config, Part(factors="none")), start(config))


def test_ranks_that_are_not_there_are_refused_before_anything_is_spent(site: Site) -> None:
    config = table_run(("local_epochs = 2", "local_steps = 3"), extra=PRIVATE)

    with pytest.raises(IncompatibleAdapter, match="ranks: expected different indices from 0 to 2"):
        site.train(asked(config, Part(ranks=(3,))), start(config))

    assert site.ledger.history() == []


def test_a_limit_below_one_is_refused(site: Site) -> None:
    with pytest.raises(ConfigError, match=r"Expected `int` >= 1 - at `\$.max_rank`"):
        limited(site, 0)


# Kept tensors


@pytest.mark.parametrize("private", [False, True])
def test_fedsa_keeps_b_and_the_head_and_goes_on_with_them(site: Site, private: bool) -> None:
    config = table_run(
        FEDSA, ("local_epochs = 2", "local_steps = 3"), extra=PRIVATE if private else ""
    )
    adapter = start(config)

    _, frame = site.train(asked(config, SHARED_A), adapter)
    after_one = kept(site, adapter)
    again = Site(site.folder, Models())  # another process
    again.train(asked(config, SHARED_A, 2), adapter)
    after_two = kept(site, adapter)

    assert set(read(frame, adapter, SHARED_A).arrays) == set(SHARED_A.names(adapter.spec))
    for name, array in after_one.arrays.items():
        if name.endswith("lora_A.weight"):
            assert not array.any()
        else:
            assert array.any()
            assert (after_two.arrays[name] != array).any()


def kept(site: Site, adapter: Adapter, run: str = "r1") -> Adapter:
    data = (site.folder / "personal" / f"{run}.kept.adapter").read_bytes()
    return wire.decode_adapter(data, adapter.spec)


def test_the_next_round_begins_where_the_kept_tensors_ended(tmp_path: Path) -> None:
    # The received B and head do not matter once the site has its own; without, they do.
    config = table_run(FEDSA)
    adapter = start(config, seed=0)
    other = start(config, seed=1)
    mixed = Adapter(
        adapter.spec,
        {n: (adapter if n.endswith("lora_A.weight") else other).arrays[n] for n in other.arrays},
    )
    data = write_table(tmp_path / "records.csv")
    frames = []
    for name, received in (("a", adapter), ("b", mixed)):
        one = Site(write_site(tmp_path / name, "north", data), Models())
        first = one.train(asked(config, SHARED_A), received)[1]
        (one.folder / "personal" / "r1.kept.adapter").write_bytes(wire.encode(adapter))
        second = one.train(asked(config, SHARED_A, 2), received)[1]
        frames.append((first, second))

    assert frames[0][0] != frames[1][0]
    assert frames[0][1] == frames[1][1]


def test_a_local_head_stays_and_is_what_the_site_is_measured_with(site: Site) -> None:
    config = table_run(("local_epochs = 2", "local_epochs = 20\nholdout = 0.25"), extra=LOCAL_HEAD)
    adapter = start(config)

    before = site.evaluate(asked(config), adapter)
    _, frame = site.train(asked(config, SHARED_FACTORS), adapter)
    delta = read(frame, adapter, SHARED_FACTORS)
    after = site.evaluate(asked(config), adapter.plus(delta))

    assert not {name for name in delta.arrays if name.startswith("head.")}
    assert after.metrics["loss"] < 0.7 * before.metrics["loss"]
    assert not {name for name in after.metrics if name.startswith("personal_")}


def test_runs_keep_apart(site: Site) -> None:
    config = table_run(extra=LOCAL_HEAD)
    site.train(asked(config, SHARED_FACTORS, run="r1"), start(config))
    before = kept(site, start(config), "r1").arrays["head.weight"]

    site.train(asked(config, SHARED_FACTORS, run="r2"), start(config))

    assert (kept(site, start(config), "r1").arrays["head.weight"] == before).all()
    assert (kept(site, start(config), "r2").arrays["head.weight"] == before).all()


def test_a_part_that_holds_what_is_kept_is_refused(site: Site) -> None:
    config = table_run(extra=LOCAL_HEAD)

    with pytest.raises(ProtocolError, match=r"head\.bias stays at the site in this run"):
        site.train(asked(config, WHOLE), start(config))


@pytest.mark.parametrize("damage", ["cut", "changed", "of another adapter"])
def test_a_damaged_file_is_refused_before_anything_is_spent(site: Site, damage: str) -> None:
    config = table_run(FEDSA, ("local_epochs = 2", "local_steps = 3"), extra=PRIVATE)
    adapter = start(config)
    site.train(asked(config, SHARED_A), adapter)
    spent = site.ledger.history()
    file = site.folder / "personal" / "r1.kept.adapter"
    data = file.read_bytes()
    other = start(table_run(("seed = 3", "seed = 4")))
    file.write_bytes(
        {
            "cut": data[:-5],
            "changed": data[:-40] + b"\1" + data[-39:],
            "of another adapter": wire.encode(other),
        }[damage]
    )

    with pytest.raises(ModelError, match=r"personal/r1\.kept\.adapter .* or delete it") as caught:
        site.train(asked(config, SHARED_A, 2), adapter)

    assert str(site.folder) not in str(caught.value)
    assert site.ledger.history() == spent
    file.unlink()
    site.train(asked(config, SHARED_A, 2), adapter)


@pytest.mark.parametrize("run", ["../../evil", "a/b", "", ".hidden", "x" * 300, "a\n"])
def test_a_run_is_never_a_path(site: Site, run: str) -> None:
    config = table_run(extra=LOCAL_HEAD)

    with pytest.raises(ProtocolError, match="run: expected up to 200 letters, digits"):
        site.train(asked(config, SHARED_FACTORS, run=run), start(config))


def test_no_more_than_two_classifiers_are_held_per_thread() -> None:
    models = Models()
    configs = [table_run(("seed = 3", f"seed = {seed}")) for seed in (1, 2, 3)]
    first, second = (models.classifier(config, "cpu") for config in configs[:2])

    assert models.classifier(configs[0], "cpu") is first
    models.classifier(configs[2], "cpu")  # takes the place of the second

    assert models.classifier(configs[0], "cpu") is first
    assert models.classifier(configs[1], "cpu") is not second
