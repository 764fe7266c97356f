"""What the owner of a site sees: the policy, the runs that wait, and a run held against the policy.

Reads files of the site's folder; asks nobody, changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import msgspec

from anabranch.client.policy.approvals import Approvals, Entry, Outdated
from anabranch.client.policy.by_rule import unlike, why_it_waits
from anabranch.client.policy.config_rules import CONFIG_RULES
from anabranch.client.policy.peers import Verdict, day, seen
from anabranch.client.policy.policy_file import Policy, read_policy
from anabranch.client.policy.usage import UsageBook
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PolicyError


@dataclass(frozen=True, kw_only=True)
class Line:
    """One thing that was looked at."""

    what: str
    ok: bool | None  # None: it is known only when the run is proposed
    sentence: str


def policy_values(policy: Policy) -> dict[str, Any]:
    """Return every value that is in force, also those that the file leaves out."""
    values: dict[str, Any] = msgspec.to_builtins(policy)
    return values


def policy_text(policy: Policy) -> str:
    """Return the same for people, one value a line."""
    lines = []
    for name, value in policy_values(policy).items():
        table = value if isinstance(value, dict) else {"": value}
        lines += [f"{name}{'.' if one else ''}{one} = {_word(v)}" for one, v in table.items()]
    return "\n".join(lines)


def entry_values(entry: Entry | Outdated) -> dict[str, Any]:
    """Return an entry for --json."""
    no_more = {"was": entry.was, "invalid": entry.why} if isinstance(entry, Outdated) else {}
    return no_more | {
        "digest": entry.digest,
        "state": entry.state,
        "first_seen": _when(entry.first_seen),
        "decided": None if entry.decided is None else _when(entry.decided),
        "by": entry.by,
        "reason": entry.reason,
        "proposal": msgspec.to_builtins(entry.proposal),
    }


def roster_values(folder: Path, entry: Entry | Outdated) -> list[dict[str, Any]] | None:
    """Return who is on an entry's roster, for --json; None: it has none, or it has not come."""
    if entry.roster is None:
        return None
    return [
        {
            "name": one.name,
            "key": one.key,
            "fingerprint": one.fingerprint,
            "verdict": one.verdict,
            "since": None if one.pin is None else _when(one.pin.since),
        }
        for one in seen(folder, entry.roster)
    ]


def roster_text(folder: Path, entry: Entry) -> str:
    """Return among whom a run sums, and what this site knows of each; "": it sums nothing."""
    if entry.proposal.roster is None:
        return ""
    if entry.roster is None:
        return "roster      NOT HERE YET: it comes with the next question of the run"
    peers = seen(folder, entry.roster)
    count = {word: sum(one.verdict == word for one in peers) for word in get_args(Verdict)}
    said = ", ".join(f"{number} {word}" for word, number in count.items() if number)
    width = max(len(one.name) for one in peers) if peers else 0
    lines = [f"{'roster':<11} {len(peers)} sites: {said}"]
    for one in peers:
        since = f" since {day(one.pin.since)}" if one.verdict == "pinned" and one.pin else ""
        lines.append(f"{'':<11} {one.name:<{width}}  {one.fingerprint}  {one.verdict}{since}")
    return "\n".join(lines)


def waits_text(folder: Path, entry: Entry) -> str:
    """Return why no rule approves a run that waits; "": it does not wait, or there is no rule."""
    if entry.state != "pending":
        return ""
    try:
        why = why_it_waits(read_policy(folder), Approvals(folder).entries(), entry)
    except PolicyError as error:  # an owner whose policy cannot be read may still reject
        why = str(error)
    return f"{'waits':<11} {why}" if why else ""


def entry_text(entry: Entry) -> str:
    """Return what is approved: who asks for it, what of whom, and what it would cost."""
    proposal, config = entry.proposal, entry.config
    columns = ", ".join(f"{name} ({column.type})" for name, column in config.data.columns.items())
    rows = {
        "proposal": entry.digest,
        "state": entry.state if not entry.by else f"{entry.state}, {entry.by}",
        "run": f"{proposal.run} of federation {proposal.federation}",
        "author": f"{proposal.author}, key {entry.key[:16]}…",
        "first seen": _when(entry.first_seen),
        "software": f"version {proposal.version}, code {proposal.code[:16]}…",
        "task": f"{config.task.kind}: {', '.join(config.task.labels[:10])}",
        "reads": columns,
        "base model": proposal.base,
        "rounds": f"{config.federation.rounds}, at least {config.federation.quorum} sites in each",
        "method": config.method,
        "privacy": _promise(config),
        "sums": _sums(config),
    }
    return "\n".join(f"{name:<11} {value}" for name, value in rows.items())


