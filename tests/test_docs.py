"""Every command in the documentation is run: here, by the demo's test, or by CI itself."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from anabranch.cli.main import run

ROOT = Path(__file__).parent.parent
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/**/*.md")])
FENCE = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
MAKE = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
BY_DEMO = "runs/demo"  # what needs the demo's run folder is run by tests/simulations/test_demo.py


def commands() -> list[tuple[str, str]]:
    """Return (document, command line) of every shell block, continuation lines joined."""
    found = []
    for path in DOCS:
        for block in FENCE.findall(path.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                text = line.split("  #")[0].strip()
                if text and not text.startswith("#"):
                    found.append((path.relative_to(ROOT).as_posix(), text))
    return found


def anabranch_commands(*, by_demo: bool) -> list[list[str]]:
    """Return the arguments of every `anabranch …` line, in the order of the documents, once."""
    lines = dict.fromkeys(c for _, c in commands() if c.startswith("anabranch "))
    return [shlex.split(c)[1:] for c in lines if (BY_DEMO in c) is by_demo]


def test_there_are_commands_to_run() -> None:
    assert len(anabranch_commands(by_demo=False)) >= 4
    assert len(anabranch_commands(by_demo=True)) >= 2


def test_every_other_line_is_a_target_of_the_makefile_or_runs_elsewhere() -> None:
    for document, command in commands():
        program, *rest = shlex.split(command)
        if program == "make":
            assert set(rest) <= MAKE, f"{document}: {command}"
        elif program == "pip":
            assert rest[0] == "install", f"{document}: {command}"
        elif program == "python":
            assert (ROOT / rest[0]).exists() or rest[0] == "-m", f"{document}: {command}"
        elif document != "examples/flower-app/README.md":  # run by test_superlink.py
            assert program == "anabranch", f"{document}: {command}"


def test_every_command_in_the_documents_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = shutil.ignore_patterns("node_modules")
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=modules)
    monkeypatch.chdir(tmp_path)
    for arguments in anabranch_commands(by_demo=False):
        assert run(arguments) == 0, (arguments, capsys.readouterr().err)


def test_links_between_documents_lead_somewhere() -> None:
    for path in DOCS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"
