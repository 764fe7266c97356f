from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.edge.runtime import personal as personalising
from anabranch.edge.runtime import state as states
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.personal import FILE, in_use, keep, personalise, undo
from anabranch.edge.runtime.predict import Predictor
from anabranch.edge.runtime.steps import Interrupted
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import DataError, DeviceError
from anabranch.protocols.tables import Training
from anabranch.protocols.wire import encode
from anabranch.storage.files import write_atomic

Make = Callable[..., Any]
GOOD = Training(learning_rate=0.02, batch_size=8)
BAD = Training(optimizer="sgd", learning_rate=500.0, momentum=0.0, max_grad_norm=None)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def files(home: Home, bundle: Any) -> list[str]:
    folder = home.adapters(bundle.manifest.name)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def moved(bundle: Any, by: float) -> Adapter:
    arrays = {n: a + np.float32(by) for n, a in bundle.adapter.arrays.items()}
    return Adapter(bundle.adapter.spec, arrays)


# Personalise


@pytest.mark.parametrize("kind", ["text", "table"])
def test_a_better_adapter_is_kept_and_used_from_then_on(
    make_tiny: Make, make_records: Make, home: Home, kind: str
) -> None:
    bundle = make_tiny(kind)
    records = make_records(bundle, 100)
    done = personalise(bundle, records, home, training=GOOD, steps=60)
    assert done.kept
    assert done.after.accuracy > done.before.accuracy
    assert done.before.records == 20  # the manifest's share
    assert done.trained.delta.num_examples == 80
    used = in_use(home, bundle)
    assert used is not None
    assert encode(used) == encode(done.trained.adapter)
    assert states.read(home.training(bundle.manifest.name) / "personal") is None

    again = personalise(bundle, records, home, training=GOOD, steps=5)
    assert encode(again.trained.before) == encode(used)  # it starts from the one in use
    assert again.before == done.after


def test_a_worse_adapter_is_rolled_back(make_tiny: Make, make_records: Make, home: Home) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 100)
    personalise(bundle, records, home, training=GOOD, steps=60)
    used, there = in_use(home, bundle), files(home, bundle)
    assert used is not None
    done = personalise(bundle, records, home, training=BAD, steps=3)
    assert not done.kept
    assert not done.after.at_least(done.before)
    now = in_use(home, bundle)
    assert now is not None
    assert encode(now) == encode(used)
    assert files(home, bundle) == there


def test_an_interrupted_personalisation_goes_on_with_the_same_result(
    make_tiny: Make, make_records: Make, home: Home, tmp_path: Path
) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 100)
    whole = personalise(bundle, records, Home(tmp_path / "other"), training=GOOD, steps=30)
    for asked in (7, 12):
        left = iter([False] * asked + [True])
        with pytest.raises(Interrupted):
            personalise(bundle, records, home, training=GOOD, steps=30, should_stop=left.__next__)
        assert in_use(home, bundle) is None
    done = personalise(bundle, records, home, training=GOOD, steps=30)
    assert done.trained.resumed_at == 19
    assert encode(done.trained.adapter) == encode(whole.trained.adapter)
    assert (done.before, done.after) == (whole.before, whole.after)


class Kill(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("point", ["discard", "keep"])
def test_a_kill_after_the_last_step_ends_with_the_same_adapter(
    make_tiny: Make,
    make_records: Make,
    home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 100)
    whole = personalise(bundle, records, Home(tmp_path / "other"), training=GOOD, steps=30)
    assert whole.kept

    def kill(*_: Any) -> None:
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(
            *((states, "discard") if point == "discard" else (personalising, "keep")), kill
        )
        with pytest.raises(Kill):
            personalise(bundle, records, home, training=GOOD, steps=30)
    done = personalise(bundle, records, home, training=GOOD, steps=30)
    assert encode(done.trained.adapter) == encode(whole.trained.adapter)
    assert (done.before, done.after) == (whole.before, whole.after)
    used = in_use(home, bundle)
    assert used is not None
    assert encode(used) == encode(whole.trained.adapter)


def test_a_training_that_diverges_changes_nothing(
    make_tiny: Make, make_records: Make, home: Home
) -> None:
    bundle = make_tiny("table")
    training = Training(optimizer="sgd", learning_rate=1e30, max_grad_norm=None)
    with np.errstate(all="ignore"), pytest.raises(DeviceError, match="learning_rate"):
        personalise(bundle, make_records(bundle, 50), home, training=training, steps=9)
    assert in_use(home, bundle) is None


def test_too_few_records_to_judge_by_are_refused(
    make_tiny: Make, make_records: Make, home: Home
) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 30)
    with pytest.raises(DataError, match="1 records leave none to judge by"):
        personalise(bundle, records.take([0]), home)
    with pytest.raises(DataError, match=r"share 0 of every label"):
        personalise(make_tiny("table", validation=0.0), records, home)


