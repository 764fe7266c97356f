from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from anabranch.client import feedback
from anabranch.client.feedback import Memory, carry, compress, empty, memory_path
from anabranch.protocols import wire
from anabranch.protocols.adapter import WHOLE, Adapter, Delta
from anabranch.protocols.codecs.codec import CodecName
from anabranch.protocols.errors import ConfigError, IncompatibleAdapter, ModelError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Uplink
from anabranch.storage.files import write_atomic

A, B, HEAD = "q.lora_A.weight", "q.lora_B.weight", "head.weight"
SPEC = AdapterSpec(
    base="b" * 64,
    tokenizer="",
    rank=3,
    alpha=6.0,
    targets=("q",),
    tensors=((HEAD, (2, 4)), (A, (3, 7)), (B, (5, 3))),
)
ONLY_A, ONLY_B = Part(factors="A"), Part(factors="B")
CODECS: list[CodecName] = ["fp32", "fp16", "int8", "int4", "top-k"]
seeds = st.integers(0, 2**32)
Float = NDArray[np.float32]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(seed: int, *shape: int) -> Float:
    return rng(seed).standard_normal(shape).astype(np.float32)


def adapter(seed: int, **arrays: Float) -> Adapter:
    values = {name: normal(seed + i, *shape) for i, (name, shape) in enumerate(SPEC.tensors)}
    return Adapter(SPEC, values | {{"a": A, "b": B}[name]: one for name, one in arrays.items()})


def delta(seed: int, part: Part = WHOLE) -> Delta:
    return Delta(SPEC, part.take(SPEC, adapter(seed).arrays), 10, part=part, steps=2)


def uplink(codec: CodecName, *, error_feedback: bool = True, keep: float = 0.3) -> Uplink:
    return Uplink(codec=codec, keep=keep, error_feedback=error_feedback)


def decoded(frame: bytes, part: Part, how: Uplink) -> Delta:
    return wire.decode_delta(frame, SPEC, part, codec=how.codec, keep=how.keep)


def send(*arguments: Any) -> bytes:
    """Send as a round does that is done: what changes is on disk afterwards."""
    folder: Path = arguments[4]
    frame, changes = feedback.send(*arguments)
    for name, data in changes.items():
        write_atomic(folder / name, data)
    return frame


def product(left: Float, right: Float) -> NDArray[np.float64]:
    return left.astype(np.float64) @ right.astype(np.float64)


def orthogonal(seed: int) -> NDArray[np.float64]:
    return np.asarray(np.linalg.qr(rng(seed).standard_normal((3, 3)))[0])


# Laws


@pytest.mark.parametrize("codec", CODECS)
@given(seed=seeds, part=st.sampled_from([WHOLE, ONLY_A, ONLY_B, Part(factors="none")]))
def test_what_was_sent_and_the_memory_are_the_sum_of_all_deltas(
    codec: CodecName, seed: int, part: Part
) -> None:
    how, received, memory = uplink(codec), adapter(seed), empty(SPEC)
    wanted = sent = Delta(SPEC, {n: 0 * a for n, a in delta(0, part).arrays.items()}, 0, part=part)
    for number in range(4):
        change = delta(seed + 100 * number, part)
        frame, memory = compress(change, received, how, rng(seed + number), memory)
        wanted, sent = wanted.plus(change), sent.plus(decoded(frame, part, how))

    left = part.take(SPEC, memory.left.arrays)
    for name, array in wanted.arrays.items():
        np.testing.assert_allclose(sent.arrays[name] + left[name], array, atol=1e-5)
    frozen = received.arrays
    if part == ONLY_B:  # and so in the space of products
        said = product(sent.arrays[B], frozen[A]) + product(left[B], frozen[A])
        np.testing.assert_allclose(said, product(wanted.arrays[B], frozen[A]), atol=1e-4)


@given(seed=seeds)
def test_a_rotation_of_the_frozen_factor_keeps_the_product_of_the_memory(seed: int) -> None:
    turn = orthogonal(seed)
    before, left = adapter(seed), adapter(seed + 10)
    now = adapter(seed, a=(turn @ before.arrays[A]).astype(np.float32))
    moved = carry(Memory(left, before), now, "B").left.arrays

    np.testing.assert_allclose(
        product(moved[B], now.arrays[A]), product(left.arrays[B], before.arrays[A]), atol=1e-4
    )
    np.testing.assert_allclose(moved[B], left.arrays[B] @ turn.T, atol=1e-4)  # the gauge law


