"""Configurations and facts of private runs, for the tests of what is said about them."""

from __future__ import annotations

from typing import Any

from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import (
    ClientPrivacy,
    Column,
    Contract,
    Federation,
    Model,
    Privacy,
    Task,
    Training,
)
from anabranch.server.aggregation.private import ClientPlan
from anabranch.server.statement.guarantees import RunFacts, SitePrivacy


def open_config(**changes: Any) -> RunConfig:
    """Return a run without privacy; `changes` are fields of RunConfig."""
    fields: dict[str, Any] = {
        "name": "small",
        "task": Task(kind="tabular-classification", labels=("no", "yes")),
        "data": Contract(
            columns={"age": Column(type="number", mean=60, std=15), "y": Column(type="label")}
        ),
        "model": Model(base="logistic"),
        "federation": Federation(rounds=6),
        "training": Training(local_steps=25),
    }
    return RunConfig(**fields | changes)


def private_config(**changes: Any) -> RunConfig:
    """Return a run with record-level privacy; `changes` are fields of RunConfig."""
    return open_config(**{"privacy": Privacy(epsilon=3.0)} | changes)


def client_config(**changes: Any) -> RunConfig:
    """Return a run with client-level privacy; `changes` are fields of RunConfig."""
    fields = {
        "client_privacy": ClientPrivacy(epsilon=3.0, population=1000),
        "federation": Federation(rounds=100, cohort=100, weighting="uniform"),
    }
    return open_config(**fields | changes)


def site(name: str, **changes: Any) -> SitePrivacy:
    """Return what a site spent: its 150 steps cost 3.003, and it had trained before."""
    fields: dict[str, Any] = {
        "epsilon": 3.5,
        "delta": 5e-4,
        "noise_multiplier": 2.32,
        "sample_rate": 0.16,
        "steps": 150,
        "engine": "fast",
        "ledger": "ab12",
    }
    return SitePrivacy(site=name, **fields | changes)


def client_plan(**changes: Any) -> ClientPlan:
    """Return the plan of a run of `client_config`; `changes` are fields of ClientPlan."""
    fields: dict[str, Any] = {
        "population": 1000,
        "sample_rate": 0.1,
        "rounds": 100,
        "noise_multiplier": 1.55,
        "clipping_norm": 0.75,
        "adaptive": False,
        "target_quantile": 0.5,
        "max_examples": None,
        "delta": 1e-4,
        "epsilon": 2.9,
    }
    return ClientPlan(**fields | changes)


def facts_of(*sites: str, client: ClientPlan | None = None, **changes: Any) -> RunFacts:
    """Return the facts of a run in which `sites` took part."""
    fields: dict[str, Any] = {
        "run": "run-1",
        "base_name": "logistic",
        "rounds": 6,
        "best_round": 4,
        "sites": sites,
        "privacy": tuple(map(site, sites)),
        "client": client,
    }
    return RunFacts(**fields | changes)
