"""What a site refuses before it trains, whoever asks; what its owner allows is asked before."""

from __future__ import annotations

from pathlib import Path

from anabranch.client import personal
from anabranch.client.site_file import Budget
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, PrivacyError, ProtocolError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.spec import AdapterSpec
from anabranch.storage.files import write_atomic


def require_within_budget(budget: Budget | None, config: RunConfig) -> None:
    """Refuse a run without [privacy] where the owner has set a budget: it costs any ε."""
    if budget is not None and config.privacy is None:
        raise PrivacyError(
            f"the run has no [privacy], and the [budget] of site.toml allows epsilon = "
            f"{budget.epsilon:g} over all runs: nothing is trained. Add [privacy] to run.toml"
        )


def require_one_configuration(folder: Path, assignment: Assignment) -> None:
    """Refuse a run that goes on with another configuration than it began with.

    What a site keeps of a run in its `folder` goes into its later rounds: nothing that was
    trained without noise may get into a round that is accounted for.
    """
    file = folder / "runs" / personal.checked_run(assignment.run)
    digest = assignment.config.digest().encode()
    if not file.exists():
        write_atomic(file, digest)
    elif file.read_bytes() != digest:
        raise ProtocolError(
            f"run {assignment.run} began with another configuration than it is asked to go on "
            "with here: a new configuration is a new run"
        )


def require_part(assignment: Assignment, spec: AdapterSpec, max_rank: int | None) -> None:
    """Refuse a part of more than `max_rank`, or one that holds what stays at the site."""
    part, kept = assignment.part, assignment.config.kept
    if part.whole and kept is None and max_rank is None:
        return  # of any adapter
    part.shapes(spec)  # refuses ranks that are not there, before anything is spent
    rank = personal.trained_rank(spec, part, kept)
    if max_rank is not None and rank > max_rank:
        raise ConfigError(
            f"asked to train rank {rank}, but max_rank = {max_rank} in site.toml: take a "
            "lower lora.rank, a method that gives every site ranks it can train, or raise "
            "max_rank"
        )
    both = set() if kept is None else set(part.names(spec)) & set(kept.names(spec))
    if both:
        raise ProtocolError(f"{min(both)} stays at the site in this run, but was asked for")


def require_evaluated(config: RunConfig) -> None:
    """Refuse to evaluate where the run is private, or asks nobody to."""
    if config.privacy is not None:
        raise PrivacyError(
            "client evaluation would release metrics that [privacy] does not cover: set "
            "federation.client_evaluation = false"
        )
    if not config.federation.client_evaluation:
        raise ProtocolError(
            "the run asks no site to evaluate: federation.client_evaluation = false"
        )
