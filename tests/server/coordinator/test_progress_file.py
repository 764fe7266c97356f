"""What is kept of a run comes back bit for bit, or not at all."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import RunError
from anabranch.server.aggregation.fedex import Carried
from anabranch.server.aggregation.optimizers import Moments, OptimizerState
from anabranch.server.aggregation.private import ClientPrivate
from anabranch.server.aggregation.products import Product
from anabranch.server.coordinator import progress_file
from anabranch.server.coordinator.progress_file import Damaged, ProgressFolder, read, write
from anabranch.server.progress import Progress
from anabranch.server.rounds import RoundEngine
from anabranch.simulations.virtual_grid import VirtualGrid
from tests.simulations.faults.faulty import Steady, executor
from tests.simulations.rig import SIZES, Events, ToySite, adapter, config

METHODS = ["fedavg", "ffa", "rolora", "altqr", "fedex", "flora", "flexlora", "hetlora", "fedsa"]
OPTIMIZERS = ["momentum", "adam", "yogi", "adagrad"]
ROBUST = ["norm-clipping", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median",
          "centred-clipping"]  # fmt: skip


def run_of(method: str = "fedavg", rounds: int = 3, **tables: Any) -> RunConfig:
    extra = method in ("fedex", "flora")
    federation = {"residual_rank": 1} if extra else {}
    run = config(rounds=rounds, method=method, **federation)
    lora = {"lora": {"rank": 1 if extra else 2}}
    return msgspec.convert(msgspec.to_builtins(run) | lora | tables, RunConfig)


def private_run() -> RunConfig:
    run = config(rounds=3, cohort=60, weighting="uniform", client_evaluation=False)
    tables = {"client_privacy": {"epsilon": 20.0, "population": 100, "clipping": "adaptive"}}
    return msgspec.convert(msgspec.to_builtins(run) | tables, RunConfig)


CASES = (
    {f"method {method}": run_of(method) for method in METHODS}
    | {
        f"server {name}": run_of(server={"optimizer": name, "learning_rate": 0.1})
        for name in OPTIMIZERS
    }
    | {
        f"robust {rule}": run_of("ffa", robust={"rule": rule, "byzantine": 0, "trim": 0.25})
        for rule in ROBUST
    }
    | {
        "tiers": config(rounds=3, cohort=2, tiers=2),
        "buffer": config(rounds=3, buffer=2),
        "client privacy": private_run(),
    }
)


def engine_of(run: RunConfig, **hooks: Any) -> RoundEngine:
    private = run.client_privacy is not None
    sites = (
        [ToySite(f"toy-{i:03}", 10) for i in range(100)]
        if private
        else [ToySite(name, n) for name, n in sorted(SIZES.items())]
    )
    grid = VirtualGrid(executor(sites), len(sites), journeys=Steady(len(sites)))
    if private:
        hooks["randomness"] = Randomness.reproducible(torch.Generator().manual_seed(5))
    time: dict[str, Any] = {"clock": grid.clock, "sleep": grid.sleep, "poll_s": math.inf}
    return RoundEngine(grid, run, run="toy-1", **time, **hooks)


def progresses(run: RunConfig) -> list[Progress]:
    kept: list[Progress] = []
    engine_of(run, progress=kept.append).run(adapter())
    return kept


def data_of(progress: Progress) -> bytes:
    pieces: list[bytes] = []
    write(pieces.append, progress)
    return b"".join(pieces)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every number, text and array of a value, with where it is, its type and its bits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        yield path, type(value)
        for name in names:
            if name != "row":  # how the arrays of an adapter lie in memory
                yield from leaves(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, msgspec.Struct):
        yield path, type(value)
        for name in value.__struct_fields__:
            yield from leaves(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, np.ndarray):
        yield path, (value.dtype.str, value.shape, value.tobytes())
    elif isinstance(value, dict):
        yield path, list(value)
        for name, one in value.items():
            yield from leaves(one, f"{path}[{name}]")
    elif isinstance(value, tuple):
        yield path, len(value)
        for place, one in enumerate(value):
            yield from leaves(one, f"{path}[{place}]")
    elif isinstance(value, float):
        yield path, struct.pack("<d", value)
    else:
        yield path, value


def assert_same(one: Any, other: Any) -> None:
    for first, second in zip(leaves(one), leaves(other), strict=True):
        assert first == second


# Laws


@pytest.mark.parametrize("case", CASES)
def test_every_rule_comes_back_bit_for_bit(case: str) -> None:
    for progress in progresses(CASES[case]):
        back = read(data_of(progress), "a file")

        assert_same(progress, back)
        assert data_of(back) == data_of(progress)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("buffer",)])
def test_a_run_from_the_disk_ends_as_one_that_was_never_stopped(case: str, tmp_path: Path) -> None:
    run = CASES[case]
    if run.client_privacy is not None:
        run = CASES["method fedavg"]  # its noise is drawn anew: nothing to compare
    folder = ProgressFolder(tmp_path / "progress")
    plain = engine_of(run).run(adapter())
    points = len(progresses(run))

    class Died(Exception):
        pass

    for life in range(1, points + 1):
        seen: list[Progress] = []

        def keep(progress: Progress, seen: list[Progress] = seen) -> None:
            folder.save(progress)
            seen.append(progress)
            raise Died

        if life == 1:
            with pytest.raises(Died):
                engine_of(run, progress=keep).run(adapter())
            continue
        with pytest.raises(Died):
            engine_of(run, progress=keep).run(adapter(), folder.load())
    done = engine_of(run).run(adapter(9.0), folder.load())

    assert_same(done.adapter, plain.adapter)
    assert_same(done.best_adapter, plain.best_adapter)
    assert [r.trained for r in done.history] == [r.trained for r in plain.history]
    assert [r.client for r in done.history] == [r.client for r in plain.history]


DTYPES: list[np.dtype[Any]] = [np.dtype("<f8"), np.dtype("<f4")]
arrays: st.SearchStrategy[np.ndarray] = hnp.arrays(
    st.sampled_from(DTYPES),
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=4),
    elements=st.floats(width=32),
)


@settings(max_examples=50)
@given(first=arrays, second=arrays, numbers=st.lists(st.floats(), max_size=4), turned=st.booleans())
def test_every_state_comes_back_bit_for_bit(
    first: np.ndarray, second: np.ndarray, numbers: list[float], turned: bool
) -> None:
    product = Product(first.T if turned else first, second[:, ::-1])
    state = ClientPrivate(
        inner=OptimizerState(Carried({"a.b": product}), 3, {"w": Moments(2, second, first)}),
        clipping_norm=0.1,
        made=tuple(numbers),
    )
    progress = Progress(
        run="r", config="c", adapter=adapter(-0.0), state=state, best=adapter(1e-45), sites={}
    )

    back = read(data_of(progress), "a file")

    assert_same(back, progress)
    kept = back.state.inner.inner.products["a.b"].b
    assert kept.flags.f_contiguous or not first.T.flags.f_contiguous or not turned
    assert kept.flags.writeable


@settings(max_examples=60)
@given(at=st.integers(0, 10**6), change=st.integers(1, 255), cut=st.booleans())
def test_no_damage_is_ever_read(at: int, change: int, cut: bool) -> None:
    data = bytearray(data_of(SAMPLE))
    place = at % len(data)
    if cut:
        del data[place:]
    else:
        data[place] ^= change

    with pytest.raises(Damaged):
        read(bytes(data), "a file")


SAMPLE = Progress(run="r", config="c", adapter=adapter(), state=None, best=adapter(), sites={})


# Examples


def test_the_newest_two_are_kept_and_the_newest_is_taken(tmp_path: Path) -> None:
    folder = ProgressFolder(tmp_path / "progress")
    assert folder.load() is None
    for progress in progresses(run_of(rounds=3)):
        folder.save(progress)

    assert sorted(file.name for file in folder.path.iterdir()) == [
        "000003-1-merged.progress",
        "000003-2-evaluated.progress",
    ]
    last = folder.load()
    assert last is not None
    assert (last.round, last.evaluated) == (3, True)


def test_what_a_crash_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = ProgressFolder(tmp_path)
    folder.save(SAMPLE)
    (tmp_path / ".000001-1-merged.progress.x.partial").write_bytes(b"half")

    assert folder.load() is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_an_adapter_that_is_the_best_and_the_last_is_written_once() -> None:
    one, other = adapter(), adapter()
    same = dataclasses.replace(SAMPLE, adapter=one, best=one)
    two = dataclasses.replace(SAMPLE, adapter=one, best=other)

    assert len(data_of(same)) < len(data_of(two))
    back = read(data_of(same), "a file")
    assert back.best is back.adapter


def kept(folder: Path, run: RunConfig, number: int, **fields: Any) -> ProgressFolder:
    """Return a folder that holds the first `number` progresses of a run."""
    made = ProgressFolder(folder, **fields)
    for progress in progresses(run)[:number]:
        made.save(progress)
    return made


@pytest.mark.parametrize(("number", "before"), [(2, (1, False)), (3, (1, True))])
def test_a_damaged_newest_gives_way_to_the_one_before_and_says_so(
    number: int, before: tuple[int, bool], tmp_path: Path
) -> None:
    events = Events()
    folder = kept(tmp_path, run_of(), number, event=events)
    newest = max(tmp_path.glob("*.progress"))
    newest.write_bytes(newest.read_bytes()[:-1])

    progress = folder.load()

    assert progress is not None
    assert (progress.round, progress.evaluated) == before
    (told,) = events.of("progress_damaged")
    assert told["file"] == f"{newest.name}.damaged"
    assert "its checksum does not match" in told["message"]
    assert (tmp_path / told["file"]).exists()
    assert folder.load() is not None  # and again


def test_a_private_round_that_may_have_left_is_never_made_again(tmp_path: Path) -> None:
    folder = kept(tmp_path, private_run(), 3, private=True)
    newest = max(tmp_path.glob("*.progress"))
    newest.write_bytes(newest.read_bytes()[:-1])

    with pytest.raises(RunError, match=r"2-1|000002-1-merged.*noisy mean.*is made once"):
        folder.load()


def test_a_private_round_is_evaluated_again_from_its_merge(tmp_path: Path) -> None:
    folder = kept(tmp_path, private_run(), 4, private=True)
    newest = max(tmp_path.glob("*.progress"))
    newest.write_bytes(b"")

    progress = folder.load()

    assert progress is not None
    assert (progress.round, progress.evaluated) == (2, False)
    assert len(progress.state.made) == 2


# Refusals


def test_two_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = kept(tmp_path, run_of(), 4)
    for file in tmp_path.glob("*.progress"):
        file.write_bytes(b"no")

    with pytest.raises(RunError, match=r"000002-2.*checksum.*000002-1.*Restore one of them"):
        folder.load()


def test_a_single_damaged_file_is_refused(tmp_path: Path) -> None:
    folder = kept(tmp_path, run_of(), 1)
    (file,) = tmp_path.glob("*.progress")
    file.write_bytes(b"no")

    with pytest.raises(RunError, match="there is none before it: restore it from a backup"):
        folder.load()


def test_a_newer_version_is_refused_and_nothing_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = kept(tmp_path, run_of(), 1)
    monkeypatch.setattr(progress_file, "FORMAT", 2)
    folder.save(progresses(run_of())[1])
    monkeypatch.undo()

    with pytest.raises(RunError, match=r"newer version of anabranch \(format 2, this one reads 1"):
        folder.load()


@pytest.mark.parametrize("state", [{1: 2.0}, object(), np.array(["x"]), {"$": 1}])
def test_what_no_progress_is_made_of_is_not_written(state: Any) -> None:
    with pytest.raises(TypeError, match="a progress"):
        data_of(dataclasses.replace(SAMPLE, state=state))


def test_a_kind_that_is_not_on_the_list_is_not_made() -> None:
    class OptimizerState:
        """Another one of that name."""

    with pytest.raises(TypeError, match="a progress is not made of"):
        data_of(dataclasses.replace(SAMPLE, state=OptimizerState()))


def test_the_disk_holds_it_when_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)

    ProgressFolder(tmp_path).save(SAMPLE)

    assert len(synced) == 2  # the file, and the folder that names it


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kept(tmp_path, run_of(), 2)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save(progresses(run_of())[2])
    monkeypatch.undo()

    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
