"""What make_bundle refuses, with nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from anabranch.client.tuning.lora import read_adapter
from anabranch.edge.export import bundle as exporting
from anabranch.edge.export.bundle import Request
from anabranch.edge.export.joint import step_graph
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import (
    ConfigError,
    DeviceError,
    IncompatibleAdapter,
    ReleaseError,
)
from tests.edge.made import small

Make = Callable[..., Any]


@pytest.fixture
def refused(make_classifier: Make, make_config: Make, tmp_path: Path) -> Make:
    """Return a function that makes a bundle that is refused, and sees that nothing is left."""

    def check(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            small(make_classifier, make_config, tmp_path / "bundle", **changes)
        assert list(tmp_path.iterdir()) == []

    return check


def test_an_existing_folder_is_refused_and_stays_as_it_is(
    make_classifier: Make, make_config: Make, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(ReleaseError, match="there exists already: move it away"):
        small(make_classifier, make_config, tmp_path / "there")
    assert [p.name for p in tmp_path.rglob("*")] == ["there", "file"]


@pytest.mark.parametrize(("inputs", "labels"), [(0, 0), (3, 2), (0, 3)])
def test_records_are_needed(refused: Make, inputs: int, labels: int) -> None:
    refused(
        ReleaseError,
        f"held-out records: got {inputs} inputs and {labels} labels",
        inputs=np.zeros((inputs, 5), np.float32),
        labels=np.zeros(labels, np.int64),
    )


def test_a_request_without_fp32_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp32 is the measure of the others"):
        Request(name="tiny", version=1, precisions=("int8",))


@pytest.mark.parametrize("what", ["base", "shape"])
def test_an_adapter_of_another_base_is_refused(
    refused: Make, make_classifier: Make, what: str
) -> None:
    adapter = read_adapter(make_classifier("logistic"))
    if what == "base":
        adapter = Adapter(msgspec.structs.replace(adapter.spec, base="0" * 64), adapter.arrays)
    else:
        adapter = read_adapter(make_classifier("tabular"))
    refused(IncompatibleAdapter, "base|tensor|target|rank", adapter=adapter)


def test_the_requests_tolerance_is_what_is_allowed(refused: Make) -> None:
    what = Request(
        name="tiny", version=1, precisions=("fp32", "int4"), artifacts=False,
        tolerance={"int4": -0.5},
    )  # fmt: skip
    refused(ReleaseError, r"int4 loses 0\.0000 .*, -0\.5 is allowed", request=what)


def test_no_bundle_is_made_of_an_export_that_is_not_as_accurate_as_torch(
    refused: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "torch_accuracy", lambda *_: 0.9)
    refused(ReleaseError, r"accuracy 1\.0000 on 40 held-out records, torch 0\.9000")


def test_a_graph_that_is_not_torchs_is_refused(
    refused: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(classifier: Any, *, clipped: bool) -> onnx.ModelProto:
        model = step_graph(classifier, clipped=clipped)
        next(node for node in model.graph.node if node.op_type == "Mul").op_type = "Add"
        return model

    monkeypatch.setattr(exporting, "step_graph", wrong)
    refused(ReleaseError, "the training step in onnxruntime .* and torch differ by")


def test_a_limit_without_room_for_a_record_is_refused(refused: Make) -> None:
    what = Request(
        name="tiny", version=1, precisions=("fp32",), artifacts=False, memory_bytes=1 << 20
    )
    refused(DeviceError, r"one record of \d+ tokens needs .* the limit is 1 MB", request=what)


def test_a_name_that_no_device_would_take_is_refused(refused: Make) -> None:
    what = Request(name="../up", version=1, precisions=("fp32",), artifacts=False)
    refused(ConfigError, r"name '\.\./up': expected 1 to 64 of a-z", request=what)