@given(seed=seeds)
def test_orthonormal_rows_or_columns_keep_the_product_of_the_memory(seed: int) -> None:
    before, left = adapter(seed), adapter(seed + 10)
    rows = np.linalg.qr(before.arrays[A].T)[0].T.astype(np.float32)
    columns = np.linalg.qr(before.arrays[B])[0].astype(np.float32)
    now = adapter(seed, a=rows, b=columns)
    of_b = carry(Memory(left, before), now, "B").left.arrays
    of_a = carry(Memory(left, before), now, "A").left.arrays

    np.testing.assert_allclose(
        product(of_b[B], rows), product(left.arrays[B], before.arrays[A]), atol=1e-4
    )
    np.testing.assert_allclose(
        product(columns, of_a[A]), product(before.arrays[B], left.arrays[A]), atol=1e-4
    )


@given(seed=seeds)
def test_a_memory_moves_to_the_nearest_product_that_the_new_factor_can_say(seed: int) -> None:
    left, before, now = adapter(seed), adapter(seed + 10), adapter(seed + 20)
    moved = carry(Memory(left, before), now, "B").left.arrays[B]
    gap = product(moved, now.arrays[A]) - product(left.arrays[B], before.arrays[A])

    # Normal equations of least squares: the gap is orthogonal to every row of A.
    np.testing.assert_allclose(gap @ now.arrays[A].T, 0, atol=1e-3)
    carried = np.linalg.norm(product(moved, now.arrays[A]))
    assert carried <= np.linalg.norm(product(left.arrays[B], before.arrays[A])) * (1 + 1e-5)


@pytest.mark.parametrize("factors", ["A", "B", "both", "none"])
@given(seed=seeds)
def test_where_the_frozen_factor_is_the_same_so_is_the_memory_bit_for_bit(
    factors: Any, seed: int
) -> None:
    memory = Memory(adapter(seed), adapter(seed + 1))
    moved = carry(memory, memory.frozen, factors)

    for name, array in memory.left.arrays.items():
        assert moved.left.arrays[name].tobytes() == array.tobytes()


@given(seed=seeds, ranks=st.sets(st.integers(0, 2), min_size=1).map(lambda s: tuple(sorted(s))))
def test_what_is_not_in_the_part_waits(seed: int, ranks: tuple[int, ...]) -> None:
    part = Part(factors="B", ranks=ranks, dense=False)
    received = adapter(seed)
    memory = Memory(adapter(seed + 1), received)
    change = delta(seed + 2, part)
    frame, after = compress(change, received, uplink("int4"), rng(seed), memory)
    waiting = [rank for rank in range(3) if rank not in ranks]

    for name in (A, HEAD):
        assert after.left.arrays[name].tobytes() == memory.left.arrays[name].tobytes()
    assert np.array_equal(after.left.arrays[B][:, waiting], memory.left.arrays[B][:, waiting])
    sent = decoded(frame, part, uplink("int4")).arrays[B]
    np.testing.assert_allclose(
        sent + after.left.arrays[B][:, ranks],
        change.arrays[B] + memory.left.arrays[B][:, ranks],
        atol=1e-5,
    )


def test_a_memory_of_b_waits_in_its_own_coordinates_while_a_is_trained() -> None:
    first, second = adapter(0), adapter(1)
    third = adapter(2, a=(orthogonal(0) @ first.arrays[A]).astype(np.float32))
    how, memory = uplink("top-k"), empty(SPEC)
    _, memory = compress(delta(3, ONLY_B), first, how, rng(), memory)
    waiting = memory.left.arrays[B]
    _, memory = compress(delta(4, ONLY_A), second, how, rng(), memory)
    assert np.array_equal(memory.left.arrays[B], waiting)
    assert np.array_equal(memory.frozen.arrays[A], first.arrays[A])
    assert np.array_equal(memory.frozen.arrays[B], second.arrays[B])
    moved = carry(memory, third, "B").left.arrays[B]

    np.testing.assert_allclose(
        product(moved, third.arrays[A]), product(waiting, first.arrays[A]), atol=1e-5
    )


# Examples


def test_top_k_sends_everything_in_the_end_only_with_error_feedback() -> None:
    how, change, received = uplink("top-k", keep=0.2), delta(1, ONLY_B), adapter(2)
    memory = empty(SPEC)
    total, without = np.zeros((5, 3), np.float32), np.zeros((5, 3), np.float32)
    for _ in range(100):
        frame, memory = compress(change, received, how, rng(), memory)
        total += decoded(frame, ONLY_B, how).arrays[B]
        alone, _ = compress(change, received, how, rng(), empty(SPEC))
        without += decoded(alone, ONLY_B, how).arrays[B]
    wanted = 100 * change.arrays[B]

    assert np.linalg.norm(total - wanted) < 0.1 * np.linalg.norm(wanted)
    assert np.linalg.norm(without - wanted) > 0.4 * np.linalg.norm(wanted)


def test_nearly_dependent_rows_do_not_blow_a_memory_up() -> None:
    one = normal(1, 1, 7)
    rows = np.concatenate([one, one * np.float32(1 + 1e-7), normal(2, 1, 7)])
    left, before = adapter(3), adapter(4)
    moved = carry(Memory(left, before), adapter(5, a=rows), "B").left.arrays[B]

    assert np.abs(moved).max() < 100


