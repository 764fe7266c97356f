"""What errors say of a round that has too few sites: who is there, and what each other one said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from anabranch.server.flower import Failure, Question

MOST_LINES = 10  # of sites, in the text of an error


def too_few(
    number: int, quorum: int, here: Mapping[str, object], problems: list[str], waited: float
) -> str:
    """Return what to say when too few sites are connected."""
    return (
        f"round {number}: {quorum} sites are needed, after {waited:.6g} s there are "
        f"{len(here)}{listed(here)}; start the missing clients, or lower federation.quorum (and "
        "secure_aggregation.minimum, in a run that has it)" + lines(problems)
    )


def below_quorum(question: Question[Any], need: int) -> str:
    """Return what to say of a round that has fewer deltas than it needs."""
    return (
        f"round {question.round}: {len(question.reports)} of {len(question.peers)} sites sent "
        f"a delta that counts{listed(question.reports)}, {need} are needed"
        + lines(failures(question.failed))
    )


def failures(failed: Mapping[str, Failure]) -> list[str]:
    """Return one line for each site that failed."""
    return [f"{name}: {one.reason}: {one.message}" for name, one in failed.items()]


def listed(names: Iterable[str]) -> str:
    """Return names in brackets, as many as one reads; "" for none."""
    ordered = sorted(names)
    return f" ({', '.join(_first(ordered))})" if ordered else ""


def lines(found: list[str]) -> str:
    """Return lines to follow a sentence, as many as one reads."""
    return "".join(f"\n  {line}" for line in _first(sorted(found)))


def _first(found: list[str]) -> list[str]:
    """Return as many as one reads, and how many more there are."""
    more = len(found) - MOST_LINES
    return found if more <= 0 else [*found[:MOST_LINES], f"and {more} more"]