def check_run(folder: Path, config: RunConfig, author: str | None = None) -> list[Line]:
    """Return, line by line, whether the site's policy would allow a run of this configuration.

    Raises PolicyError if policy or approvals cannot be read: then nothing is allowed.
    """
    policy = read_policy(folder)
    lines = [_author(policy, author)]
    for code, rule in CONFIG_RULES.items():
        sentence = rule(policy, config)
        lines.append(Line(what=code, ok=sentence is None, sentence=sentence or _kept(code, config)))
    lines.append(_approval(policy, Approvals(folder).entries(), config))
    hours, now = policy.opening, time.time()
    is_open = hours.open_at(now)
    sentence = "open now" if is_open else f"closed now; they begin {hours.opens(now):%a %H:%M}"
    return [*lines, Line(what="hours", ok=None if hours.windows else True, sentence=sentence)]


def used(folder: Path, run: str) -> str:
    """Return what a run has had of the site so far, in words."""
    usage = UsageBook(folder).read(run)
    total = usage.total
    return (
        f"{usage.trained} rounds, {total.seconds / 60:.1f} minutes, "
        f"{total.down / 1e6:.1f} MB received, {total.up / 1e6:.1f} MB sent"
    )


def _author(policy: Policy, author: str | None) -> Line:
    if author is None:
        known = ", ".join(sorted(policy.authors)) or "nobody"
        return Line(what="author", ok=None, sentence=f"runs are taken of: {known}")
    ok = author in policy.authors
    return Line(
        what="author",
        ok=ok,
        sentence=f"{author} is {'' if ok else 'not '}among the authors whose runs this site takes",
    )


def _approval(policy: Policy, entries: Mapping[str, Entry | Outdated], config: RunConfig) -> Line:
    same = [e for e in entries.values() if e.proposal.config == config.digest()]
    said = ", ".join(f"{e.digest[:12]} is {e.state}" for e in same)
    if not same:
        said = "no run of this configuration has been proposed"
    for rule in policy.approval.rules:
        like = entries.get(rule.like)
        if isinstance(like, Entry) and like.state == "approved":
            why = unlike(policy, rule, like.config, config)
            said += f"; rule {rule.name}: {why or 'may approve it'}"
    return Line(what="approval", ok=None, sentence=f"{policy.approval.mode}; {said}")


def _kept(code: str, config: RunConfig) -> str:
    return {
        "privacy": _promise(config),
        "cohort": f"at least {config.federation.quorum} sites in a round; {_sums(config)}",
        "columns": ", ".join(config.data.columns),
        "rounds": f"{config.federation.rounds} rounds",
    }[code]


def _promise(config: RunConfig) -> str:
    words = {"record-level": config.privacy, "client-level": config.client_privacy}
    said = [
        f"{unit} epsilon {table.epsilon:g}, delta "
        f"{'not stated' if table.delta is None else f'{table.delta:g}'}"
        for unit, table in words.items()
        if table is not None
    ]
    together = config.client_privacy is not None and config.secure_aggregation is not None
    if together or (config.privacy is not None and config.privacy.noise == "distributed"):
        said.append("the members of a sum make the noise together: it is not against all of them")
    return "; ".join(said) or "NONE: what the site sends can tell about single records"


def _sums(config: RunConfig) -> str:
    secure = config.secure_aggregation
    if secure is None:
        return "none: the coordinator sees what each site sends"
    said = (
        f"of at least {secure.minimum} sites, opened if more than {secure.threshold:.0%} agree; "
        "the coordinator sees no single update"
    )
    if config.privacy is None and config.client_privacy is None:
        said += (
            ", but two runs like it, with other sites in the sum, can show one: they have no noise"
        )
    return said


def _when(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds")


def _word(value: object) -> str:
    match value:
        case None:
            return "any"
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case dict():
            return "{" + ", ".join(f"{name} = {_word(one)}" for name, one in value.items()) + "}"
        case list() | tuple():
            return f"[{', '.join(_word(one) for one in value)}]"
        case _:
            return f"{value}"
