"""The command: exit codes, one line for a mistake, no heavy imports where none are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from anabranch.cli.main import run
from tests.runs import table_text, write_table

HEAVY = {"torch", "transformers", "flwr", "opacus", "ray", "onnx", "onnxruntime", "scipy"}


def imported_by(*arguments: str) -> set[str]:
    """Return the top-level modules a fresh process has imported after a command."""
    script = (
        "import sys, json\n"
        "from anabranch.cli.main import run\n"
        f"code = run({list(arguments)!r})\n"
        "names = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "print('\\n' + json.dumps([code, names]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    code, names = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return set(names)


@pytest.mark.parametrize(
    "arguments", [("--help",), ("edge", "--help"), ("edge", "infer", "--help"), ("demo", "--help")]
)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert not imported_by(*arguments) & (HEAVY | {"numpy"})


@pytest.mark.parametrize(
    "arguments", [("--nonsense",), ("site", "check"), ("demo", "--seed", "x"), ("fly",), ()]
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert run(arguments) == 2


def test_a_mistake_is_one_line_on_stderr_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", str(tmp_path / "none.toml")]) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("anabranch: ")
    assert "none.toml" in err
    assert err.count("\n") == 1


def test_a_missing_extra_is_named() -> None:
    script = (
        "import sys; sys.modules['PIL'] = None\n"  # as if Pillow were not installed
        "from anabranch.cli.main import run\n"
        "sys.exit(run(['site', 'check', 'x.csv', '--run', 'run.toml']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "site needs the module 'PIL'" in done.stderr
    assert 'pip install "anabranch[client]"' in done.stderr


def test_site_check_says_ok_or_lists_violations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_toml = tmp_path / "run.toml"
    run_toml.write_text(table_text())
    good = write_table(tmp_path / "good.csv")
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b,y\n1,2,yes\nx,2,maybe\n")

    assert run(["site", "check", str(good), "--run", str(run_toml)]) == 0
    assert "40 records keep the data contract" in capsys.readouterr().out
    assert run(["site", "check", str(bad), "--run", str(run_toml), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [v["rows"] for v in found["violations"]] == [[2], [2]]
    assert "maybe" not in json.dumps(found["violations"][0])


def test_a_table_of_numbers_is_quiet_and_json_is_one_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(table_text())
    write_table(tmp_path / "a.csv")
    write_table(tmp_path / "test.csv", n=60, seed=9)
    (tmp_path / "exp.toml").write_text(
        'run = "run.toml"\ntest = "test.csv"\n[sites]\na = "a.csv"\n'
    )
    output = tmp_path / "out"

    assert run(["simulate", str(tmp_path / "exp.toml"), "--output", str(output), "--json"]) == 0

    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert err == ""
    assert summary == json.loads((output / "summary.json").read_text())
    assert summary["accuracy"]["federated"] > 0.5
    for name in ("run.toml", "events.jsonl", "report.html", "release/manifest.json"):
        assert (output / name).is_file()


def test_a_run_folder_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(table_text())
    write_table(tmp_path / "a.csv")
    (tmp_path / "exp.toml").write_text('run = "run.toml"\n[sites]\na = "a.csv"\n')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep me")

    assert run(["simulate", str(tmp_path / "exp.toml"), "--output", str(tmp_path / "out")]) == 1

    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
