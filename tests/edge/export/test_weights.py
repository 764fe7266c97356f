from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anabranch.edge.export.joint_graph import content_name as name_in_steps
from anabranch.edge.export.weights import content_name, externalize, packed_tensor, tensor
from anabranch.edge.runtime.classify import load_session
from anabranch.protocols.errors import BundleError

Floats = NDArray[np.float32]
RNG = np.random.default_rng(0)
SHARED = RNG.normal(size=(64, 48)).astype(np.float32)
OWN = RNG.normal(size=(48, 40)).astype(np.float32)
BIAS = RNG.normal(size=(40,)).astype(np.float32)
A = RNG.normal(size=(40, 32)).astype(np.float32)  # 5 KB: an adapter's default


def model(*constants: TensorProto, adapter: Floats = A) -> onnx.ModelProto:
    """x · W1 · W2 … + b … · adapter, the adapter being an overridable default."""
    nodes, value = [], "x"
    for i, constant in enumerate(constants):
        op = "MatMul" if len(constant.dims) == 2 else "Add"
        nodes.append(helper.make_node(op, [value, constant.name], [f"y{i}"]))
        value = f"y{i}"
    nodes.append(helper.make_node("MatMul", [value, "adapter"], ["logits"]))
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", floats, ["batch", 64]),
            helper.make_tensor_value_info("adapter", floats, adapter.shape),
        ],
        [helper.make_tensor_value_info("logits", floats, ["batch", 32])],
        [*constants, numpy_helper.from_array(adapter, "adapter")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def pair() -> dict[str, onnx.ModelProto]:
    return {
        "train_step.fp32": model(tensor(SHARED), tensor(OWN), tensor(BIAS)),
        "infer.fp32": model(tensor(SHARED), tensor(OWN * 2)),
    }


def spans(path: Path) -> dict[str, tuple[int, int]]:
    loaded = onnx.load(path, load_external_data=False)
    found = {}
    for constant in loaded.graph.initializer:
        if constant.data_location == TensorProto.EXTERNAL:
            entry = {e.key: e.value for e in constant.external_data}
            assert entry.keys() == {"location", "offset", "length"}
            assert entry["location"] == "base.bin"
            found[constant.name] = int(entry["offset"]), int(entry["length"])
    return found


def test_graphs_run_from_their_folder_as_they_ran_inline(tmp_path: Path) -> None:
    import onnxruntime

    x = RNG.normal(size=(3, 64)).astype(np.float32)
    assert externalize(pair(), "base.bin", tmp_path) == dict.fromkeys(pair(), ("base.bin",))
    for name, inline in pair().items():
        expected = load_session(inline.SerializeToString(), threads=1).run(None, {"x": x})
        session = onnxruntime.InferenceSession(
            tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"]
        )
        assert np.array_equal(session.run(None, {"x": x})[0], expected[0])
        whole = onnx.load(tmp_path / f"{name}.onnx")
        for got, constant in zip(whole.graph.initializer, inline.graph.initializer, strict=True):
            assert np.array_equal(numpy_helper.to_array(got), numpy_helper.to_array(constant))


def test_equal_bytes_are_stored_once_and_start_at_a_page(tmp_path: Path) -> None:
    externalize(pair(), "base.bin", tmp_path)
    step, infer = spans(tmp_path / "train_step.fp32.onnx"), spans(tmp_path / "infer.fp32.onnx")
    shared = tensor(SHARED).name
    assert step[shared] == infer[shared]
    together = set(step.values()) | set(infer.values())
    assert len(together) == 3  # of the four matrices; the bias is small
    assert all(offset % 4096 == 0 for offset, _ in together)
    stored = (tmp_path / "base.bin").read_bytes()
    assert len(stored) < sum(length for _, length in together) + 3 * 4096
    offset, length = step[shared]
    assert stored[offset : offset + length] == SHARED.tobytes()


def test_smaller_tensors_lie_together_behind_the_pages(tmp_path: Path) -> None:
    biases = [RNG.normal(size=n).astype(np.float32) for n in (40, 40, 40)]
    one = model(tensor(biases[0][:1]), tensor(SHARED), tensor(OWN), *map(tensor, biases))
    externalize({"one": one}, "base.bin", tmp_path, threshold=100)
    where = spans(tmp_path / "one.onnx")
    small = sorted(offset for offset, length in where.values() if length < 4096)
    assert len(small) == 3
    assert all(offset % 64 == 0 for offset in small)
    assert small[0] > max(offset for offset, length in where.values() if length >= 4096)
    assert small[-1] - small[0] < 4096


def test_what_two_graphs_read_as_other_types_is_stored_once(tmp_path: Path) -> None:
    codes = RNG.integers(0, 256, (64, 32)).astype(np.uint8)
    models = {
        "step": model(tensor(SHARED), tensor(OWN)),
        "infer": model(tensor(SHARED), tensor(OWN)),
    }
    models["step"].graph.initializer.append(packed_tensor(codes, (64, 64)))
    models["infer"].graph.initializer.append(tensor(codes.reshape(64, 2, 16)))
    externalize(models, "base.bin", tmp_path)
    assert set(spans(tmp_path / "step.onnx").values()) == set(
        spans(tmp_path / "infer.onnx").values()
    )


def test_the_adapters_defaults_and_small_constants_stay_in_the_graph(tmp_path: Path) -> None:
    externalize(pair(), "base.bin", tmp_path)
    for name in pair():
        kept = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False)
        inline = {t.name for t in kept.graph.initializer if t.HasField("raw_data")}
        assert "adapter" in inline
        assert not inline & {tensor(SHARED).name, tensor(OWN).name}
    assert tensor(BIAS).name not in spans(tmp_path / "train_step.fp32.onnx")


