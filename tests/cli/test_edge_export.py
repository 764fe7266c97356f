"""keygen, export, verify, pack, unpack and bench, on a real run of examples/first-run."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anabranch.cli.main import run

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place:
    """A run, a key, and the bundle that `edge export --json` made of them."""

    folder: Path
    run: Path
    told: Any

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def public(self) -> Path:
        return self.folder / "key.pub"

    @property
    def records(self) -> Path:
        return self.folder / "first-run" / "test.csv"


def quiet(*arguments: str | Path) -> str:
    """Run a command that must succeed; return what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run([str(a) for a in arguments])
    assert code == 0, out.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(ROOT / "examples" / "first-run", folder / "first-run")
    with contextlib.chdir(folder):
        quiet("simulate", "first-run/experiment.toml")
    (finished,) = (folder / "runs").iterdir()
    quiet("edge", "keygen", folder / "key")
    told = quiet(
        "edge", "export", finished, folder / "bundle", "--key", folder / "key", "--records",
        folder / "first-run" / "test.csv", "--version", "3", "--precision", "fp32",
        "--memory-mb", "900", "--json",
    )  # fmt: skip
    return Place(folder, finished, json.loads(told))


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = run(["edge", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys: pytest.CaptureFixture[str], message: str, *arguments: str | Path) -> None:
    """The command says what is wrong in one line."""
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert err.startswith("anabranch: ")
    assert err.count("\n") == 1


# -- keygen -------------------------------------------------------------------------------------


def test_keygen_writes_a_private_key_for_its_owner_alone_and_the_public_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "keygen", tmp_path / "sub" / "key")
    assert code == 0
    assert "key.pub" in out
    assert (tmp_path / "sub" / "key").stat().st_mode & 0o777 == 0o600
    assert len(bytes.fromhex((tmp_path / "sub" / "key.pub").read_text().strip())) == 32
    code, out, _ = call(capsys, "keygen", tmp_path / "other", "--json")
    told = json.loads(out)
    assert told["private"] == str(tmp_path / "other")
    assert told["key"] == (tmp_path / "other.pub").read_text().strip()


@pytest.mark.parametrize("name", ["key", "key.pub"])
def test_keygen_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_text("mine")
    fails(capsys, f"{name}: exists, and a key is never overwritten", "keygen", tmp_path / "key")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_keygen_where_no_file_can_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    fails(capsys, "cannot be written", "keygen", tmp_path / "file" / "key")


# -- export -------------------------------------------------------------------------------------


def test_export_makes_a_bundle_of_the_run_and_tells_what_it_measured(place: Place) -> None:
    manifest = json.loads((place.bundle / "manifest.json").read_text())
    assert place.told["bundle"] == str(place.bundle)
    assert (place.told["name"], place.told["version"]) == ("readmission", 3)
    assert place.told["bytes"] == sum(f["bytes"] for f in manifest["files"].values())
    assert place.told["memory_bytes"] == manifest["limits"]["memory_bytes"] == 900 << 20
    assert place.told["measured"] == manifest["measured"]
    assert set(place.told["measured"]) == {"fp32"}
    assert place.told["measured"]["fp32"]["accuracy"] > 0.6
    assert manifest["artifacts"]
    assert manifest["privacy"]["epsilon"] == 2.0
    assert manifest["privacy_steps"] == 6 * 5  # rounds × steps


