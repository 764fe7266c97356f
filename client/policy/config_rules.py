"""What the policy says of a run's configuration alone: `site policy check` asks these rules, too.

    privacy, cohort, columns, rounds   would the whole run keep the limits?

A rule returns None, or a sentence that may leave the site (rules.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from anabranch.client.policy.policy_file import Policy
from anabranch.protocols.config import RunConfig

ConfigCode = Literal["privacy", "cohort", "columns", "rounds"]
ConfigRule = Callable[[Policy, RunConfig], str | None]


def _privacy(policy: Policy, config: RunConfig) -> str | None:
    wanted = policy.privacy
    if not wanted.required:
        return None
    tables = {"record": ["privacy"], "client": ["client_privacy"]}.get(
        wanted.unit, ["privacy", "client_privacy"]
    )
    for name in tables:
        table = config.privacy if name == "privacy" else config.client_privacy
        if table is None:
            return (
                f"the run has no [{name}], and this site's policy asks for {name_of(name)} privacy"
            )
        if table.epsilon > wanted.epsilon_max:
            return (
                f"{name}.epsilon = {table.epsilon:g}, and this site's policy allows "
                f"{wanted.epsilon_max:g}"
            )
        if table.delta is None:
            return f"{name}.delta has to be stated: this site's policy allows {wanted.delta_max:g}"
        if table.delta > wanted.delta_max:
            return (
                f"{name}.delta = {table.delta:g}, and this site's policy allows "
                f"{wanted.delta_max:g}"
            )
    return None


def _cohort(policy: Policy, config: RunConfig) -> str | None:
    wanted, secure = policy.cohort, config.secure_aggregation
    if secure is None and wanted.secure_aggregation == "required":
        return (
            "the run has no [secure_aggregation], and this site's policy asks for it: the "
            "coordinator would see every site's update"
        )
    for name in ("threshold", "colluding") if secure is not None else ():
        got, least = getattr(secure, name), getattr(wanted, name)
        if got < least:
            return (
                f"secure_aggregation.{name} is {got:g}, and this site's policy asks for at least "
                f"{least:g}"
            )
    size, what = config.federation.quorum, "federation.quorum"
    if config.client_privacy is not None:  # its noise is made for a random cohort
        population = config.client_privacy.population
        size, what = config.federation.cohort or population, "the expected cohort"
    if secure is not None:  # and to this one the site holds the coordinator (peers.limits_for)
        size, what = secure.minimum, "secure_aggregation.minimum"
    if size < policy.cohort.minimum:
        return f"{what} is {size}, and this site's policy asks for at least {policy.cohort.minimum}"
    return None


def _columns(policy: Policy, config: RunConfig) -> str | None:
    never = [name for name in config.data.columns if name in policy.data.columns_never]
    if never:
        return f"the run reads the column {never[0]!r}, which this site's policy never gives"
    return None


def _rounds(policy: Policy, config: RunConfig) -> str | None:
    rounds, most = config.federation.rounds, policy.limits.max_rounds
    if rounds > most:
        return f"the run has {rounds} rounds, and this site's policy allows {most}"
    return None


CONFIG_RULES: dict[ConfigCode, ConfigRule] = {
    "privacy": _privacy,
    "cohort": _cohort,
    "columns": _columns,
    "rounds": _rounds,
}


def name_of(table: str) -> str:
    """Return the unit of privacy that a table of run.toml promises, in words."""
    return {"privacy": "record-level", "client_privacy": "client-level"}[table]
