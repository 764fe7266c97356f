"""`anabranch audit`: every claim of a finished run tested, RUN/audit.json written.

All tests of a command have one level: 1 % over their number, so that an honest run fails with a
chance of at most 1 %, however many sites it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from anabranch.client.audit.record import (
    SiteFound,
    audit_site,
    final_adapter,
    find_sites,
    report_of,
)
from anabranch.client.audit.replay import Parts
from anabranch.client.audit.report import FALSE_ALARM, Report, level_for
from anabranch.client.files import read_run
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, PrivacyError
from anabranch.server.aggregation.choose import rule_for
from anabranch.server.client_audit import audit_clients, client_checks, client_part
from anabranch.server.evaluation import initial_adapter
from anabranch.storage.files import write_atomic

CANARIES = 400  # per site


def audit(
    run: Path,
    *,
    sites: Sequence[str] = (),
    canaries: int = CANARIES,
    seed: int | None = None,
    data: Path | None = None,
    non_members: Path | None = None,
    on_replay: Callable[[], None] = lambda: None,
) -> Report:
    """Audit what `run` claims of records and of clients, and write audit.json beside it.

    With `data`, the record-level claim of one site on these records. `seed` fixes coins and
    directions; the noise is always the product's own. Raises ConfigError if `run` is no run
    folder, PrivacyError if the run claims nothing, DataError if records break the contract.
    """
    if canaries < 1:
        raise ConfigError(f"--canaries {canaries}: expected at least 1")
    config = read_run(run / "run.toml")
    if config.privacy is None and config.client_privacy is None:
        raise PrivacyError(
            f"{run}: run.toml has neither [privacy] nor [client_privacy], so there is no claim to "
            "audit"
        )
    summary = _summary(run)
    rng = np.random.default_rng(seed)
    found_sites = find_sites(run, sites, data) if config.privacy is not None else []
    asks_clients = config.client_privacy is not None and data is None
    level = level_for(len(found_sites) + asks_clients)
    results = [
        audit_site(
            site,
            config,
            _parts(config, site),
            canaries=canaries,
            rng=rng,
            level=level,
            final=final_adapter(run),
            recorded=summary,
            non_members=non_members,
            on_replay=on_replay,
        )
        for site in found_sites
    ]
    clients = None
    if asks_clients:
        claim, replays = audit_clients(
            config, initial_adapter(config), canaries=canaries, rng=rng, on_replay=on_replay
        )
        clients = claim, replays, client_checks(claim, replays, rng, level)
    parts = [report_of(one, level) for one in results]
    parts += [] if clients is None else [client_part(*clients, level)]
    report = Report(
        run=str(summary.get("run", run.name)),
        config=config.digest(),
        passed=all(part.passed for part in parts),
        false_alarm=FALSE_ALARM,
        seed=seed,
        parts=tuple(parts),
    )
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=2)
    write_atomic(run / "audit.json", encoded + b"\n")
    return report


def _parts(config: RunConfig, site: SiteFound) -> Parts:
    """Return what the run's rule lets a site train in each round."""
    rule = rule_for(msgspec.structs.replace(config, client_privacy=None))
    limit = config.adapter.rank if site.max_rank is None else site.max_rank
    return partial(_part, rule, site.name, limit)


def _part(rule: Any, name: str, limit: int, spec: Any, number: int) -> Any:
    return rule.part(spec, number, name, max(limit, 0))


def _summary(run: Path) -> dict[str, Any]:
    """Return summary.json; {} if the run has none (a site has run.toml alone)."""
    path = run / "summary.json"
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
