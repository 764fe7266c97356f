import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.edge.runtime import state as states
from anabranch.edge.runtime.state import FILE, State, difference, discard, read, save
from anabranch.protocols.errors import DeviceError

ABOUT = {"bundle": "b" * 64, "records": "r" * 64}


def state_of(step: int = 3, seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    arrays = {
        "w/a": rng.normal(size=(2, 3)).astype(np.float32),
        "m/a": rng.normal(size=()).astype(np.float32),
        "v/b": np.zeros((0, 4), np.float32),
    }
    return State(ABOUT, step, rng.normal(size=step), arrays)


@given(st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_what_is_read_is_what_was_saved_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, step: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("state")
    one = state_of(step, seed)
    save(folder, one)
    got = read(folder)
    assert got is not None
    assert (got.about, got.step, list(got.arrays)) == (ABOUT, step, list(one.arrays))
    np.testing.assert_array_equal(got.losses, one.losses)
    for name, array in one.arrays.items():
        assert got.arrays[name].dtype == np.float32
        np.testing.assert_array_equal(got.arrays[name], array)
        assert got.arrays[name].flags.writeable


def test_a_state_replaces_the_one_before_and_is_for_the_owner_alone(tmp_path: Path) -> None:
    assert read(tmp_path / "new") is None
    save(tmp_path / "new", state_of(1))
    save(tmp_path / "new", state_of(2))
    got = read(tmp_path / "new")
    assert got is not None
    assert got.step == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FILE]
    assert stat.S_IMODE((tmp_path / "new" / FILE).stat().st_mode) == 0o600
    discard(tmp_path / "new")
    discard(tmp_path / "new")
    assert read(tmp_path / "new") is None


def test_every_flipped_byte_and_every_cut_is_refused(tmp_path: Path) -> None:
    save(tmp_path, state_of(2))
    path = tmp_path / FILE
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(DeviceError, match="damaged"):
            read(tmp_path)
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(DeviceError, match=r"damaged .* delete the file"):
            read(tmp_path)
    path.write_bytes(good + b"x")
    with pytest.raises(DeviceError, match="damaged"):
        read(tmp_path)


def test_a_checksum_over_something_else_is_refused(tmp_path: Path) -> None:
    import hashlib

    for body in (
        b"ABT1" + (99).to_bytes(4, "little") + b"{}",
        b"ABT1" + (2).to_bytes(4, "little") + b"{}",
        b"ABT1" + (38).to_bytes(4, "little") + b'{"about":{},"step":9,"arrays":[]}     ',
        b"ABT1" + (46).to_bytes(4, "little") + b'{"about":{},"step":0,"arrays":[["a",[999999]]]}',
    ):
        (tmp_path / FILE).write_bytes(body + hashlib.sha256(body).digest())
        with pytest.raises(DeviceError, match="damaged"):
            read(tmp_path)


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(DeviceError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DeviceError, match="cannot be written"):
        save(tmp_path / "file", state_of())


def test_the_first_difference_is_named() -> None:
    assert difference(ABOUT, dict(ABOUT)) is None
    assert difference(ABOUT, {**ABOUT, "records": "x"}) == "records"
    assert difference(ABOUT, {**ABOUT, "seed": "1"}) == "seed"
    assert states.difference({}, ABOUT) == "bundle"