def test_the_same_graphs_give_the_same_files_in_any_order(tmp_path: Path) -> None:
    externalize(pair(), "base.bin", tmp_path / "one")
    externalize(dict(reversed(pair().items())), "base.bin", tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["base.bin", "infer.fp32.onnx", "train_step.fp32.onnx"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_models_are_left_as_they_were(tmp_path: Path) -> None:
    models = pair()
    before = {name: m.SerializeToString(deterministic=True) for name, m in models.items()}
    externalize(models, "base.bin", tmp_path)
    assert {n: m.SerializeToString(deterministic=True) for n, m in models.items()} == before


def test_older_files_are_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "base.bin").write_bytes(b"old" * 99999)
    externalize(pair(), "base.bin", tmp_path)
    externalize(pair(), "base.bin", tmp_path / "fresh")
    assert (tmp_path / "base.bin").read_bytes() == (tmp_path / "fresh/base.bin").read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_without_large_constants_there_is_no_data_file(tmp_path: Path) -> None:
    small = model(tensor(RNG.normal(size=(4,)).astype(np.float32)))
    assert externalize({"one": small}, "base.bin", tmp_path) == {"one": ()}
    assert [path.name for path in tmp_path.iterdir()] == ["one.onnx"]


def test_numbers_outside_raw_data_are_shared_too(tmp_path: Path) -> None:
    constant = helper.make_tensor("w", TensorProto.FLOAT, SHARED.shape, SHARED.ravel().tolist())
    assert not constant.HasField("raw_data")
    externalize({"a": model(constant), "b": model(tensor(SHARED))}, "base.bin", tmp_path)
    assert spans(tmp_path / "a.onnx")["w"] == spans(tmp_path / "b.onnx")[tensor(SHARED).name]


def test_weights_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    externalize(pair(), "base.bin", tmp_path)
    moved = onnx.load(tmp_path / "infer.fp32.onnx", load_external_data=False)
    with pytest.raises(BundleError, match=r"infer: the bytes of w_.* lie in another file"):
        externalize({"infer": moved}, "other.bin", tmp_path)
    assert not (tmp_path / "other.bin").exists()


@pytest.mark.parametrize("name", ["../base.bin", "", "a/b.bin", "/tmp/base.bin"])
def test_the_data_file_lies_beside_its_graphs(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected the name of a file"):
        externalize(pair(), name, tmp_path)


def test_constants_are_named_as_in_the_steps_they_come_from() -> None:
    assert tensor(SHARED).name == name_in_steps(SHARED)
    assert tensor(SHARED).name != tensor(SHARED.T.copy()).name != tensor(SHARED[:1]).name
    assert content_name("uint4", (2, 2), b"ab") != content_name("uint8", (2, 2), b"ab")
