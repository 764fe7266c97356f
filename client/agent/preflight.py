"""Is this site ready to train? Small checks, each a name, a verdict, a value, and what to do.

coordinator  answers, and this site's certificate is accepted
clock        at most 5 s ahead of the coordinator's, at most 60 s behind. Flower refuses what
             is signed more than 5 s ahead of its clock or 305 s behind (flwr.supercore.constant)
version      the coordinator's release;  code: its sources, whose digest runs name
libraries    torch and flwr as installed
certificate  time left
folder       can be written;  disk, temporary: free space
memory       what the process may still take;  cores;  gpu
ledger       opens, and its witnesses agree
policy       can be read, and knows this federation
data         keeps the contract that came with the invitation
base         the base model is here, and its digest
rehearsal    one batch trained and thrown away (rehearsal.py): seconds per round
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.client.agent import checks
from anabranch.client.agent.identity import Identity
from anabranch.client.data import contract
from anabranch.client.data.read import Table, read_table
from anabranch.client.data.records import Records, split, to_records
from anabranch.client.files import read_run
from anabranch.client.site_file import SiteFile, read_site
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import AnabranchError
from anabranch.protocols.identity.join import Hello

CONTRACT = "contract.toml"  # the run.toml that came with the invitation


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was found, in the order of looking."""

    checks: tuple[checks.Check, ...]
    seconds_per_round: float | None = None  # None: no contract yet, or the rehearsal failed
    prepare_s: float | None = None  # once per run

    @property
    def ready(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    @property
    def told(self) -> tuple[str, ...]:
        """Return what the coordinator may read of the checks that did not pass."""
        return tuple(check.told for check in self.checks if not check.ok)

    def as_dict(self) -> dict[str, Any]:
        """Return it for --json."""
        return {
            "ready": self.ready,
            "checks": [
                {"name": c.name, "ok": c.ok, "value": c.value, "sentence": c.sentence}
                for c in self.checks
            ],
            "seconds_per_round": self.seconds_per_round,
            "prepare_seconds": self.prepare_s,
        }


def preflight(
    folder: Path,
    hello: Callable[[], Hello] | None = None,
    clock: Callable[[], float] = time.time,
) -> Preflight:
    """Check a joined site. Trains one batch, and leaves nothing behind.

    `hello` asks the coordinator; None: over a connection of its own. Raises ConfigError if
    this is no site, or one that has not joined.
    """
    identity, file = Identity(folder), read_site(folder)
    found = [
        *checks.coordinator(identity, hello, clock),
        checks.code(identity),
        checks.libraries(),
        checks.certificate(identity, clock()),
        checks.folder(folder),
        checks.disk(folder),
        checks.temporary(),
        checks.memory(),
        checks.cores(),
        checks.gpu(file),
        checks.ledger(folder, file),
        checks.policy(folder, identity),
    ]
    work = _Work()
    found += _work(folder, file, work)
    return Preflight(
        checks=tuple(found), seconds_per_round=work.seconds_per_round, prepare_s=work.prepare_s
    )


@dataclass
class _Work:
    """What the checks of records and model find on their way."""

    seconds_per_round: float | None = None
    prepare_s: float | None = None


def _work(folder: Path, file: SiteFile, work: _Work) -> Iterator[checks.Check]:
    """Yield data, base and rehearsal; what rests on one that failed is left out."""
    data = (folder / file.data).resolve()
    try:
        config = read_run(folder / CONTRACT) if (folder / CONTRACT).exists() else None
        table = read_table(data)
    except AnabranchError as error:
        yield checks.failed("data", "cannot be read", error, private=True)
        return
    if config is None:
        value = f"{table.rows} records; no data contract yet"
        yield checks.Check(name="data", ok=True, value=value)
        return
    broken = _broken(table, config)
    if broken is not None:
        yield broken
    else:
        yield checks.Check(name="data", ok=True, value=f"{table.rows} records keep the contract")
    yield from _model(file, config, None if broken else to_records(table, config), work)


def _broken(table: Table, config: RunConfig) -> checks.Check | None:
    violations = contract.check(table, config)
    if not violations:
        return None
    return checks.Check(
        name="data",
        ok=False,
        value=f"{table.rows} records break the contract",
        sentence=contract.describe(violations, source=table.source)
        + "\nmend the file, then run `anabranch site preflight`",
        private=True,
    )


def _model(
    file: SiteFile, config: RunConfig, records: Records | None, work: _Work
) -> Iterator[checks.Check]:
    from anabranch.client.agent.rehearsal import load, rehearse

    rank = config.adapter.rank
    if file.max_rank is not None and rank > file.max_rank and not config.federation.mixed_ranks:
        yield checks.Check(
            name="rank",
            ok=False,
            value=f"max_rank = {file.max_rank}",
            sentence=f"the contract trains rank {rank} at every site, but max_rank = "
            f"{file.max_rank} in site.toml: raise it, or ask for federation.mixed_ranks",
        )
    try:
        loaded = load(config, file.device, file.max_rank)
    except AnabranchError as error:
        yield checks.failed("base", config.model.base, error, private=True)
        return
    yield checks.Check(name="base", ok=True, value=f"{config.model.base} {loaded.digest[:16]}")
    if records is None:
        return
    train, _ = split(records, config.training.holdout, config.seed)
    try:
        done = rehearse(loaded, config, train)
    except (AnabranchError, MemoryError) as error:
        yield checks.failed("rehearsal", "failed", error, private=True)
        return
    work.seconds_per_round, work.prepare_s = done.seconds_per_round, done.prepare_s
    yield checks.Check(
        name="rehearsal",
        ok=True,
        value=f"{done.steps} {'private ' * done.private}steps of {done.step_s:.3f} s per round",
    )
