"""onnxruntime's own adapter files: written and used where onnxruntime has the format."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from anabranch.client.tuning.classifier import Classifier
from anabranch.edge.runtime.onnx_adapter import read_onnx_adapter, supported, write_onnx_adapter
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DeviceError
from tests.edge.bundles import TRUSTED, write_bundle

# A device's environment: stock onnxruntime, no torch. `make test` makes it.
DEVICE = Path(
    os.environ.get(
        "ANABRANCH_EDGE_PYTHON", Path(__file__).parents[3] / ".venv-edge" / "bin" / "python"
    )
)
ON_DEVICE = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime
from anabranch.edge.runtime.bundle import open_bundle
from anabranch.edge.runtime.onnx_adapter import read_onnx_adapter, supported, write_onnx_adapter
from anabranch.edge.runtime.personalised import export_model
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import BundleError

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
bundle = open_bundle(folder, trusted=[bytes.fromhex(sys.argv[3])])
mine = Adapter(bundle.adapter.spec, {n: a + 1 for n, a in bundle.adapter.arrays.items()})
assert supported()
write_onnx_adapter(out / "mine.onnx_adapter", mine)
assert [p.name for p in out.iterdir()] == ["mine.onnx_adapter"]
back = read_onnx_adapter(out / "mine.onnx_adapter", mine.spec)
assert all(np.array_equal(back.arrays[n], a) for n, a in mine.arrays.items())

session = onnxruntime.InferenceSession(str(bundle.graph_path("infer", "int8")))
rows = {"features": np.ones((2, 5), np.float32)}
adapter = onnxruntime.LoraAdapter()
adapter.Load(str(out / "mine.onnx_adapter"))
options = onnxruntime.RunOptions()
options.add_active_adapter(adapter)
by_file = session.run(["logits"], rows, options)[0]
by_feed = session.run(["logits"], rows | dict(mine.arrays))[0]
assert np.array_equal(by_file, by_feed)
assert not np.array_equal(by_feed, session.run(["logits"], rows)[0])

for precision in ("fp32", "int8"):
    export_model(bundle, mine, out / f"{precision}.onnx", precision)

for data in (b"", b"no adapter", (out / "mine.onnx_adapter").read_bytes()[:200]):
    (out / "bad").write_bytes(data)
    try:
        read_onnx_adapter(out / "bad", mine.spec)
    except BundleError:
        continue
    raise SystemExit(f"accepted {data[:20]}")
assert not {"torch", "onnx", "transformers"} & set(sys.modules)
"""


@pytest.mark.skipif(supported(), reason="this onnxruntime has the format")
def test_an_older_onnxruntime_says_so(
    tmp_path: Path, make_classifier: Callable[..., Classifier]
) -> None:
    from anabranch.client.tuning.lora import read_adapter

    adapter: Adapter = read_adapter(make_classifier("logistic"))
    with pytest.raises(DeviceError, match=r"has no \.onnx_adapter format: it needs 1\.20"):
        write_onnx_adapter(tmp_path / "a.onnx_adapter", adapter)
    with pytest.raises(DeviceError, match=r"use adapter\.bin"):
        read_onnx_adapter(tmp_path / "a.onnx_adapter", adapter.spec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    not DEVICE.exists(), reason="no device's environment; see ANABRANCH_EDGE_PYTHON"
)
def test_on_a_device_an_adapter_file_is_the_same_as_feeding_it(
    tmp_path: Path,
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
) -> None:
    folder, out = tmp_path / "bundle", tmp_path / "out"
    write_bundle(folder, make_classifier("tabular"), make_config("tabular"), with_artifacts=False)
    out.mkdir()
    command = [str(DEVICE), "-c", ON_DEVICE, str(folder), str(out), TRUSTED[0].hex()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
