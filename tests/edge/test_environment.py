"""What a device installs is enough: every piece of the runtime, in a Python without torch.

ANABRANCH_EDGE_PYTHON names the device's interpreter (default: .venv-edge, which `make test` makes);
ANABRANCH_EDGE_PYTHON_312, if set, one of Python 3.12 or later. The same work is done by the Python
of these tests, whose onnxruntime is the older training build: both must give the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.edge import install
from tests.edge.made import TRUSTED, Made

ROOT = Path(__file__).parents[2]
DEFAULT = ROOT / ".venv-edge" / "bin" / "python"
NEWER = "ANABRANCH_EDGE_PYTHON_312"
ABSENT = ("torch", "onnx", "transformers", "flwr", "scipy", "opacus", "peft", "ray")
PRECISIONS = ("fp32", "int8", "int4")
TOLERANCE = 1e-4  # relative, in the L2 sense: two builds of onnxruntime add in another order

IMPORTS = """
import importlib, importlib.util, json, pkgutil, sys
import anabranch.edge.runtime as runtime
found = [name for name in json.loads(sys.argv[1]) if importlib.util.find_spec(name)]
names = [one.name for one in pkgutil.iter_modules(runtime.__path__)]
for name in names:
    importlib.import_module(f"anabranch.edge.runtime.{name}")
import onnxruntime
print(json.dumps({
    "found": found,
    "modules": names,
    "python": sys.version_info[:2],
    "onnxruntime": onnxruntime.__version__,
}))
"""

WORK = """
import json, sys
from dataclasses import asdict
from pathlib import Path
if sys.argv[6] == "hide":
    for name in json.loads(sys.argv[5]):
        sys.modules[name] = None
import numpy as np, onnxruntime
from anabranch.edge.runtime.bundle import open_bundle
from anabranch.edge.runtime.data import read_records
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.joint import open_engine
from anabranch.edge.runtime.personal import in_use, personalise
from anabranch.edge.runtime.personalised import export_model
from anabranch.edge.runtime.predict import Predictor, evaluate
from anabranch.edge.runtime.training import train
from anabranch.protocols.adapter import Adapter

folder, key, data, out = sys.argv[1:5]
home, out = Home(Path(out) / "home"), Path(out)
bundle = open_bundle(Path(folder), trusted=[bytes.fromhex(key)], versions=home.versions)
records = read_records(Path(data), bundle.manifest, bundle.tokenizer)
texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
rng = np.random.default_rng(5)
tensors = bundle.manifest.spec.tensors
other = Adapter(
    bundle.manifest.spec, {n: rng.normal(size=s, scale=0.2).astype(np.float32) for n, s in tensors}
)
arrays, said = {}, {}
for precision in ("fp32", "int8", "int4"):
    engine = open_engine(bundle, precision=precision)
    trained = train(engine, records, bundle.manifest.training, steps=8, seed=3)
    arrays[f"{precision}/losses"] = trained.losses
    arrays |= {f"{precision}/adapter/{n}": a for n, a in trained.adapter.arrays.items()}
    arrays |= {f"{precision}/before/{n}": a for n, a in trained.before.arrays.items()}
    clipped = engine.grads(
        records.batch(range(6), np.ones(6, np.float32)), clipping_norm=0.5
    )
    arrays[f"{precision}/norms"] = clipped.norms
    arrays |= {f"{precision}/clipped/{n}": a for n, a in clipped.arrays.items()}
    predictor = Predictor.open(bundle, precision=precision)
    arrays[f"{precision}/logits"] = predictor.logits(texts)
    predictor.use(other)
    arrays[f"{precision}/other"] = predictor.logits(texts)
    model = export_model(bundle, other, out / f"{precision}.onnx", precision)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feeds = records.feeds(range(len(records)))
    arrays[f"{precision}/exported"] = session.run(["logits"], feeds)[0]
    arrays[f"{precision}/fed"] = predictor.run(feeds)
