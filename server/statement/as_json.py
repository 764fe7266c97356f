"""A privacy statement as JSON: what summary.json holds under "privacy"."""

from __future__ import annotations

from typing import Any

from anabranch.server.statement import sums as of_sums
from anabranch.server.statement import together as words
from anabranch.server.statement.guarantees import PrivacyStatement, RecordLevel, SiteGuarantee
from anabranch.server.statement.text import limits, paragraphs


def as_json(statement: PrivacyStatement) -> dict[str, Any]:
    """Return what summary.json holds under "privacy"; a guarantee that is absent is None."""
    record = None if statement.record is None else _record_json(statement.record)
    if record is not None and statement.of_records is not None:
        record |= words.as_json(statement.of_records, shared=True)
    client = None if statement.client is None else _client_json(statement)
    if statement.of_clients is not None:
        client = words.as_json(statement.of_clients)
    sums = statement.sums
    return {
        "record_level": record,
        "client_level": client,
        "secure_aggregation": None if sums is None else of_sums.as_json(sums),
        "releases": [
            {"what": one.what, "status": one.status, "why": one.why}
            for one in statement.disclosures
        ],
        "limits": list(limits(statement)),
        "statement": "\n\n".join(paragraphs(statement)),
    }


def _record_json(record: RecordLevel) -> dict[str, Any]:
    return {
        "unit": "one record of one site",
        "neighbours": "one record added or removed",
        "against": "the coordinator and everyone who sees what it publishes",
        "rounds": record.rounds,
        "target_epsilon": record.target,
        "epsilon": record.epsilon,
        "delta": record.delta,  # None: 1 / (10 n) of each site
        "composition": "parallel over sites: every record at one site alone",
        "accountant": "PRV",
        "sampling": "Poisson",
        "clipping": record.clipping,
        "clipping_norm": record.clipping_norm,
        "target_quantile": record.target_quantile if record.clipping == "adaptive" else None,
        "sites": {one.spent.site: _site_json(one) for one in record.sites},
    }


def _site_json(one: SiteGuarantee) -> dict[str, Any]:
    spent = one.spent
    return {
        "epsilon": spent.epsilon,
        "epsilon_this_run": one.epsilon_run,
        "delta": spent.delta,
        "noise_multiplier": spent.noise_multiplier,
        "sample_rate": spent.sample_rate,
        "steps": spent.steps,
        "engine": spent.engine,
        "ledger": spent.ledger,
        "rounds_not_in_epsilon": spent.unheard,
        "groups": {str(size): epsilon for size, epsilon in one.groups.items()},
    }


def _client_json(statement: PrivacyStatement) -> dict[str, Any]:
    plan = statement.client
    assert plan is not None  # as_json asks only then
    return {
        "unit": "one client with all its records",
        "neighbours": "one client added or removed",
        "against": "everyone who sees the published models; not the coordinator",
        "rounds": plan.rounds,
        "target_epsilon": statement.client_target,
        "epsilon": plan.epsilon,
        "delta": plan.delta,
        "accountant": "PRV",
        "sampling": "Poisson",
        "population": plan.population,
        "sample_rate": plan.sample_rate,
        "noise_multiplier": plan.noise_multiplier,
        "clipping": "adaptive" if plan.adaptive else "fixed",
        "clipping_norm": plan.clipping_norm,
        "target_quantile": plan.target_quantile if plan.adaptive else None,
        "max_examples": plan.max_examples,
    }
