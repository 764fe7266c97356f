"""Which run needs no answer of a person: one like a run that a person approved, and no weaker.

    proposal          federation, author and key, contract, roster, what the rule names: equal
    federation.rounds, ε, δ    no more than in that run; or than the rule's own limits
    TUNED             free
    TRAINED           free where noise bounds what leaves the site
    all else          equal, also a field of run.toml that is new and that nobody thought of here
    a secure sum      has to have noise in it, within [privacy] of policy.toml

If two sums from one model have no noise, and one of them leaves a member out, their difference is
what that member learned. A person who approved the first run could not see that; it takes the
second. So a rule approves no run with such sums, whatever it is like.

Every reason may leave the site, as those in rules.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from anabranch.client.policy.approvals import Entry, Outdated
from anabranch.client.policy.policy_file import Policy, Rule
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import ClientPrivacy, Privacy

# A whole table, or one of its fields.
TUNED = frozenset({
    "name", "seed", "server", "release", "federation.early_stopping", "federation.proximal_mu",
    "training.learning_rate", "training.head_learning_rate", "training.schedule", "training.warmup",
})  # fmt: skip
# Small batches, single steps, whole layers and small splits show single records.
TRAINED = frozenset({"training", "lora"})
LIMITED = frozenset({
    "federation.rounds", "privacy.epsilon", "privacy.delta",
    "client_privacy.epsilon", "client_privacy.delta",
})  # fmt: skip
PRIVATE = ("privacy", "client_privacy")
LISTED = 3  # rules in a sentence


def rule_for(policy: Policy, entries: Mapping[str, Entry | Outdated], new: Entry) -> Rule | None:
    """Return the rule that approves a proposal in its owner's place; None if there is none.

    None, too, for a proposal that a person has decided on. `new`: the proposal as it would be
    put before the owner.
    """
    known = entries.get(new.digest)
    if policy.approval.mode != "by rule" or (
        known is not None and known.state in ("approved", "rejected")
    ):
        return None
    return next(
        (r for r in policy.approval.rules if _against(policy, r, entries, new) is None), None
    )


def why_it_waits(policy: Policy, entries: Mapping[str, Entry | Outdated], new: Entry) -> str:
    """Return why no rule approves a proposal; "": there is no rule, or one that does."""
    if policy.approval.mode != "by rule" or rule_for(policy, entries, new) is not None:
        return ""
    found = [(r.name, _against(policy, r, entries, new)) for r in policy.approval.rules[:LISTED]]
    return "; ".join(f"rule {name} does not approve it: {why}" for name, why in found if why)


def ruled(entry: Entry | Outdated) -> bool:
    """Return whether a rule, and no person, let this proposal in."""
    return (entry.was if isinstance(entry, Outdated) else entry.state) == "by rule"


def unlike(policy: Policy, rule: Rule, like: RunConfig, new: RunConfig) -> str | None:
    """Return in what a configuration is other, or weaker, than a rule allows; None: in nothing."""
    bounded = noised(policy, new)
    if new.secure_aggregation is not None and not bounded:
        wanted = policy.privacy
        return (
            f"its sums have no noise of epsilon {wanted.epsilon_max:g} and delta "
            f"{wanted.delta_max:g} or less, so two of them from one model can show what a single "
            "site learned. A person has to approve each such run"
        )
    free = TUNED | LIMITED | (TRAINED if bounded else frozenset())
    if "base" not in rule.same:
        free |= {"model"}
    path = _differs(like, new, free)
    if path is not None:
        return f"{path} is not as in the run that it has to be like"
    return _more_rounds(rule, like, new) or _weaker_noise(rule, like, new)


def noised(policy: Policy, config: RunConfig) -> bool:
    """Return whether noise bounds all that leaves the site, as far as its owner asks for it.

    [client_privacy] alone does not: the coordinator sees what it adds the noise to.
    """
    summed = config.secure_aggregation is not None
    tables = (config.privacy, config.client_privacy if summed else None)
    wanted = policy.privacy
    return any(
        table is not None
        and table.epsilon <= wanted.epsilon_max
        and table.delta is not None
        and table.delta <= wanted.delta_max
        for table in tables
    )


def _against(
    policy: Policy, rule: Rule, entries: Mapping[str, Entry | Outdated], new: Entry
) -> str | None:
    """Return why a rule does not approve a proposal; None: it does."""
    like = entries.get(rule.like)
    if isinstance(like, Outdated):
        return "the run that it has to be like is no longer valid with this version"
    if like is None or like.state != "approved":
        return "the run that it has to be like is not approved"
    if like.key != new.key:
        return "the author's key is another than in the run that it has to be like"
    for name in dict.fromkeys((*rule.same, "federation", "author", "contract", "roster")):
        if getattr(like.proposal, name) != getattr(new.proposal, name):
            return f"{name} is another than in the run that it has to be like"
    if (why := unlike(policy, rule, like.config, new.config)) is not None:
        return why
    let_in = {one.digest for one in entries.values() if one.by == rule.name and ruled(one)}
    if len(let_in | {new.digest}) > rule.max_runs:
        return f"it has approved {rule.max_runs} runs, and allows no more"
    return None


def _differs(like: RunConfig, new: RunConfig, free: frozenset[str]) -> str | None:
    """Return the first table, or field of one, in which two runs differ and may not."""
    for name in new.__struct_fields__:
        before, now = getattr(like, name), getattr(new, name)
        if name in free or before == now:
            continue
        if not isinstance(now, msgspec.Struct) or before is None:
            return name
        for field in now.__struct_fields__:
            path = f"{name}.{field}"
            if path not in free and getattr(before, field) != getattr(now, field):
                return path
    return None if like.method == new.method else "federation.method"  # others decide it, too


def _more_rounds(rule: Rule, like: RunConfig, new: RunConfig) -> str | None:
    most, rounds = rule.max_rounds or like.federation.rounds, new.federation.rounds
    if rounds <= most:
        return None
    return f"federation.rounds is {rounds}, and it allows {most}"


def _weaker_noise(rule: Rule, like: RunConfig, new: RunConfig) -> str | None:
    pairs = [(name, _privacy(like, name), _privacy(new, name)) for name in PRIVATE]
    kept = [(name, before, now) for name, before, now in pairs if before is not None]
    if rule.epsilon_max is not None and not kept:
        return "it has no privacy table, so it spends any epsilon"
    for name, before, now in kept:
        assert now is not None  # _differs: both have the table, or neither
        most = before.epsilon if rule.epsilon_max is None else rule.epsilon_max
        if now.epsilon > most:
            return f"{name}.epsilon is {now.epsilon:g}, and it allows {most:g}"
        if before.delta == now.delta:
            continue
        if before.delta is None:
            return f"{name}.delta is stated, and the run that it has to be like leaves it out"
        if now.delta is None:
            return f"{name}.delta is left out, and the run that it has to be like states it"
        if now.delta > before.delta:
            return f"{name}.delta is larger than in the run that it has to be like"
    return None


def _privacy(config: RunConfig, name: str) -> Privacy | ClientPrivacy | None:
    return config.privacy if name == "privacy" else config.client_privacy
