"""What is private to Flower is imported in few modules: those that an upgrade is checked against.

Everything but the packages that Flower's documentation names is private; a release may move it.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: list[str] = list(PYPROJECT["tool"]["setuptools"]["package-dir"].values())
PUBLIC = {"app", "clientapp", "serverapp", "simulation"}
ADAPTERS = {  # one per side, and what the one may say to the other
    "simulations/grid.py",
    "server/superlink.py",
    "server/fleet_calls.py",
    "client/fleet.py",
}


def private_names(source: str) -> list[str]:
    """Return the private modules of Flower that a module imports, wherever in it."""
    return [name for name in named(ast.parse(source)) if is_private(name)]


def named(tree: ast.AST) -> Iterator[str]:
    """Yield all that is imported, and what is said of `flwr` or in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value  # importlib.import_module, python -m


def is_private(name: str) -> bool:
    first, _, rest = name.partition(".")
    if first != "flwr" or not rest.replace(".", "").isidentifier():
        return False
    return rest.split(".")[0] not in PUBLIC | {"__version__"}


def test_only_the_adapters_import_what_is_private_to_flower() -> None:
    sources = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {
        path.relative_to(ROOT).as_posix(): names
        for path in sources
        if (names := private_names(path.read_text()))
    }

    assert {path: names for path, names in found.items() if path not in ADAPTERS} == {}
    assert "simulations/grid.py" in found  # the walk sees what it is about


@pytest.mark.parametrize(
    "source",
    [
        "import flwr.supercore",
        "import flwr.proto.fleet_pb2 as pb",
        "from flwr.common.constant import ErrorCode",
        "from flwr import common",
        "def late():\n    from flwr.supernode.nodestate import NodeState",
        "if TYPE_CHECKING:\n    from flwr.superlink.auth import Auth",
        "import flwr\nflwr.server.start_server()",
        "import_module('flwr.supercore.run')",
    ],
)
def test_private_imports_are_found_however_they_are_written(source: str) -> None:
    assert len(private_names(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from flwr.app import Message",
        "from flwr.serverapp.strategy import FedAvg",
        "from flwr.simulation import run_simulation",
        "import flwr\nprint(flwr.__version__)",
        "getLogger('flwr')\n'flwr 1.41.0'",
        "from flwrs.common import x\nfrom anabranch.server.flower import Mailbox",
    ],
)
def test_public_imports_are_not(source: str) -> None:
    assert private_names(source) == []
