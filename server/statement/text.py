"""A privacy statement in words and as rows of tables: the same for card, page and summary.

Written for whoever signs it: a number comes with its unit and what it means, and a guarantee
with whom it protects against whom.
"""

from __future__ import annotations

from anabranch.server.aggregation.private import ClientPlan
from anabranch.server.statement import sums as of_sums
from anabranch.server.statement import together as words
from anabranch.server.statement.disclosures import (
    FLOATING,
    LIMITS,
    OTHER_MEMBERS,
    OTHER_SOFTWARE,
    SUMMED,
)
from anabranch.server.statement.guarantees import (
    GROUPS,
    PrivacyStatement,
    RecordLevel,
    SiteGuarantee,
    SitePrivacy,
    guess,
)
from anabranch.server.statement.numbers import LEGEND as LEGEND
from anabranch.server.statement.numbers import percent, small, upper

NONE = (
    "There is no differential privacy: this model was trained on the records as they are. It may "
    "have memorised some of them; treat it as you treat the records."
)
NO_RECORD_LEVEL = (
    "Record level: none. Sites sent what they learned without noise, and the coordinator saw each "
    "update as it is."
)
NO_RECORD_LEVEL_IN_SUMS = (
    "Record level: none. Sites trained without noise for single records; the coordinator saw sums "
    "of updates, and no update."
)
NO_CLIENT_LEVEL = (
    "Client level: none. That a site took part, and what its records have in common, is not hidden."
)
APART = (
    "Both guarantees hold at once. They are two statements about the same run: each has its own "
    "ε and δ, and they are not to be added or compared."
)
SITE_HEAD = ("site", "ε, all runs", "ε, this run", "δ", "σ", "q", "steps", "engine", "ledger head")
GROUP_HEAD = ("site", *(f"{size} records" for size in GROUPS))
DISCLOSURE_HEAD = ("what", "status", "why")
ABSENT = "\u2013"  # as on the page
SHOWN_HEX = 16
LARGEST_DELTA = 0.1  # 1 / (10 n) at n = 1


def paragraphs(statement: PrivacyStatement) -> list[str]:
    """Return the whole statement as paragraphs of plain text, without its tables."""
    if not statement.private:
        return [NONE, *sums_paragraphs(statement)]
    found = record_paragraphs(statement) + client_paragraphs(statement)
    return [*found, *sums_paragraphs(statement), *([APART] if statement.both else [])]


def sums_paragraphs(statement: PrivacyStatement) -> list[str]:
    """Return what the coordinator saw instead of updates; [] without secure aggregation."""
    return [] if statement.sums is None else of_sums.paragraphs(statement.sums)


def record_paragraphs(statement: PrivacyStatement) -> list[str]:
    """Return the record-level guarantee, or that there is none."""
    record, together = statement.record, statement.of_records
    if record is None:
        return [NO_RECORD_LEVEL if statement.sums is None else NO_RECORD_LEVEL_IN_SUMS]
    promise = (
        "Record level: one record of a site. For every site k, the sequence of all messages that "
        f"it sent in rounds 1 to {record.rounds} is (ε_k, δ_k)-differentially private with respect "
        "to adding or removing one record of its training set, against the coordinator and "
        "everyone who sees what it publishes. What a message holds beside the trained values is "
        "marked below as charged, fixed in advance or not covered."
    )
    mechanism = (
        f"Mechanism: DP-SGD. Each step draws a Poisson sample of the records, {_clipping(record)}, "
        "and adds Gaussian noise of standard deviation σ·C to the sum. Accountant: PRV (Gopi, Lee, "
        "Wutschitz 2021), its upper bound."
    )
    if together is not None:
        promise = words.record_text(together, record.rounds)
        mechanism = words.record_mechanism(record.clipping_norm)
    delta = LARGEST_DELTA if record.delta is None else record.delta
    means = _means(record.epsilon, delta, "one record was in a training set")
    patient = (
        "One patient: the unit is one record (g = 1). Whoever has g records at a site is protected "
        "less: (ε, δ) for one record is (g·ε, g·e^((g−1)·ε)·δ) for g."
    )
    if not record.sites:
        return [promise, means, _enforced(record, statement), patient, mechanism]
    sizes = " and ".join(str(size) for size in GROUPS)
    largest = (
        f"Target of this run: ε = {record.target:g} per site. Largest over all sites, all runs: "
        f"ε = {upper(record.epsilon)}, δ = {small(delta)}. It holds for every record that is at "
        "one site alone (parallel composition); for a record at several sites, their ε add up. A "
        "site whose deltas never counted is not listed; its ledger has what it spent."
    )
    if together is not None:
        found = [promise, means, largest, *_unheard(record), patient, mechanism]
        return [*found, words.how(together), words.CHARGED]
    patient += (
        f" For {sizes} records and this run alone, the table has closer bounds at the same δ."
    )
    return [promise, means, largest, *_unheard(record), patient, mechanism]


