import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional

from anabranch.edge.runtime import joint, memory
from anabranch.edge.runtime.bundle_manifest import Limits, Memory
from anabranch.edge.runtime.engine import Batch, Gradients
from anabranch.edge.runtime.joint import JointEngine, open_engine
from anabranch.edge.runtime.memory import cut, micro_batches, narrowed
from anabranch.protocols.errors import BundleError, DeviceError, IncompatibleAdapter

Make = Callable[..., Any]
A, B = "hidden.0.lora_A.weight", "hidden.0.lora_B.weight"


def engine_of(bundle: Any, **options: Any) -> JointEngine:
    engine = open_engine(bundle, **options)
    assert isinstance(engine, JointEngine)
    return engine


def forward(bundle: Any, base: dict[str, NDArray[Any]], feeds: Any, p: Any) -> torch.Tensor:
    """The tiny model in torch."""
    W, E = torch.from_numpy(base["W"]), torch.from_numpy(base["E"])
    if bundle.tokenizer is None:
        x = torch.from_numpy(feeds["features"])
    else:
        mask = torch.from_numpy(feeds["attention_mask"]).float()
        embedded = E[torch.from_numpy(feeds["input_ids"])] * mask[..., None]
        x = embedded.sum(1) / mask.sum(1, keepdim=True)
    h = torch.relu(x @ W.T + bundle.manifest.spec.scaling * (x @ p[A].T) @ p[B].T)
    logits: torch.Tensor = h @ p["head.weight"].T + p["head.bias"]
    return logits


def reference(
    bundle: Any, base: dict[str, NDArray[Any]], batch: Batch, norm: float | None = None
) -> Gradients:
    """Sums by torch, record by record."""
    arrays = {n: np.zeros(s, np.float32) for n, s in bundle.manifest.spec.tensors}
    loss, norms = 0.0, []
    for row in range(len(batch)):
        p = {n: torch.from_numpy(a.copy()) for n, a in bundle.adapter.arrays.items()}
        for tensor in p.values():
            tensor.requires_grad_(True)
        feeds = {n: a[row : row + 1] for n, a in batch.feeds.items()}
        label = torch.from_numpy(batch.labels[row : row + 1])
        one = functional.cross_entropy(forward(bundle, base, feeds, p), label)
        one.backward()
        grads = {n: t.grad.numpy() for n, t in p.items() if t.grad is not None}
        norms.append(np.sqrt(sum(float(np.sum(g**2)) for g in grads.values())))
        factor = batch.weights[row] * (1 if norm is None else min(1, norm / norms[-1]))
        loss += float(batch.weights[row]) * float(one.detach())
        for name, g in grads.items():
            arrays[name] += factor * g
    return Gradients(loss, arrays, None if norm is None else np.array(norms, np.float32))


def batch_of(bundle: Any, make_records: Make, n: int) -> Batch:
    records = make_records(bundle, n, seed=4)
    weights = np.random.default_rng(2).random(n).astype(np.float32)
    batch: Batch = records.batch(range(n), weights)
    return batch


# Laws of micro-batches

MEMORIES = st.builds(
    Memory,
    fixed=st.integers(0, 1000),
    per_record=st.integers(0, 50),
    per_token=st.integers(0, 9),
    per_pair=st.integers(0, 3),
)


@given(
    st.lists(st.integers(1, 20), max_size=40), MEMORIES, st.integers(1, 12), st.integers(0, 4000)
)
def test_micro_batches_cover_every_record_once_in_order_and_fit(
    lengths: list[int], model: Memory, most: int, room: int
) -> None:
    limits = Limits(memory_bytes=room, max_records=most, max_tokens=20)
    if any(model.needed(1, t) > room for t in lengths):
        with pytest.raises(DeviceError, match="one record of"):
            micro_batches(lengths, model, limits)
        return
    parts = micro_batches(lengths, model, limits)

    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(lengths)))
    for part in parts:
        count, longest = part.stop - part.start, max(lengths[part])
        assert 1 <= count <= most
        assert model.needed(count, longest) <= room


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), MEMORIES, st.integers(1, 12))
def test_micro_batches_are_as_long_as_memory_and_limits_allow(
    lengths: list[int], model: Memory, most: int
) -> None:
    room = 2 * max(model.needed(1, t) for t in lengths)
    limits = Limits(memory_bytes=room, max_records=most, max_tokens=20)
    for part in micro_batches(lengths, model, limits):
        if part.stop < len(lengths):
            longer = slice(part.start, part.stop + 1)
            count, longest = longer.stop - longer.start, max(lengths[longer])
            assert count > most or model.needed(count, longest) > room


