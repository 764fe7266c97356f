"""What the policy says to one message: pure functions of what is asked, and of what was used.

`decide` asks the rules in this order, and the first that refuses gives the reason:

    who      coordinator, author, run, code     is it one of those whom the owner knows?
    what     config_rules.py                    would the whole run keep the limits?
    owner    rejected, pending                  has a person approved it, or a rule (by_rule.py)?
    used     minutes, bytes, hours              may it go on now?

A rule returns None, or a sentence that may leave the site: it names what the owner allows and
what was asked for, and nothing of the records. A policy that is stricter in any value refuses all
that was refused before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from anabranch.client.policy.approvals import Entry, Outdated
from anabranch.client.policy.by_rule import rule_for, why_it_waits
from anabranch.client.policy.config_rules import CONFIG_RULES, ConfigCode
from anabranch.client.policy.here import Here as Here
from anabranch.client.policy.policy_file import Policy
from anabranch.client.policy.usage import Usage
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import AnabranchError, PolicyError
from anabranch.protocols.identity.proposal import Signed, require_fits

Code = Literal[
    ConfigCode,
    "unsigned", "coordinator", "author", "run", "code",
    "roster",
    "rejected", "pending",
    "minutes", "bytes", "hours",
    "memory", "policy",
]  # fmt: skip
MB = 1_000_000


class NotAllowed(PolicyError):
    """The site's owner does not allow it, or not yet. `code` says which rule, for programs."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One message of a run, and what the decision depends on."""

    run: str
    config: RunConfig
    signed: Signed | None
    here: Here
    now: float  # seconds since 1970, UTC
    usage: Usage
    round: int = 0  # 0: the message is of no round
    trains: bool = False  # it asks for training
    question: str = ""  # if it does: what is asked, as client/question.py names it
    down: int = 0  # bytes that came with it
    entries: Mapping[str, Entry | Outdated] = field(
        default_factory=dict
    )  # proposal digest -> answer


def decide(policy: Policy, asked: Asked) -> NotAllowed | None:
    """Return why a message is refused; None: it is allowed."""
    if asked.signed is None:
        return NotAllowed(
            "unsigned", f"run {asked.run[:60]!r}: no signed proposal came with the message"
        )
    for code, refuse in _WHO.items():
        if (sentence := refuse(policy, asked, asked.signed)) is not None:
            return NotAllowed(code, sentence)
    for code, forbid in CONFIG_RULES.items():
        if (sentence := forbid(policy, asked.config)) is not None:
            return NotAllowed(code, sentence)
    return _owner(policy, asked, asked.signed) or _used(policy, asked)


# who


def _coordinator(policy: Policy, asked: Asked, signed: Signed) -> str | None:
    here, proposal = asked.here, signed.proposal
    if here.authority not in policy.coordinators:
        return (
            f"this site's policy does not list the authority {here.authority[:16]}… of federation "
            f"{here.federation} among its coordinators"
        )
    if proposal.federation != here.federation:
        return f"the run is of federation {proposal.federation}, and this is {here.federation}"
    return None


def _author(policy: Policy, asked: Asked, signed: Signed) -> str | None:
    author = signed.proposal.author
    key = policy.authors.get(author)
    if key is None:
        return f"{author} is not among the authors whose runs this site takes"
    if key != signed.key:
        return f"the run is signed with another key than the one this site has of {author}"
    return _kept(signed.verified)


def _run(policy: Policy, asked: Asked, signed: Signed) -> str | None:
    return _kept(lambda: require_fits(signed.proposal, asked.run, asked.config))


def _code(policy: Policy, asked: Asked, signed: Signed) -> str | None:
    proposal, here = signed.proposal, asked.here
    if proposal.code == here.code:
        return None
    return (
        f"the run was proposed for version {proposal.version} (code {proposal.code[:12]}), and "
        f"this site has version {here.version} (code {here.code[:12]}): update the older one, or "
        "ask the author to propose the run again"
    )


def _kept(check: Callable[[], object]) -> str | None:
    try:
        check()
    except AnabranchError as error:
        return str(error)
    return None