def _unheard(record: RecordLevel) -> list[str]:
    """Return whose ε lacks rounds that its site may have trained and sent; [] if nobody's."""
    late = [one.spent for one in record.sites if one.spent.unheard]
    if not late:
        return []
    listed = ", ".join(f"{one.site} ({one.unheard})" for one in late)
    return [
        "Not in these ε: rounds after a site's last delta that counted, in which it was asked and "
        f"no delta counted, by site: {listed}. It may have trained in them, and sent what came too "
        "late or was rejected. For these sites the guarantee covers the messages up to that delta; "
        "their ledgers have what all messages cost."
    ]


def _enforced(record: RecordLevel, statement: PrivacyStatement) -> str:
    """Return what holds where sites are not listed."""
    why = "because the client-level guarantee hides who took part"
    if statement.of_clients is not None:  # that guarantee does not, and is none against a list
        why = "as no client of a run with client-level privacy is"
    delta = "δ = 1/(10 n) of a site with n training records"
    if record.target_delta is not None:
        delta = f"δ = {small(record.target_delta)}"
    return (
        f"In this run ε_k is at most {record.target:g} at {delta}: each site computes its σ and q "
        "before it trains and refuses the round that would exceed it. Sites are not listed here, "
        f"{why}; the numbers of each, with the ε "
        "of its earlier runs, are in its own ledger."
    )


def client_paragraphs(statement: PrivacyStatement) -> list[str]:
    """Return the client-level guarantee, or that there is none."""
    plan, together = statement.client, statement.of_clients
    if together is not None:
        noise = together.noise
        means = _means(noise.epsilon, noise.delta, "one client's updates were zeros")
        told = words.client_text(together, statement.rounds)
        target = _target(statement)
        return [told, means, *target, words.how(together), words.CHARGED]
    if plan is None:
        return [NO_CLIENT_LEVEL]
    return [
        f"Client level: one client with all its records. The sequence of models that the "
        f"coordinator publishes in rounds 1 to {plan.rounds} is (ε_u, δ_u)-differentially private "
        f"with ε_u = {upper(plan.epsilon)} and δ_u = {small(plan.delta)}, with respect to "
        "adding or removing one client with all its records, against everyone who sees the "
        "published models, other clients included. It does not hold against the coordinator, "
        "which sees each client's update and draws the noise, nor against whoever sees which "
        "clients are drawn.",
        _means(plan.epsilon, plan.delta, "one client took part"),
        f"Mechanism: in each round, each of N = {plan.population} clients is drawn with chance "
        f"q = {plan.sample_rate:.6g}, independently (Poisson sampling). {_bound(plan)} "
        f"T = {plan.rounds} rounds. Accountant: PRV (Gopi, Lee, Wutschitz 2021), its upper bound.",
        *_target(statement),
    ]


def _target(statement: PrivacyStatement) -> list[str]:
    target = statement.client_target
    return [] if target is None else [f"Target of this run: ε_u = {target:g} for the whole run."]


def site_rows(statement: PrivacyStatement) -> list[list[str]]:
    """Return the cells under SITE_HEAD, one row per site; [] if none is listed."""
    record = statement.record
    return [] if record is None else [_site_row(one) for one in record.sites]


def group_rows(statement: PrivacyStatement) -> list[list[str]]:
    """Return the cells under GROUP_HEAD, of the sites whose costs were computed."""
    record = statement.record
    return [
        [one.spent.site, *(_group(one.groups[size]) for size in GROUPS)]
        for one in (() if record is None else record.sites)
        if one.groups
    ]


