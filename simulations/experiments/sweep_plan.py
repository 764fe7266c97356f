"""[sweep] of experiment.toml: which runs there are, and what each is called.

[sweep]
combine = "grid"                              every combination; "zip": first with first, …
seeds = [0, 1, 2]                             every combination once with each of them
"training.learning_rate" = [0.01, 0.1]        settings of run.toml and experiment.toml
"population.alpha" = [0.1, 1.0]

learning_rate-0.01_alpha-0.1/seed-0           the folder of a run
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from anabranch.protocols.errors import AnabranchError, ConfigError
from anabranch.simulations.experiment import Experiment, experiment_of, read_source
from anabranch.simulations.experiments.settings import file_of, flatten
from anabranch.simulations.simulate import digests, override

LONGEST: Final = 80  # characters of a folder's name
BASE: Final = "base"  # the folder of a sweep over seeds alone

Changes = dict[str, Any]


class Sweep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table, read."""

    combinations: tuple[Changes, ...]
    seeds: tuple[int, ...] | None  # None: the experiment's own


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a sweep."""

    name: str  # of its combination
    folder: str  # in the sweep's output
    changes: Changes
    experiment: Experiment
    digest: str


def plan(path: Path, **given: Any) -> list[Planned]:
    """Return the runs of an experiment's [sweep], in its order; `given` as simulate.override.

    Everything is read and checked: ConfigError names the combination that cannot be run.
    """
    source = read_source(path)
    tree, _ = source.trees()
    table = tree.get("sweep")
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: there is no [sweep]")
    sweep, seed = read_sweep(table, str(path)), given.pop("seed", None)
    names = slugs(sweep.combinations)
    runs = []
    for name, changes in zip(names, sweep.combinations, strict=True):
        for one in (seed,) if seed is not None else sweep.seeds or (None,):
            try:
                experiment = override(experiment_of(source, changes, one), **given)
            except AnabranchError as error:
                raise ConfigError(f"[sweep] {name}: {error}") from None
            folder = f"{name}/seed-{experiment.config.seed}"
            whole, _ = digests(experiment)
            runs.append(
                Planned(
                    name=name, folder=folder, changes=changes, experiment=experiment, digest=whole
                )
            )
    twice = [folder for folder, count in Counter(one.folder for one in runs).items() if count > 1]
    if twice:
        raise ConfigError(f"{path}: [sweep] has the run {twice[0]} more than once")
    return runs


def read_sweep(table: Mapping[str, Any], source: str) -> Sweep:
    """Return what a [sweep] says; raise ConfigError naming the field."""
    rest = dict(table)
    combine, seeds = rest.pop("combine", "grid"), rest.pop("seeds", None)
    if combine not in ("grid", "zip"):
        raise ConfigError(f'{source}: sweep.combine: expected "grid" or "zip", got {combine!r}')
    if seeds is not None and not (
        isinstance(seeds, list) and seeds and all(_is_seed(one) for one in seeds)
    ):
        raise ConfigError(f"{source}: sweep.seeds: expected a list of whole numbers, got {seeds!r}")
    settings = flatten(rest)
    for path, values in settings.items():
        try:
            file_of(path)
        except ConfigError as error:
            raise ConfigError(f"{source}: [sweep] {error}") from None
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{source}: [sweep] {path}: expected a list of values")
    if seeds is None and not settings:
        raise ConfigError(f"{source}: [sweep] is empty: list `seeds`, or values of a setting")
    return Sweep(
        combinations=tuple(_combined(settings, combine, source)),
        seeds=None if seeds is None else tuple(seeds),
    )


def _combined(settings: Mapping[str, list[Any]], combine: str, source: str) -> list[Changes]:
    if combine == "grid":
        rows: Sequence[tuple[Any, ...]] = list(itertools.product(*settings.values()))
    else:
        lengths = {path: len(values) for path, values in settings.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(
                f'{source}: [sweep] combine = "zip" needs lists of one length, got '
                + ", ".join(f"{path}: {n}" for path, n in lengths.items())
            )
        rows = list(zip(*settings.values(), strict=True)) or [()]
    return [dict(zip(settings, row, strict=True)) for row in rows]


def slugs(combinations: Sequence[Changes]) -> list[str]:
    """Return a folder name for each: different for different combinations, always the same.

    A setting is called by the last part of its path, or by the whole path where two of the sweep
    end alike. What a name cannot show exactly ends in a hash of the combination.
    """
    paths = list(dict.fromkeys(path for one in combinations for path in one))
    ends = Counter(path.rpartition(".")[2] for path in paths)
    short = {p: end if ends[end := p.rpartition(".")[2]] == 1 else p for p in paths}
    return [_slug({short[path]: value for path, value in one.items()}) for one in combinations]


def _slug(named: Mapping[str, Any]) -> str:
    if not named:
        return BASE
    exact = "_".join(f"{name}-{_written(value)}" for name, value in named.items())
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", exact).strip("-.")
    if safe == exact and len(safe) <= LONGEST and all(map(_plain, named.values())):
        return safe
    tail = hashlib.sha256(msgspec.json.encode(named)).hexdigest()[:8]
    return f"{safe[: LONGEST - 9]}-{tail}"


def _written(value: Any) -> str:
    if isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()


def _plain(value: Any) -> bool:
    """Whether a value that is written in a name cannot be taken for another one."""
    if not isinstance(value, str):
        return True
    try:
        msgspec.json.decode(value)
    except msgspec.DecodeError:
        return "_" not in value
    return False  # "1" and 1


def _is_seed(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
