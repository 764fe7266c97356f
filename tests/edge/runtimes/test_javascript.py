"""The same bundle in onnxruntime-node and in a browser: same ids, logits, gradients, losses."""

from __future__ import annotations

import importlib.util
import json
import queue
import shutil
import subprocess
import threading
from http import HTTPStatus
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from anabranch.edge.runtime.bundle import open_bundle
from anabranch.edge.runtime.engine import Batch
from anabranch.edge.runtime.joint import open_engine
from anabranch.edge.runtime.optimizer import fresh, update
from anabranch.edge.runtime.predict import Predictor
from anabranch.protocols.tables import Training
from tests.edge.runtimes.conftest import BROWSER, LABELS, Signed

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
RATE = 2e-3
STEPS = 4
HARD = [
    "Ménière's disease; ﬁ Å",
    "東京 は 2020年, 한국어",
    "x" * 150 + " [SEP] $9.99 don't",
    "e\u0301 🙂",
]


def run_node(packages: Path, bundle: Signed, jobs: list[dict[str, Any]]) -> Any:
    command = ["node", str(HERE / "run.mjs"), str(packages), str(bundle.folder), bundle.key]
    done = subprocess.run(
        command, input=json.dumps(jobs), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def close(got: Any, expected: Any, tolerance: float) -> None:
    """Compare by norm: AdamW makes steps of full size of gradients that are almost zero."""
    got, expected = np.asarray(got, float).ravel(), np.asarray(expected, float).ravel()
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


def joined(tensors: Any, names: Any) -> np.ndarray:
    return np.concatenate([np.ravel(tensors[name]) for name in names])


def test_a_graph_that_ends_within_a_number_is_refused() -> None:
    module = (BROWSER / "anabranch.mjs").as_uri()
    code = (
        f"const {{withoutDefaults}} = await import('{module}');"
        "withoutDefaults(Uint8Array.from([0x3a, 0x80]), new Set(['x']));"
    )
    command = ["node", "--input-type=module", "-e", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "the graph is cut off" in done.stderr


def test_node_computes_what_python_computes(
    node_packages: Path, minilm_bundle: Signed, sentences: tuple[list[str], np.ndarray]
) -> None:
    texts, labels = sentences[0][:6], sentences[1][:6]
    jobs = [
        {"graph": "infer.int8", "texts": texts, "labels": labels.tolist()},
        {"graph": "infer.fp32", "texts": HARD, "labels": [0] * len(HARD)},
        {
            "graph": "train_step.fp32",
            "texts": texts,
            "labels": labels.tolist(),
            "learning_rate": RATE,
            "steps": STEPS,
        },
    ]
    bundle = open_bundle(minilm_bundle.folder, trusted=[bytes.fromhex(minilm_bundle.key)])
    assert bundle.tokenizer is not None

    answer = run_node(node_packages, minilm_bundle, jobs)

    for job, ids in zip(jobs, answer["ids"], strict=True):
        assert ids == [bundle.tokenizer.encode(text) for text in job["texts"]]
    int8, fp32, trained = answer["results"]
    close(int8["logits"], Predictor.open(bundle, precision="int8").logits(texts), 1e-2)
    close(fp32["logits"], Predictor.open(bundle, precision="fp32").logits(HARD), 1e-4)
    losses, gradients, adapter = python_steps(bundle, texts, labels)
    close(trained["losses"], losses, 1e-4)
    assert losses[-1] < losses[0]
    close(joined(trained["gradients"], gradients), joined(gradients, gradients), 1e-4)
    close(joined(trained["adapter"], adapter), joined(adapter, adapter), 1e-4)


def python_steps(bundle: Any, texts: list[str], labels: np.ndarray) -> tuple[Any, Any, Any]:
    engine = open_engine(bundle)
    ids, mask = bundle.tokenizer.batch([bundle.tokenizer.encode(text) for text in texts])
    weights = np.full(len(texts), 1 / len(texts), np.float32)
    batch = Batch({"input_ids": ids, "attention_mask": mask}, labels.astype(np.int64), weights)
    training = Training(learning_rate=RATE, weight_decay=0.0)
    params = engine.params()
    state, losses, first = fresh(training, params, params), [], None
    for step in range(STEPS):
        found = engine.grads(batch)
        first = first or found.arrays
        losses.append(found.loss)
        params, state = update(training, params, found.arrays, state, step=step, rate=1.0)
        engine.set_params(params)
    return losses, first, params


def test_node_refuses_a_bundle_of_another_signer(
    node_packages: Path, minilm_bundle: Signed
) -> None:
    stranger = Signed(minilm_bundle.folder, "00" * 32)

    with pytest.raises(AssertionError, match="is signed by"):
        run_node(node_packages, stranger, [])


def serve_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve", BROWSER / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_browser_personalises_a_model(
    node_packages: Path,
    minilm_bundle: Signed,
    sentences: tuple[list[str], np.ndarray],
    tmp_path: Path,
) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed: the browser cannot be tested here")
    key, records = tmp_path / "key.pub", tmp_path / "records.tsv"
    key.write_text(minilm_bundle.key)
    rows = [f"{LABELS[y]}\t{text}" for text, y in zip(*sentences, strict=True)][:24]
    records.write_text("\n".join(rows))
    results: queue.Queue[Any] = queue.Queue()
    server = reporting(serve_module(), results)(
        minilm_bundle.folder, key, records, packages=node_packages
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/?report=/result"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    browser = subprocess.Popen(
        [chromium, *flags, f"--user-data-dir={tmp_path / 'profile'}", url],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        result = results.get(timeout=240)
    finally:
        browser.kill()
        browser.wait()
        server.shutdown()
        server.server_close()

    assert "error" not in result, result
    losses = result["losses"]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert result["after"] > result["before"]


def reporting(module: ModuleType, results: queue.Queue[Any]) -> Any:
    """Return the example's `server`, whose pages may also POST their result to the test."""

    class Pages(module.Pages):  # type: ignore[name-defined,misc]
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            results.put(json.loads(body))
            self.send_response(HTTPStatus.NO_CONTENT)
            self.end_headers()

    module.Pages = Pages  # type: ignore[attr-defined]
    return module.server