def group_note(statement: PrivacyStatement) -> str:
    """Return which sites the group table leaves out; "" if none."""
    record = statement.record
    if record is None or all(one.groups for one in record.sites):
        return ""
    shown = sum(1 for one in record.sites if one.groups)
    return f"For the {shown} of {len(record.sites)} sites with the largest ε of this run."


def disclosure_rows(statement: PrivacyStatement) -> list[list[str]]:
    """Return the cells under DISCLOSURE_HEAD."""
    return [[one.what, one.status, one.why] for one in statement.disclosures]


def limits(statement: PrivacyStatement) -> tuple[str, ...]:
    """Return what no guarantee of this run covers, beside what is marked so; () without any."""
    if not statement.private:
        return ()
    record, together = statement.record, statement.together
    gaussian = together is None or (record is not None and statement.of_records is None)
    found = [FLOATING] if gaussian else [SUMMED] if record is not None else []
    return *found, *LIMITS, OTHER_SOFTWARE if together is None else OTHER_MEMBERS


def _means(epsilon: float, delta: float, question: str) -> str:
    """Return what (ε, δ) bounds, in words that need no mathematics."""
    return (
        f"In words: somebody who sees all of that and guesses whether {question}, with even odds "
        f"before, is right at most {percent(guess(epsilon, delta))} of the time (a coin is right "
        "50 %)."
    )


def _clipping(record: RecordLevel) -> str:
    norm = f"C = {record.clipping_norm:g}"
    match record.clipping:
        case "flat":
            return f"clips each record's gradient to ℓ2 norm {norm} (flat)"
        case "automatic":
            return f"scales each record's gradient to an ℓ2 norm below {norm} (automatic, AUTO-S)"
        case "per-layer":
            return (
                f"clips each record's gradient tensor by tensor, to C/√L for L tensors, {norm} in "
                "all (per-layer)"
            )
        case "adaptive":
            return (
                f"clips each record's gradient to ℓ2 norm C, which starts at {norm} and follows "
                f"the {record.target_quantile:g}-quantile of the norms (adaptive)"
            )


def _bound(plan: ClientPlan) -> str:
    """Return how an update is clipped and weighed, and what noise the sum gets."""
    norm, count = f"S = {plan.clipping_norm:g}", ""
    noise = f"z·S, z = {plan.noise_multiplier:.4f}, is added to the sum"
    if plan.share_noise is not None:
        norm = (
            f"S, which starts at {plan.clipping_norm:g} and follows the "
            f"{plan.target_quantile:g}-quantile of the updates' norms (adaptive),"
        )
        noise = f"{plan.update_noise:.4f}·S is added to the sum"
        count = (
            f", and of standard deviation {plan.share_noise:.4f} to the count of norms within S; "
            f"together they cost what z = {plan.noise_multiplier:.4f} costs alone"
        )
    weight = "all weigh the same"
    if plan.max_examples is not None:
        weight = f"it weighs min(n / {plan.max_examples}, 1) for n records, at most 1"
    return (
        f"Its whole update is clipped to ℓ2 norm {norm} and {weight}. Gaussian noise of standard "
        f"deviation {noise}{count}."
    )


def _site_row(one: SiteGuarantee) -> list[str]:
    spent = one.spent
    return [
        spent.site,
        upper(spent.epsilon),
        upper(one.epsilon_run),
        small(spent.delta),
        f"{spent.noise_multiplier:.4f}",
        f"{spent.sample_rate:.6f}",
        str(spent.steps),
        spent.engine or ABSENT,
        _head(spent),
    ]


def _head(spent: SitePrivacy) -> str:
    head = spent.ledger
    if head is None:
        return ABSENT
    if not set(head) <= set("0123456789abcdef"):
        return "no hash"  # a site may say anything here
    return head if len(head) <= SHOWN_HEX else f"{head[:SHOWN_HEX]}…"


def _group(epsilon: float | None) -> str:
    return "no useful bound" if epsilon is None else f"ε = {upper(epsilon, 2)}"
