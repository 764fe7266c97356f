"""Settings by dotted path, as "training.learning_rate" or "population.alpha".

A path's first part says which file it belongs to. The seed is no setting: it is given by itself,
so that runs which differ in nothing else are told apart from runs that differ in something.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError

Tree = dict[str, Any]
File = Literal["run", "experiment"]

EXPERIMENT: Final = frozenset({"population", "devices", "clock", "faults", "ranks", "engine"})
RUN: Final = frozenset(RunConfig.__struct_fields__) - {"name", "seed"}


def file_of(path: str) -> File:
    """Return which file a setting is in; raise ConfigError for what is no setting."""
    head = path.partition(".")[0]
    if head == "seed":
        raise ConfigError("seed: seeds are listed in `seeds`, not among the settings")
    if head in RUN:
        return "run"
    if head in EXPERIMENT:
        return "experiment"
    raise ConfigError(
        f"{path!r} is no setting of run.toml or experiment.toml: expected a dotted path that "
        f"begins with one of {', '.join(sorted(RUN | EXPERIMENT))}"
    )


def flatten(tree: Mapping[str, Any], stop: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return dotted path -> value of nested tables; a table with a key of `stop` is a value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and not value.keys() & stop:
            found |= {f"{name}.{path}": inner for path, inner in flatten(value, stop).items()}
        else:
            found[name] = value
    return found


def changed(tree: Tree, changes: Mapping[str, Any]) -> Tree:
    """Return a copy of `tree` with the values at dotted paths replaced or added.

    Raises ConfigError for a path that leads through something other than a table.
    """
    result = copy.deepcopy(tree)
    for path, value in changes.items():
        *parents, last = path.split(".")
        table = result
        for depth, name in enumerate(parents):
            inner = table.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"{path}: {'.'.join(parents[: depth + 1])} is {inner!r}, expected a table"
                )
            table = inner
        table[last] = value
    return result


def encode(tree: Mapping[str, Any]) -> bytes:
    """Return the tree as TOML."""
    return msgspec.toml.encode(tree)


def decode(data: bytes, source: str) -> Tree:
    """Return the tree in a TOML file, or raise ConfigError naming `source`."""
    try:
        return msgspec.toml.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