def test_the_literal_micro_batches() -> None:
    model = Memory(fixed=100, per_record=10, per_token=1)
    limits = Limits(memory_bytes=160, max_records=8, max_tokens=9)
    parts = micro_batches([2, 2, 2, 2, 9, 9], model, limits)
    assert parts == [slice(0, 4), slice(4, 6)]  # 100 + 4 · 12, then 100 + 3 · 19 with the next
    assert micro_batches([], model, limits) == []


def test_a_narrower_limit_counts_and_a_wider_one_does_not() -> None:
    limits = Limits(memory_bytes=100, max_records=8, max_tokens=9)
    assert narrowed(limits, 50).memory_bytes == 50
    assert narrowed(limits, 200) == narrowed(limits, None) == limits


# The same as torch


@pytest.mark.parametrize("kind", ["text", "table"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("norm", [None, 0.4])
@pytest.mark.parametrize("n", [1, 3, 21])
def test_sums_are_those_of_torch(
    make_tiny: Make,
    make_records: Make,
    tiny_frozen: dict[str, NDArray[Any]],
    kind: str,
    precision: str,
    norm: float | None,
    n: int,
) -> None:
    bundle = make_tiny(kind)
    batch = batch_of(bundle, make_records, n)
    expected = reference(bundle, tiny_frozen, batch, norm)
    got = engine_of(bundle, precision=precision).grads(batch, clipping_norm=norm)

    assert got.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, array in expected.arrays.items():
        np.testing.assert_allclose(got.arrays[name], array, rtol=1e-4, atol=1e-6, err_msg=name)
    if norm is None:
        assert got.norms is None
    else:
        assert got.norms is not None
        assert expected.norms is not None
        np.testing.assert_allclose(got.norms, expected.norms, rtol=1e-5)


@pytest.mark.parametrize("norm", [None, 0.4])
def test_micro_batches_of_any_size_add_up_to_the_same(
    make_tiny: Make, make_records: Make, norm: float | None
) -> None:
    bundle = make_tiny("text")
    batch = batch_of(bundle, make_records, 20)
    whole = engine_of(bundle).grads(batch, clipping_norm=norm)
    for most in (1, 3, 20):
        limits = Limits(memory_bytes=10**9, max_records=most, max_tokens=16)
        engine = engine_of(make_tiny("text", limits=limits))
        assert len(engine.pieces(batch)) == -(-20 // most)
        got = engine.grads(batch, clipping_norm=norm)
        assert got.loss == pytest.approx(whole.loss, rel=1e-5)
        for name, array in whole.arrays.items():
            np.testing.assert_allclose(got.arrays[name], array, rtol=1e-4, atol=1e-6)


def test_rows_of_weight_zero_only_pad(make_tiny: Make, make_records: Make) -> None:
    bundle = make_tiny("table")
    records = make_records(bundle, 6)
    engine = engine_of(bundle)
    weights = np.array([1, 1, 1, 1, 0, 0], np.float32)
    padded = engine.grads(records.batch(range(6), weights))
    alone = engine.grads(records.batch(range(4), np.ones(4, np.float32)))
    for name, array in alone.arrays.items():
        np.testing.assert_allclose(padded.arrays[name], array, atol=1e-6)


@pytest.mark.parametrize("norm", [None, 1.0])
def test_a_batch_without_records_gives_zeros(
    make_tiny: Make, make_records: Make, norm: float | None
) -> None:
    bundle = make_tiny("text")
    empty = make_records(bundle, 4).batch([], np.zeros(0, np.float32))
    got = engine_of(bundle).grads(empty, clipping_norm=norm)
    assert got.loss == 0
    assert not any(array.any() for array in got.arrays.values())
    assert norm is None or (got.norms is not None and got.norms.shape == (0,))


@pytest.mark.parametrize("kind", ["text", "table"])
def test_logits_are_those_of_torch_with_or_without_an_infer_graph(
    make_tiny: Make, make_records: Make, tiny_frozen: dict[str, NDArray[Any]], kind: str
) -> None:
    bundle = make_tiny(kind)
    feeds = make_records(bundle, 20).feeds(range(20))
    p = {n: torch.from_numpy(a) for n, a in bundle.adapter.arrays.items()}
    expected = forward(bundle, tiny_frozen, feeds, p).numpy()
    graphs = {k: v for k, v in bundle.manifest.graphs.items() if not k.startswith("infer")}

    for one in (bundle, make_tiny(kind, graphs=graphs)):
        np.testing.assert_allclose(engine_of(one).predict(feeds), expected, rtol=1e-4, atol=1e-5)


# The adapter in it


def test_the_adapter_that_is_set_is_used_and_copied(make_tiny: Make, make_records: Make) -> None:
    bundle = make_tiny("table")
    engine = engine_of(bundle)
    feeds = make_records(bundle, 5).feeds(range(5))
    before = engine.predict(feeds)
    other = {name: array * 2 for name, array in engine.params().items()}
    engine.set_params(other)
    after = engine.predict(feeds)
    assert not np.allclose(before, after)

    other["head.bias"][:] = 100  # the caller's arrays are not the engine's
    engine.params()["head.bias"][:] = 100
    np.testing.assert_array_equal(engine.predict(feeds), after)
    engine.close()
    np.testing.assert_array_equal(engine.predict(feeds), after)


def test_an_adapter_of_other_names_shapes_or_nan_is_refused(make_tiny: Make) -> None:
    engine = engine_of(make_tiny("table"))
    good = engine.params()
    nan = {**good, "head.bias": np.full_like(good["head.bias"], np.nan)}
    renamed = {n + "x": a for n, a in good.items()}
    reshaped = {**good, "head.bias": np.zeros(9, np.float32)}
    for bad, message in ((nan, "NaN"), (renamed, "expected shape"), (reshaped, r"\(9,\)")):
        with pytest.raises(IncompatibleAdapter, match=message):
            engine.set_params(bad)
    for name, array in good.items():
        np.testing.assert_array_equal(engine.params()[name], array)


# Memory


def test_one_session_is_loaded_at_a_time(make_tiny: Make, make_records: Make) -> None:
    bundle = make_tiny("table")
    batch = batch_of(bundle, make_records, 2)
    engine = engine_of(bundle)
    seen = []
    for call in (
        lambda: engine.grads(batch),
        lambda: engine.grads(batch),
        lambda: engine.predict(batch.feeds),
        lambda: engine.grads(batch, clipping_norm=1.0),
    ):
        call()
        seen.append(engine._loaded)
    assert [one[0] for one in seen if one] == ["train_step", "train_step", "infer", "train_step_dp"]
    assert seen[0] is seen[1]
    engine.close()
    assert engine._loaded is None


@pytest.mark.parametrize(
    ("training", "prepacking"), [("fp32", False), ("int8", True), ("int4", True), (None, True)]
)
def test_settings_are_those_that_keep_weights_mapped(
    make_tiny: Make,
    monkeypatch: pytest.MonkeyPatch,
    training: Any,
    prepacking: bool,
) -> None:
    made = []
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: made.append(options)
    )
    bundle = make_tiny("table")
    joint.load(bundle.folder, bundle.manifest.graphs["infer.fp32"], threads=2, training=training)
    (options,) = made

    def entry(name: str) -> str | None:
        try:
            found: str = options.get_session_config_entry(name)
        except RuntimeError:
            return None
        return found

    assert options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern
    assert entry("session.disable_prepacking") == (None if prepacking else "1")
    folding = "ConstantFolding;CommonSubexpressionElimination"
    disabled = entry("optimization.disable_specified_optimizers")
    assert disabled == (None if prepacking else folding)
    assert entry("session.intra_op.allow_spinning") == "0"
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


# Refusals, before anything is allocated


@pytest.fixture
def no_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a session was made")

    monkeypatch.setattr(joint, "load", load)


@pytest.mark.usefixtures("no_sessions")
def test_a_record_that_does_not_fit_is_refused_before_anything_is_allocated(
    make_tiny: Make, make_records: Make
) -> None:
    bundle = make_tiny("text")
    batch = batch_of(bundle, make_records, 3)
    with pytest.raises(DeviceError, match=r"one record of 1 tokens needs 1 MB .* limit is 1 MB"):
        open_engine(bundle, memory_bytes=1 << 20)
    engine = engine_of(bundle, memory_bytes=(1 << 20) + 1101)
    for call in (
        lambda: engine.grads(batch),
        lambda: engine.grads(batch, clipping_norm=1.0),
        lambda: engine.predict(batch.feeds),
    ):
        with pytest.raises(DeviceError, match=r"one record of [3-9]|one record of 1\d"):
            call()


@pytest.mark.usefixtures("no_sessions")
def test_a_record_with_too_many_tokens_is_refused(make_tiny: Make, make_records: Make) -> None:
    limits = Limits(memory_bytes=10**9, max_records=8, max_tokens=3)
    bundle = make_tiny("text", limits=limits)
    with pytest.raises(DeviceError, match="tokens, this bundle allows 3"):
        engine_of(bundle).grads(batch_of(bundle, make_records, 8))


@pytest.mark.usefixtures("no_sessions")
def test_less_free_memory_than_needed_is_refused(
    make_tiny: Make, make_records: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_tiny("table")
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(DeviceError, match=r"1 MB of memory are needed, 0 MB are free"):
        engine_of(bundle).grads(batch_of(bundle, make_records, 2))


def test_free_memory_is_what_the_system_says_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.free_memory()
    assert free is not None
    assert free > 1 << 20
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert memory.free_memory() is None
    memory.require_free(1 << 60)  # nothing is known, nothing is checked


def test_a_bundle_without_the_graph_is_refused(make_tiny: Make) -> None:
    with pytest.raises(BundleError, match=r"no graph train_step.int4 \(it has infer.fp32, "):
        open_engine(make_tiny("table"), precision="int4")
    with pytest.raises(BundleError, match="ort-training trains over fp32 alone, got precision"):
        open_engine(make_tiny("table"), engine="ort-training", precision="int8")


def test_a_newer_onnxruntime_that_is_needed_is_named(make_tiny: Make, make_records: Make) -> None:
    bundle = make_tiny("table")
    graphs = {
        k: msgspec.structs.replace(g, onnxruntime="9.9") for k, g in bundle.manifest.graphs.items()
    }
    newer = make_tiny("table", graphs=graphs)
    with pytest.raises(DeviceError, match=r"needs onnxruntime 9.9 or newer, this is \d"):
        engine_of(newer).grads(batch_of(bundle, make_records, 2))


def test_a_graph_of_other_inputs_or_bytes_is_refused(
    make_tiny: Make, make_records: Make, tmp_path: Any
) -> None:
    bundle = make_tiny("table")
    batch = batch_of(bundle, make_records, 2)
    plain = bundle.manifest.graphs["train_step.fp32"]
    graphs = {**bundle.manifest.graphs, "train_step_dp.fp32": plain}
    with pytest.raises(BundleError, match="inputs clipping_norm are not as the format says"):
        engine_of(make_tiny("table", graphs=graphs)).grads(batch, clipping_norm=1.0)

    (tmp_path / plain.file).write_bytes(b"no graph")
    engine = JointEngine(tmp_path, bundle.manifest, bundle.adapter)
    with pytest.raises(BundleError, match="cannot load it"):
        engine.grads(batch)


def test_an_error_of_onnxruntime_shows_nothing_of_a_record(
    make_tiny: Make, make_records: Make
) -> None:
    bundle = make_tiny("text")
    batch = batch_of(bundle, make_records, 2)
    batch.feeds["input_ids"][:] = 7777
    with pytest.raises(DeviceError, match="onnxruntime stopped") as error:
        engine_of(bundle).grads(batch)
    assert "7777" not in "".join(traceback.format_exception(error.value))


def test_calls_that_no_caller_should_make_are_refused(make_tiny: Make, make_records: Make) -> None:
    bundle = make_tiny("table")
    batch = batch_of(bundle, make_records, 2)
    for norm in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="clipping norm above 0"):
            engine_of(bundle).grads(batch, clipping_norm=norm)
    with pytest.raises(ValueError, match="threads >= 1, got 0"):
        open_engine(bundle, threads=0)
    with pytest.raises(ValueError, match="expected the model's inputs features, got x"):
        next(cut(bundle.manifest, Memory(fixed=1), bundle.manifest.limits, {"x": np.zeros(1)}))


def test_training_and_inference_run_where_torch_and_onnx_cannot_be_imported() -> None:
    code = """
import sys
for name in ("torch", "onnx", "transformers", "flwr", "scipy"):
    sys.modules[name] = None
import anabranch.edge.runtime.joint, anabranch.edge.runtime.training
import anabranch.edge.runtime.personal, anabranch.edge.runtime.predict
import onnxruntime
loaded = {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
assert not loaded & {"torch", "onnx", "transformers", "flwr", "scipy"}, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)