# Undo


def test_undo_brings_back_the_adapter_before_once(make_tiny: Make, home: Home) -> None:
    bundle = make_tiny("table")
    with pytest.raises(DeviceError, match="nothing to undo"):
        undo(home, bundle)
    first, second = moved(bundle, 0.1), moved(bundle, 0.2)
    keep(home, bundle, first)
    keep(home, bundle, second)
    back = undo(home, bundle)
    assert back is not None
    assert encode(back) == encode(first)
    assert len(files(home, bundle)) == 2
    with pytest.raises(DeviceError, match="nothing to undo"):
        undo(home, bundle)


def test_undo_of_the_first_one_brings_back_the_released_adapter(
    make_tiny: Make, home: Home
) -> None:
    bundle = make_tiny("table")
    keep(home, bundle, moved(bundle, 0.1))
    assert undo(home, bundle) is None
    assert in_use(home, bundle) is None
    assert files(home, bundle) == [FILE]


def test_at_most_two_adapters_lie_on_the_device(make_tiny: Make, home: Home) -> None:
    bundle = make_tiny("table")
    for step in range(5):
        keep(home, bundle, moved(bundle, step / 10 + 0.1))
    assert len(files(home, bundle)) == 3
    keep(home, bundle, moved(bundle, 0.5))  # the same once more: what came before stays
    back = undo(home, bundle)
    assert back is not None
    assert encode(back) == encode(moved(bundle, 0.4))


def test_the_adapter_of_another_bundle_is_not_used(make_tiny: Make, home: Home) -> None:
    bundle = make_tiny("table")
    keep(home, bundle, moved(bundle, 0.1))
    newer = make_tiny("table", version=2)
    assert in_use(home, newer) is None
    with pytest.raises(DeviceError, match="nothing to undo"):
        undo(home, newer)
    assert in_use(home, bundle) is not None


def test_a_kill_between_the_writes_leaves_the_adapter_before(
    make_tiny: Make, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_tiny("table")
    first = moved(bundle, 0.1)
    keep(home, bundle, first)
    write = write_atomic

    class Killed(BaseException):
        pass

    def killed(path: Path, data: bytes, mode: int = 0o644) -> None:
        if path.name == FILE:
            raise Killed
        write(path, data, mode)

    monkeypatch.setattr(personalising, "write_atomic", killed)
    with pytest.raises(Killed):
        keep(home, bundle, moved(bundle, 0.2))
    used = in_use(home, bundle)
    assert used is not None
    assert encode(used) == encode(first)


# Damage


def test_damaged_files_are_refused_and_named(make_tiny: Make, home: Home) -> None:
    bundle = make_tiny("table")
    keep(home, bundle, moved(bundle, 0.1))
    folder = home.adapters(bundle.manifest.name)
    (frame,) = folder.glob("*.bin")
    good = frame.read_bytes()
    frame.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DeviceError, match=r"damaged \(SHA-256 differs from its name\); delete"):
        in_use(home, bundle)
    frame.unlink()
    with pytest.raises(DeviceError, match="cannot be read"):
        in_use(home, bundle)
    frame.write_bytes(good)
    for text in ("{", '{"bundle": "x"}', "[]", "\ufffe"):
        (folder / FILE).write_text(text)
        with pytest.raises(DeviceError, match="delete it to use the released adapter"):
            in_use(home, bundle)


def test_an_adapter_of_another_spec_in_its_place_is_refused(make_tiny: Make, home: Home) -> None:
    bundle = make_tiny("table")
    keep(home, bundle, moved(bundle, 0.1))
    manifest = bundle.manifest
    spec = msgspec.structs.replace(manifest.spec, alpha=9.0)
    changed = replace(bundle, manifest=msgspec.structs.replace(manifest, spec=spec))
    with pytest.raises(DeviceError, match=r"adapter has alpha 4\.0, expected 9\.0"):
        in_use(home, changed)


def test_a_disk_that_takes_nothing_changes_nothing(
    make_tiny: Make, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_tiny("table")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(personalising, "write_atomic", full)
    with pytest.raises(DeviceError, match=r"cannot be written \(No space left on device\)"):
        keep(home, bundle, moved(bundle, 0.1))
    assert in_use(home, bundle) is None


def test_the_personal_adapter_answers_in_the_predictor(make_tiny: Make, home: Home) -> None:
    bundle = make_tiny("table")
    keep(home, bundle, moved(bundle, 0.5))
    x = np.ones((1, 6), np.float32)
    released = Predictor.open(bundle).logits(x)
    own = Predictor.open(bundle, adapter=in_use(home, bundle)).logits(x)
    assert not np.allclose(own, released)