def test_export_prints_a_table_for_people(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(
        capsys, "export", place.run, tmp_path / "b", "--key", place.folder / "key", "--records",
        place.records, "--precision", "int8", "--no-artifacts", "--name", "small",
    )  # fmt: skip
    assert (code, err) == (0, "")
    head, _, *precisions, _, summary = out.splitlines()
    assert head.split()[:2] == ["weights", "MB"]
    assert [line.split()[0] for line in precisions] == ["fp32", "int8"]  # fp32 is always there
    assert summary.startswith("small, version 1: ")
    assert not (tmp_path / "b" / "checkpoint").exists()


def test_exports_mistakes_are_one_line_and_leave_nothing(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, records = ("--key", place.folder / "key"), ("--records", place.records)
    changed = Path(shutil.copytree(place.run, tmp_path / "changed"))
    with (changed / "release" / "onnx" / "model.onnx").open("ab") as file:
        file.write(b"x")
    other = Path(shutil.copytree(place.run, tmp_path / "other"))
    toml = (other / "run.toml").read_text()
    (other / "run.toml").write_text(toml.replace("learning_rate = 0.5", "learning_rate = 0.25"))
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("age,systolic,smoker,readmitted\n40,120,sometimes,no\n")
    before = sorted(tmp_path.rglob("*"))
    target = tmp_path / "bundle"
    for arguments, message in (
        ((changed, target, *key, *records), "onnx/model.onnx"),
        ((other, target, *key, *records), "is not the configuration that was released"),
        ((tmp_path, target, *key, *records), "run.toml: No such file"),
        ((place.run, target, "--key", tmp_path / "none", *records), "none: cannot be read"),
        ((place.run, target, "--key", place.public, *records), "chmod 600"),
        ((place.run, target, *key, "--records", tmp_path / "no.csv"), "no.csv: no such file"),
        ((place.run, target, *key, *records, "--name", "A b"), "name 'A b': expected 1 to 64"),
        ((place.run, place.bundle, *key, *records), "exists already: move it away"),
        ((place.run, wrong / "b", *key, *records, "--precision", "fp32"), "cannot be written"),
    ):
        fails(capsys, message, "export", *arguments)
        assert sorted(tmp_path.rglob("*")) == before
    code, _, err = call(capsys, "export", place.run, target, *key, "--records", wrong)
    assert code == 1  # a line for each violation of the data contract
    assert "smoker: unknown value" in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", [("--version", "0"), ("--precision", "int2"), ("--memory-mb", "0"), ()]
)
def test_wrong_usage_is_exit_code_2(
    place: Place, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    key = ("--key", str(place.folder / "key"))
    records = ("--records", str(place.records)) if arguments else ()
    command = ["edge", "export", str(place.run), str(tmp_path / "b"), *key, *records, *arguments]
    assert run(command) == 2
    assert list(tmp_path.iterdir()) == []


# -- verify, pack, unpack -----------------------------------------------------------------------


def test_verify_takes_a_key_in_a_file_in_digits_or_from_the_device(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = place.public.read_text().strip()
    home = tmp_path / "home"
    home.mkdir()
    (home / "trusted.json").write_text(json.dumps({"format": 1, "keys": {digits: "me"}}))
    for where in (("--trust", place.public), ("--trust", digits), ("--home", home)):
        code, out, _ = call(capsys, "verify", place.bundle, *where)
        assert code == 0
        assert out.startswith("readmission, version 3: signed by a trusted key, ")
        code, out, _ = call(capsys, "verify", place.bundle, *where, "--json")
        files = len(list(place.bundle.iterdir())) - 2
        assert json.loads(out) == {"name": "readmission", "version": 3, "files": files}


def test_verify_refuses_without_a_key_with_another_and_after_a_change(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trust, home = ("--trust", place.public), ("--home", tmp_path / "nowhere")
    fails(capsys, "no key is trusted", "verify", place.bundle, *home)
    fails(capsys, "does not trust", "verify", place.bundle, "--trust", "0" * 64)
    fails(capsys, "expected 64 hex digits, got 4", "verify", place.bundle, "--trust", "abcd")
    fails(capsys, "expected 64 hex digits or a file", "verify", place.bundle, "--trust", "x.pub")
    fails(capsys, "manifest.json cannot be read", "verify", tmp_path / "none", *trust)
    copy = Path(shutil.copytree(place.bundle, tmp_path / "copy"))
    (copy / "extra").write_text("")
    fails(capsys, "'extra' is not listed", "verify", copy, *trust)
    (copy / "extra").unlink()
    data = bytearray((copy / "train_step.fp32.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "train_step.fp32.onnx").write_bytes(data)
    fails(capsys, "train_step.fp32.onnx", "verify", copy, *trust)


def test_a_bundle_survives_pack_and_unpack(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, out = tmp_path / "b.tar", tmp_path / "out"
    code, text, _ = call(capsys, "pack", place.bundle, archive)
    assert (code, text) == (0, f"{archive}: {archive.stat().st_size:,} bytes\n")
    code, text, _ = call(capsys, "pack", place.bundle, tmp_path / "again.tar", "--json")
    assert json.loads(text)["bytes"] == archive.stat().st_size
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()
    code, text, _ = call(capsys, "unpack", archive, out, "--trust", place.public, "--json")
    assert (code, json.loads(text)) == (0, {"bundle": str(out)})
    contents = [{p.name: p.read_bytes() for p in f.iterdir()} for f in (place.bundle, out)]
    assert contents[0] == contents[1]


def test_what_cannot_be_packed_or_unpacked_is_one_line_and_leaves_nothing(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, trust = tmp_path / "b.tar", ("--trust", place.public)
    assert call(capsys, "pack", place.bundle, archive)[0] == 0
    short = tmp_path / "short.tar"
    short.write_bytes(archive.read_bytes()[:-2000])
    before = sorted(tmp_path.rglob("*"))
    fails(capsys, "no bundle", "pack", tmp_path / "none", tmp_path / "n.tar")
    fails(capsys, "cannot be written", "pack", place.bundle, short / "b.tar")
    fails(capsys, "ends too early", "unpack", short, tmp_path / "out", *trust)
    fails(capsys, "does not trust", "unpack", archive, tmp_path / "out", "--trust", "0" * 64)
    fails(capsys, "no key is trusted", "unpack", archive, tmp_path / "out", "--home", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


# -- bench --------------------------------------------------------------------------------------


def test_bench_has_a_line_for_each_graph_and_says_on_what(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    trust = ("--trust", place.public)
    code, out, _ = call(capsys, "bench", place.bundle, *trust, "--runs", "2", "--records", "3")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == [
        "graph", "records", "p50", "ms", "p95", "ms", "CPU", "ms", "peak", "MB", "J"
    ]  # fmt: skip
    assert [line.split()[:2] for line in lines[2:-2]] == [
        ["infer.fp32", "1"], ["train_step.fp32", "3"], ["train_step_dp.fp32", "3"]
    ]  # fmt: skip
    assert "onnxruntime" in lines[-1]
    assert "energy" in lines[-1]


def test_bench_in_json_is_the_report(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    trust = ("--trust", place.public)
    code, out, _ = call(capsys, "bench", place.bundle, *trust, "--runs", "2", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["bundle"]["version"] == 3
    assert len(report["rows"]) == 3


def test_bench_opens_nothing_that_is_not_trusted(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, "no key is trusted", "bench", place.bundle, "--home", tmp_path)
    assert run(["edge", "bench", str(place.bundle), "--runs", "1"]) == 2
