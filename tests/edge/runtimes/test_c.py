"""examples/c against Python: the same frames, losses and trained adapter.

train_step is built with the official header where there is one (ANABRANCH_ONNXRUNTIME_INCLUDE, or
Debian's libonnxruntime-dev), and with c/onnxruntime_c_api.h, which declares the same places. The
library is the one in onnxruntime-node's package.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from anabranch.client.tuning.classifier import Classifier
from anabranch.edge.runtime.bundle import Bundle, open_bundle
from anabranch.edge.runtime.engine import Batch
from anabranch.edge.runtime.joint import open_engine
from anabranch.edge.runtime.optimizer import fresh, update
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import AnabranchError
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Training
from tests.edge.bundles import TRUSTED, write_bundle
from tests.edge.runtimes.conftest import ROOT

SOURCES = ROOT / "examples" / "c"
HERE = Path(__file__).resolve().parent / "c"
ATTACKS = ROOT / "tests" / "protocols" / "attacks"
STRICT = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]
CHECKED = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
STEPS, RATE = 5, 2e-3

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def compiled(target: Path, *arguments: str | Path) -> Path:
    command = ["cc", *STRICT, f"-I{SOURCES}", *map(str, arguments), "-lm", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def ran(program: Path, *arguments: str | Path) -> str:
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def official_header() -> Path | None:
    """Return the folder of onnxruntime's own header, or None."""
    named = os.environ.get("ANABRANCH_ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime")
    return Path(named) if (Path(named) / "onnxruntime_c_api.h").exists() else None


# Tests against the official header exist only where it does: what is not there is not skipped.
OFFICIAL = [header] if (header := official_header()) is not None else []