done = personalise(bundle, records, home, steps=12, seed=3)
said["personal"] = {"kept": done.kept, "before": asdict(done.before), "after": asdict(done.after)}
own = in_use(home, bundle)
arrays |= {f"personal/{n}": a for n, a in (own or bundle.adapter).arrays.items()}
np.savez(out / "arrays.npz", **arrays)
print(json.dumps(said))
"""


def pythons() -> list[Any]:
    """The device's Python; a newer one where the environment names it."""
    found = [pytest.param(os.environ.get("ANABRANCH_EDGE_PYTHON") or str(DEFAULT), id="device")]
    if os.environ.get(NEWER):
        found.append(pytest.param(os.environ[NEWER], id="newer"))
    return found


@pytest.fixture(scope="module", params=pythons())
def python(request: pytest.FixtureRequest) -> Path:
    """Return the interpreter of a device; a missing one is a failure, never a skip."""
    path = Path(request.param)
    if not path.exists():
        pytest.fail(
            f"{path}: no Python of a device: `make .venv-edge/installed` makes one, or name one "
            "by ANABRANCH_EDGE_PYTHON"
        )
    return path


def call(python: Path, script: str, *arguments: str | Path, folder: Path) -> Any:
    """Run a script away from the sources, as on a device; return the JSON that it prints."""
    done = subprocess.run(
        [str(python), "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_device_has_what_it_needs_and_nothing_of_a_site(python: Path, tmp_path: Path) -> None:
    said = call(python, IMPORTS, json.dumps(ABSENT), folder=tmp_path)
    assert said["found"] == []
    expected = {p.stem for p in (ROOT / "edge" / "runtime").glob("*.py")} - {"__init__"}
    assert set(said["modules"]) == expected
    if python == Path(os.environ.get(NEWER, "")):
        assert tuple(said["python"]) >= (3, 12)


# -- the same work ------------------------------------------------------------------------------


def work(python: Path, made: Made, folder: Path, *, hide: bool) -> tuple[dict[str, Any], Any]:
    """Return the arrays and what was said; torch and its like are hidden where they are there."""
    labels = made.config.task.labels
    rows = [{"text": t, "y": labels[y]} for t, y in zip(made.inputs, made.labels, strict=True)]
    data = folder / "records.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = call(
        python, WORK, made.folder, TRUSTED[0].hex(), data, folder, json.dumps(ABSENT),
        "hide" if hide else "", folder=folder,
    )  # fmt: skip
    with np.load(folder / "arrays.npz") as file:
        return dict(file), said


@pytest.fixture(scope="module")
def here(made: Callable[[str], Made], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("here")
    return folder, *work(Path(sys.executable), made("text"), folder, hide=True)


@pytest.fixture(scope="module")
def there(
    python: Path, made: Callable[[str], Made], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    folder = tmp_path_factory.mktemp("there")
    return folder, *work(python, made("text"), folder, hide=False)


def vector(arrays: dict[str, NDArray[Any]], prefix: str) -> NDArray[np.float64]:
    chosen = [arrays[name].ravel() for name in sorted(arrays) if name.startswith(prefix)]
    return np.concatenate(chosen).astype(np.float64)


def apart(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_gives_the_same_adapter(here: Any, there: Any, precision: str) -> None:
    (_, ours, _), (_, theirs, _) = here, there
    ends = [vector(arrays, f"{precision}/adapter/") for arrays in (ours, theirs)]
    start = vector(ours, f"{precision}/before/")
    assert apart(ends[0], start) > 0.01  # it did learn
    assert len(theirs[f"{precision}/losses"]) == 8
    assert apart(ends[1], ends[0]) < TOLERANCE
    assert apart(ends[1] - start, ends[0] - start) < TOLERANCE  # the delta, which is what is sent
    assert apart(theirs[f"{precision}/losses"], ours[f"{precision}/losses"]) < TOLERANCE


@pytest.mark.parametrize("precision", PRECISIONS)
def test_clipped_sums_are_the_same(here: Any, there: Any, precision: str) -> None:
    (_, ours, _), (_, theirs, _) = here, there
    for prefix in (f"{precision}/norms", f"{precision}/clipped/"):
        assert apart(vector(theirs, prefix), vector(ours, prefix)) < TOLERANCE


@pytest.mark.parametrize("what", ["logits", "other", "exported"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_inference_gives_the_same_logits(here: Any, there: Any, precision: str, what: str) -> None:
    (_, ours, _), (_, theirs, _) = here, there
    name = f"{precision}/{what}"
    assert apart(theirs[name], ours[name]) < TOLERANCE
    assert apart(theirs[f"{precision}/other"], theirs[f"{precision}/logits"]) > 0.1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_exported_model_is_the_same_file_and_computes_what_the_bundle_does(
    here: Any, there: Any, precision: str
) -> None:
    digests = {
        hashlib.sha256((folder / f"{precision}.onnx").read_bytes()).hexdigest()
        for folder, _, _ in (here, there)
    }
    assert len(digests) == 1
    _, theirs, _ = there
    assert apart(theirs[f"{precision}/exported"], theirs[f"{precision}/fed"]) < TOLERANCE


def test_personalising_decides_the_same_and_keeps_the_same_adapter(here: Any, there: Any) -> None:
    (_, ours, said), (_, theirs, heard) = here, there
    assert heard["personal"]["kept"] == said["personal"]["kept"]
    for when in ("before", "after"):
        one, other = heard["personal"][when], said["personal"][when]
        assert (one["records"], one["accuracy"]) == (other["records"], other["accuracy"])
        assert one["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)
    assert apart(vector(theirs, "personal/"), vector(ours, "personal/")) < TOLERANCE


def newer_python() -> Path | None:
    """Return an installed CPython 3.12 or later, or None."""
    places = [Path(p) for p in (shutil.which(f"python3.{minor}") or "" for minor in range(12, 15))]
    places += sorted(Path.home().glob(".pyenv/versions/3.1[2-9]*/bin/python"))
    for place in places:
        if place.is_file():
            code = "import sys; print(sys.version_info >= (3, 12))"
            done = subprocess.run([place, "-c", code], capture_output=True, text=True, check=False)
            if done.stdout.strip() == "True":
                return place
    return None


@pytest.mark.slow
def test_a_fresh_environment_of_a_newer_python_trains_and_infers(
    tmp_path: Path, made: Callable[[str], Made]
) -> None:
    """Installed as a user would, not as a link; this Python's version where no newer one is."""
    python = newer_python() or Path(sys.executable)
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    fresh = tmp_path / "venv" / "bin" / "python"
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip: list[str | Path] = [
        fresh,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", f"{source}[edge]"], check=True)

    said = call(fresh, IMPORTS, json.dumps(ABSENT), folder=tmp_path)
    arrays, _ = work(fresh, made("text"), tmp_path, hide=False)

    assert said["found"] == []
    for precision in PRECISIONS:
        losses = arrays[f"{precision}/losses"]
        assert np.isfinite(losses).all()
        assert np.mean(losses[-3:]) < np.mean(losses[:3])

    before = install.device_bytes(fresh)
    removed = install.not_loaded(fresh)
    for path in removed:
        path.unlink()
    (tmp_path / "stripped").mkdir()
    stripped, _ = work(fresh, made("text"), tmp_path / "stripped", hide=False)

    assert install.device_bytes(fresh) < 0.8 * before
    for name, array in arrays.items():
        np.testing.assert_array_equal(stripped[name], array)


def test_what_may_be_deleted_is_what_the_guide_lists() -> None:
    guide = (ROOT / "docs" / "edge.md").read_text()
    assert [p for p in install.NOT_LOADED if f"site-packages/{p}" not in guide] == []
