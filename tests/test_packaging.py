"""The mapping in pyproject.toml and the folders on disk must agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=;]", one)[0].strip() for one in requirements}


def test_every_source_folder_ships_in_the_wheel() -> None:
    on_disk = {
        ".".join([name, *init.parent.relative_to(ROOT / folder).parts])
        for name, folder in SETUPTOOLS["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
    }

    assert on_disk == set(SETUPTOOLS["packages"])


def test_every_folder_with_source_is_a_package() -> None:
    for folder in SETUPTOOLS["package-dir"].values():
        for source in (ROOT / folder).rglob("*.py"):
            assert (source.parent / "__init__.py").exists(), source


def test_static_tools_see_the_same_folders() -> None:
    for name, folder in SETUPTOOLS["package-dir"].items():
        link = ROOT / ".types" / Path(*name.split("."))

        assert link.resolve() == ROOT / folder


def test_devices_never_install_torch_and_never_both_onnxruntimes() -> None:
    heavy = {"torch", "flwr", "opacus", "transformers"}
    core = names(PYPROJECT["project"]["dependencies"])
    for extra in ("edge", "edge-training"):
        assert not heavy & (core | names(EXTRAS[extra]))
    assert "onnxruntime" not in names(EXTRAS["edge-training"])
    assert "edge-training" not in EXTRAS["all"][0]


def test_every_direct_dependency_is_pinned_in_the_constraints() -> None:
    pinned = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = names(PYPROJECT["project"]["dependencies"])
    for requirements in (*EXTRAS.values(), PYPROJECT["dependency-groups"]["dev"]):
        wanted |= names(requirements)

    assert wanted - {"anabranch"} <= pinned