# --- the frame reader: a compiler is all it takes ---------------------------------------------


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program that reads frames; a read or write outside its memory ends it."""
    target = tmp_path_factory.mktemp("frames") / "frames"
    sources = [HERE / "frames.c", SOURCES / "frame.c", SOURCES / "sha256.c"]
    return compiled(target, *CHECKED, *sources)


def some_adapter(rng: np.random.Generator, width: int) -> Adapter:
    shapes = {
        "head.bias": (3,),
        "head.weight": (3, width),
        "q.lora_A.weight": (2, width),
        "q.lora_B.weight": (5, 2),
        "scale": (),
    }
    spec = AdapterSpec(
        base="ab" * 32,
        tokenizer="",
        rank=2,
        alpha=4.0,
        targets=("q",),
        tensors=tuple(sorted(shapes.items())),
    )
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return Adapter(spec, {n: np.asarray(a, np.float32) for n, a in arrays.items()})


def described(adapter: Adapter) -> str:
    """Return the line that frames.c prints for an adapter."""
    parts = ["read"]
    for name, shape in adapter.spec.tensors:
        last = float(adapter.arrays[name].reshape(-1)[-1])
        parts.append(",".join([name, *map(str, shape)]) + f"={last:.9g}")
    return " ".join(parts)


def test_frames_are_read_and_written_as_python_does(frames: Path, tmp_path: Path) -> None:
    # 64 widths: the last block of the hash has every length.
    rng = np.random.default_rng(0)
    adapters = [some_adapter(rng, width) for width in range(1, 65)]
    paths = [tmp_path / f"{i}.bin" for i in range(len(adapters))]
    for path, adapter in zip(paths, adapters, strict=True):
        path.write_bytes(wire.encode(adapter))

    lines = ran(frames, *paths).splitlines()

    assert lines == [described(adapter) for adapter in adapters]
    for path in paths:
        assert Path(f"{path}.copy").read_bytes() == path.read_bytes()


def spoiled(frame: bytes, rng: random.Random) -> bytes:
    """Return a frame with another header and a checksum that fits."""
    length = struct.unpack("<I", frame[4:8])[0]
    header, values = bytearray(frame[8 : 8 + length]), frame[8 + length : -32]
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(header))
        what = rng.randrange(3)
        if what == 0:
            header[at] = rng.choice(b'0123456789"[],{}.-\\\x00\xff aZ')
        elif what == 1:
            del header[at : at + rng.randrange(1, 9)]
        else:
            header[at:at] = rng.choice([b"[", b'"', b"9999999999", b",2", b'["x",[1]],', b"0"])
    body = b"ABA1" + struct.pack("<I", len(header)) + bytes(header) + values
    return body + hashlib.sha256(body).digest()


def read_by_python(frame: bytes) -> str | None:
    try:
        return described(wire.decode_adapter(frame))
    except AnabranchError:
        return None


def test_whatever_python_reads_c_reads_alike_and_nothing_harms_it(
    frames: Path, tmp_path: Path
) -> None:
    honest = wire.encode(some_adapter(np.random.default_rng(1), 4))
    rng = random.Random(2)
    candidates = [spoiled(honest, rng) for _ in range(1500)]
    for attack in sorted(ATTACKS.glob("*.txt")):
        candidates.append(bytes.fromhex(attack.read_text().partition("\n\n")[2]))
    paths = [tmp_path / f"{i}.bin" for i in range(len(candidates))]
    for path, frame in zip(paths, candidates, strict=True):
        path.write_bytes(frame)

    lines = ran(frames, *paths).splitlines()

    assert len(lines) == len(candidates)
    alike = refused = 0
    for frame, line in zip(candidates, lines, strict=True):
        expected = read_by_python(frame)
        assert expected is None or line == expected
        alike += expected is not None
        refused += line.startswith("refused")
    assert refused > len(candidates) // 2
    assert alike > 50  # such as another digest of the base


def test_damage_is_refused(frames: Path, tmp_path: Path) -> None:
    honest = wire.encode(some_adapter(np.random.default_rng(3), 1))
    candidates = [honest[:at] for at in range(len(honest))]
    candidates += [honest[:at] + bytes([honest[at] ^ 4]) + honest[at + 1 :] for at in range(100)]
    candidates += [
        honest[:at] + bytes([honest[at] ^ 128]) + honest[at + 1 :] for at in range(-90, -1)
    ]
    candidates.append(honest + b"\0")
    paths = [tmp_path / f"{i}.bin" for i in range(len(candidates))]
    for path, frame in zip(paths, candidates, strict=True):
        path.write_bytes(frame)

    lines = ran(frames, *paths, tmp_path / "absent").splitlines()

    assert len(lines) == len(candidates) + 1
    assert all(line.startswith("refused") for line in lines)
    assert lines[-1] == "refused cannot be read"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: b"ABA2" + f[4:], "not a frame"),
        (lambda f: f[:4] + b"\xff\xff\xff\x7f" + f[8:], "header: wrong length"),
        (lambda f: f[:-1] + bytes([f[-1] ^ 1]), "checksum differs"),
        (lambda f: f.replace(b"head.bias", b"tead.bias"), "header: names not ascending"),
        (lambda f: f.replace(b'"both"', b'"A"'), "header: not a whole adapter"),
        (lambda f: f.replace(b'"adapter"', b'"delta"'), "header: not an adapter's"),
        (lambda f: f.replace(b"[5,2]", b"[5,3]"), "values: another number of bytes"),
        (lambda f: f[:-36] + struct.pack("<f", np.nan) + f[-32:], "values: not finite"),
    ],
)
def test_a_broken_rule_is_named(
    frames: Path, tmp_path: Path, spoil: Callable[[bytes], bytes], reason: str
) -> None:
    frame = spoil(wire.encode(some_adapter(np.random.default_rng(4), 2)))
    if reason not in ("checksum differs", "not a frame", "header: wrong length"):
        head = frame[8 : frame.rindex(b"}}") + 2]  # may have another length now
        frame = b"ABA1" + struct.pack("<I", len(head)) + frame[8:-32]
        frame += hashlib.sha256(frame).digest()
    (tmp_path / "frame.bin").write_bytes(frame)

    assert ran(frames, tmp_path / "frame.bin").startswith(f"refused {reason}")


def test_the_declared_places_compile_and_are_those_of_any_official_header(tmp_path: Path) -> None:
    ours = compiled(tmp_path / "ours", f"-I{HERE}", HERE / "places.c")
    assert "CreateSession 7" in ran(ours)  # as in every version since 1.0

    for official in OFFICIAL:
        theirs = compiled(tmp_path / "theirs", "-isystem", official, HERE / "places.c")
        assert ran(ours) == ran(theirs)


# --- training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(node_packages: Path) -> Path:
    """Return libonnxruntime.so from onnxruntime-node."""
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    found = sorted(
        (node_packages / "node_modules" / "onnxruntime-node").glob(
            f"bin/napi-v*/linux/{machine}/libonnxruntime.so.1"
        )
    )
    if not found:
        pytest.skip(f"onnxruntime-node has no library for Linux on {machine}")
    return found[-1]


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory,
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "text"
    write_bundle(
        folder,
        make_classifier("text"),
        make_config("text"),
        precisions=("fp32",),
        with_artifacts=False,
    )
    return open_bundle(folder, trusted=TRUSTED)


@pytest.fixture(params=[*OFFICIAL, HERE], ids=lambda path: path.name)
def train_step(request: pytest.FixtureRequest, library: Path, tmp_path: Path) -> Path:
    """Return the program, built with the official header or with the declared places."""
    make = [
        "make",
        "-f",
        str(SOURCES / "Makefile"),
        f"INCLUDE={request.param}",
        f"LIBRARY={library}",
    ]
    for source in SOURCES.glob("*.[ch]"):
        shutil.copy(source, tmp_path)
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tmp_path / "train_step"


TEXTS = ["acute heart failure", "fracture of the left femur with", "and", "chronic infarction"]
LABELS = [1, 0, 2, 1]


def written_records(bundle: Bundle, path: Path) -> Path:
    assert bundle.tokenizer is not None
    rows = [[y, *bundle.tokenizer.encode(t)] for y, t in zip(LABELS, TEXTS, strict=True)]
    path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    return path


def python_steps(bundle: Bundle) -> tuple[list[float], dict[str, np.ndarray]]:
    assert bundle.tokenizer is not None
    ids, mask = bundle.tokenizer.batch([bundle.tokenizer.encode(text) for text in TEXTS])
    weights = np.full(len(TEXTS), 1 / len(TEXTS), np.float32)
    batch = Batch({"input_ids": ids, "attention_mask": mask}, np.array(LABELS), weights)
    training = Training(learning_rate=RATE, weight_decay=0.0)
    engine = open_engine(bundle)
    params, losses = dict(engine.params()), []
    state = fresh(training, params, params)
    for step in range(STEPS):
        found = engine.grads(batch)
        losses.append(found.loss)
        params, state = update(training, params, found.arrays, state, step=step, rate=1.0)
        engine.set_params(params)
    return losses, params


@pytest.mark.slow
def test_c_trains_as_python_does(train_step: Path, bundle: Bundle, tmp_path: Path) -> None:
    records = written_records(bundle, tmp_path / "records.txt")
    trained = tmp_path / "trained.bin"

    lines = ran(train_step, bundle.folder, records, str(STEPS), str(RATE), trained).splitlines()

    losses, params = python_steps(bundle)
    np.testing.assert_allclose([float(line) for line in lines], losses, rtol=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    adapter = wire.decode_adapter(trained.read_bytes(), bundle.manifest.spec)
    for name, array in params.items():
        np.testing.assert_allclose(adapter.arrays[name], array, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_a_later_run_goes_on_from_the_trained_adapter(
    train_step: Path, bundle: Bundle, tmp_path: Path
) -> None:
    records = written_records(bundle, tmp_path / "records.txt")
    trained, again = tmp_path / "trained.bin", tmp_path / "again.bin"
    first = ran(train_step, bundle.folder, records, "3", str(RATE), trained).splitlines()
    longer = ran(train_step, bundle.folder, records, "4", str(RATE), again).splitlines()

    (last,) = ran(train_step, bundle.folder, records, "1", "0", again, trained).splitlines()

    assert [*first, last] == longer
    assert again.read_bytes() == trained.read_bytes()  # at a rate of 0


@pytest.mark.slow
def test_what_c_cannot_run_is_said_in_one_line(
    train_step: Path, bundle: Bundle, tmp_path: Path
) -> None:
    records = written_records(bundle, tmp_path / "records.txt")
    (tmp_path / "wrong.txt").write_text("1 2 three\n")
    shutil.copytree(bundle.folder, tmp_path / "other")
    (tmp_path / "other" / "base-fp32.bin").unlink()
    for folder, batch, reason in (
        (tmp_path, records, "adapter.bin: cannot be read"),
        (bundle.folder, tmp_path / "absent", "absent: cannot be read"),
        (bundle.folder, tmp_path / "wrong.txt", "expected a label and token ids in a line"),
        (tmp_path / "other", records, "train_step.fp32.onnx: "),
    ):
        command = [str(train_step), str(folder), str(batch), "1", "0.1", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert reason in done.stderr
        assert not (tmp_path / "out").exists()