def test_compressing_changes_none_of_its_arguments() -> None:
    change, received, memory = delta(1), adapter(2), Memory(adapter(3), adapter(4))
    arrays = (change.arrays, received.arrays, memory.left.arrays, memory.frozen.arrays)
    before = [{name: array.copy() for name, array in one.items()} for one in arrays]
    compress(change, received, uplink("int8"), rng(), memory)

    for one, then in zip(arrays, before, strict=True):
        for name, array in one.items():
            assert np.array_equal(array, then[name])


# Files


def test_without_error_feedback_nothing_is_written(tmp_path: Path) -> None:
    how = uplink("int8", error_feedback=False)
    frame = send(delta(1), adapter(2), how, rng(7), tmp_path, "run-1")

    assert frame == wire.encode(delta(1), codec="int8", rng=rng(7))
    assert list(tmp_path.iterdir()) == []


def test_the_memory_of_one_round_is_in_the_frame_of_the_next(tmp_path: Path) -> None:
    how, memory = uplink("int4"), empty(SPEC)
    for number in range(3):
        change, received = delta(number, ONLY_B), adapter(number + 10)
        frame = send(change, received, how, rng(number), tmp_path, "run-1")
        expected, memory = compress(change, received, how, rng(number), memory)
        assert frame == expected
        kept = feedback.load(memory_path(tmp_path, "run-1"), SPEC)
        assert kept is not None
        for one, other in ((kept.left, memory.left), (kept.frozen, memory.frozen)):
            assert wire.encode(one) == wire.encode(other)


def test_sending_writes_nothing_by_itself(tmp_path: Path) -> None:
    feedback.send(delta(1), adapter(2), uplink("int8"), rng(), tmp_path, "run-1")

    assert list(tmp_path.iterdir()) == []


def test_every_run_has_a_memory_of_its_own_inside_the_folder(tmp_path: Path) -> None:
    for run in ("run-1", "run-2", "../../../etc/passwd", "/", "a\0b", "x" * 5000):
        send(delta(1), adapter(2), uplink("top-k"), rng(), tmp_path / "site", run)

    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    assert len(list((tmp_path / "site" / "feedback").iterdir())) == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "length", "half"])
def test_a_damaged_memory_is_refused_and_stays_as_it_is(tmp_path: Path, damage: str) -> None:
    send(delta(1), adapter(2), uplink("top-k"), rng(), tmp_path, "run-1")
    path = memory_path(tmp_path, "run-1")
    data = path.read_bytes()
    first = 8 + int.from_bytes(data[:8], "little")  # where the first of two frames ends
    damaged = {
        "cut": data[:-9],
        "flipped": data[:400] + bytes([data[400] ^ 1]) + data[401:],
        "empty": b"",
        "length": b"\xff" * 8 + data[8:],
        "half": data[:first],
    }[damage]
    path.write_bytes(damaged)

    with pytest.raises(ModelError, match=r"feedback/[0-9a-f]{32}\.memory in the site's fold") as no:
        send(delta(1), adapter(2), uplink("top-k"), rng(), tmp_path, "run-1")
    assert str(tmp_path) not in str(no.value)  # it is sent on, and where files lie is the site's
    assert "remove it to go on without what earlier rounds left out" in str(no.value)
    assert path.read_bytes() == damaged


def test_a_memory_of_another_adapter_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "feedback" / "x.memory", msgspec.structs.replace(SPEC, base="c" * 64)
    feedback.save(path, empty(SPEC))

    with pytest.raises(ModelError, match="adapter is for base model bbbbbbbbbbbb…, expected ccccc"):
        feedback.load(path, other)


def test_a_memory_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    memory_path(tmp_path, "run-1").mkdir(parents=True)

    with pytest.raises(ModelError, match="Is a directory"):
        send(delta(1), adapter(2), uplink("top-k"), rng(), tmp_path, "run-1")


def test_a_delta_that_cannot_be_sent_leaves_the_memory_as_it_was(tmp_path: Path) -> None:
    send(delta(1), adapter(2), uplink("fp16"), rng(), tmp_path, "run-1")
    before = memory_path(tmp_path, "run-1").read_bytes()
    large = delta(1).times(1e5)

    with pytest.raises(ConfigError, match='"fp16" holds values up to 65504'):
        send(large, adapter(2), uplink("fp16"), rng(), tmp_path, "run-1")
    assert memory_path(tmp_path, "run-1").read_bytes() == before


def test_an_adapter_of_another_spec_is_refused() -> None:
    other = msgspec.structs.replace(SPEC, alpha=1.0)
    received = Adapter(other, adapter(1).arrays)

    with pytest.raises(IncompatibleAdapter, match=r"adapter has alpha 1\.0, expected 6\.0"):
        compress(delta(1), received, uplink("int8"), rng(), empty(SPEC))