_WHO: dict[Code, Callable[[Policy, Asked, Signed], str | None]] = {
    "coordinator": _coordinator,
    "author": _author,
    "run": _run,
    "code": _code,
}


# owner


def _owner(policy: Policy, asked: Asked, signed: Signed) -> NotAllowed | None:
    proposal = signed.proposal
    known = asked.entries.get(proposal.digest)
    state = None if known is None else known.state
    short = proposal.digest[:12]
    if state == "rejected":
        return NotAllowed("rejected", f"the owner of this site rejected this run ({short})")
    new = as_entry(asked, signed)
    if state == "approved" or rule_for(policy, asked.entries, new) is not None:
        return None
    why = why_it_waits(policy, asked.entries, new)
    return NotAllowed(
        "pending",
        f"waiting for the owner: `anabranch site policy approve {short}`{why and f' ({why})'}",
    )


def as_entry(asked: Asked, signed: Signed) -> Entry:
    """Return a proposal as it would be put before the owner."""
    return Entry(
        proposal=signed.proposal,
        key=signed.key,
        config=asked.config,
        state="pending",
        first_seen=asked.now,
    )


# used


def _used(policy: Policy, asked: Asked) -> NotAllowed | None:
    return (
        _rounds_used(policy, asked)
        or _minutes(policy, asked)
        or _bytes(policy, asked)
        or (_hours(policy, asked))
    )


def _rounds_used(policy: Policy, asked: Asked) -> NotAllowed | None:
    planned, most = asked.config.federation.rounds, policy.limits.max_rounds
    if asked.round > planned:
        return NotAllowed("rounds", f"round {asked.round} of a run that has {planned}")
    new = asked.trains and asked.question not in asked.usage.round(asked.round).questions
    if new and asked.usage.trained >= most:
        return NotAllowed("rounds", f"this site has trained {most} rounds of this run: its limit")
    return None


def _minutes(policy: Policy, asked: Asked) -> NotAllowed | None:
    left = seconds_left(policy, asked.usage, asked.round)
    if left > 0:
        return None
    return NotAllowed("minutes", f"this site has no time left for {_spent(policy, asked)}")


def _spent(policy: Policy, asked: Asked) -> str:
    limits = policy.limits
    if asked.usage.total.seconds >= limits.max_minutes_total * 60:
        return f"this run, which may take {limits.max_minutes_total:g} minutes"
    return f"round {asked.round}, which may take {limits.max_minutes_per_round:g} minutes"


def seconds_left(policy: Policy, usage: Usage, number: int) -> float:
    """Return how many seconds a round may still take; 0 or less: none."""
    limits = policy.limits
    of_round = limits.max_minutes_per_round * 60 - usage.round(number).seconds
    return min(of_round, limits.max_minutes_total * 60 - usage.total.seconds)


def _bytes(policy: Policy, asked: Asked) -> NotAllowed | None:
    return over_bytes(policy, asked.usage, asked.round, down=asked.down, up=0)


def over_bytes(
    policy: Policy, usage: Usage, number: int, *, down: int, up: int
) -> NotAllowed | None:
    """Return the refusal of a message that brings or takes so many bytes more; None: it may."""
    limits, one, all_ = policy.limits, usage.round(number), usage.total
    for what, bytes_, most in (
        ("received in one round", one.down + down, limits.max_mb_down_per_round),
        ("received in one run", all_.down + down, limits.max_mb_down_total),
        ("sent in one round", one.up + up, limits.max_mb_up_per_round),
        ("sent in one run", all_.up + up, limits.max_mb_up_total),
    ):
        if bytes_ > most * MB:
            return NotAllowed(
                "bytes",
                f"{bytes_ / MB:.3g} MB would be {what}, and this site's policy allows {most:g}",
            )
    return None


def _hours(policy: Policy, asked: Asked) -> NotAllowed | None:
    hours = policy.opening
    if hours.open_at(asked.now):
        return None
    opens = hours.opens(asked.now)
    return NotAllowed(
        "hours",
        f"outside the hours of this site; they begin {opens:%a %Y-%m-%d %H:%M} ({hours.zone.key})",
    )
