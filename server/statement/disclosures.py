"""Everything that leaves a site or is published beside the deltas, and how it stands to privacy.

    charged           a function of noised values alone, or part of the noise: costs nothing more
    fixed in advance  decided by the configuration, before any record was read
    not covered       no guarantee of this run holds for it
    not sent          it does not leave

A pure function of the configuration: what a run sends follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import SecureAggregation

Status = Literal["charged", "fixed in advance", "not covered", "not sent"]

CHARGED: Status = "charged"
FIXED: Status = "fixed in advance"
OPEN: Status = "not covered"
NOT_SENT: Status = "not sent"
_ORDER = (OPEN, CHARGED, FIXED, NOT_SENT)

FLOATING = (
    "attacks on the low bits of floating-point noise: the key stream is cryptographically secure, "
    "the Gaussian is computed and added in floating point"
)
SUMMED = (
    "the rounding of a site's sum of clipped gradients, in floating point, beyond the one percent "
    "of the bound that is kept for it; the noise itself is of whole numbers"
)
OTHER_SOFTWARE = "parties that run other software than they say: a site can break its own guarantee"
OTHER_MEMBERS = (
    "parties that run other software than they say: members that add no noise count as colluding, "
    "and more of them than are assumed make the guarantee of all weaker; nobody can check it"
)
LIMITS = (
    "the records that the base model was trained on before this run",
    "the choice of this configuration, if it was searched on the same records",
    "what is kept at the sites: files in a site's folder are protected by the site alone",
    "audit.json, if somebody audits the run: its membership figures are computed from records "
    "without noise",
)


@dataclass(frozen=True, kw_only=True)
class Disclosure:
    """One thing that leaves or is published (or could be thought to), and its status."""

    what: str
    status: Status
    why: str


def disclosures(config: RunConfig, *, simulated: bool = False) -> tuple[Disclosure, ...]:
    """Return one row per thing, what is not covered first; () without any privacy.

    With both guarantees, a row says what holds for one record; what differs for one client is
    in its `why`. `simulated`: the coordinator had the sites' records.
    """
    if config.privacy is None and config.client_privacy is None:
        return ()
    rows = [*_before(config), *_from_sites(config), *_published(config)]
    if config.client_privacy is not None:
        rows += _of_clients(config)
    if simulated:
        rows.append(
            _row(
                "figures that only a simulation can show: records per label, accuracy per site, "
                "other ways of training on the same records",
                OPEN,
                "computed from the sites' records, which a coordinator does not have",
            )
        )
    return tuple(sorted(rows, key=lambda row: _ORDER.index(row.status)))


def clients_evaluate(config: RunConfig) -> bool:
    """Return whether sites are asked for metrics of their held-out records."""
    asked = config.federation.client_evaluation and config.training.holdout > 0
    return asked and config.privacy is None and config.client_privacy is None


def noised_by_members(config: RunConfig) -> bool:
    """Return whether the members of secure sums make the privacy noise together."""
    if config.secure_aggregation is None:
        return False
    distributed = config.privacy is not None and config.privacy.noise == "distributed"
    return distributed or config.client_privacy is not None


def _row(what: str, status: Status, why: str) -> Disclosure:
    return Disclosure(what=what, status=status, why=why)


def _before(config: RunConfig) -> list[Disclosure]:
    """What is decided, or said, before the first round."""
    searched = "in run.toml; not covered if somebody computed it from the sites' records"
    rows = [
        _row("labels, allowed values, bounds and vocabulary", FIXED, searched),
        _class_weights(config),
        _row(
            "number of training and of held-out records of a site",
            OPEN,
            f"told before round 1{_told_again(config)}{_use_of_counts(config)}",
        ),
        _row("highest LoRA rank that a site trains", FIXED, "its machine's, in site.toml"),
    ]
    numbers = [n for n, column in config.data.columns.items() if column.type == "number"]
    if numbers:
        rows.insert(1, _row(f"normalisation (mean, std) of {', '.join(numbers)}", FIXED, searched))
    return rows


def _told_again(config: RunConfig) -> str:
    if config.secure_aggregation is None:
        return ", and the number of training records with every delta"
    if noised_by_members(config):
        return ", and in no sum"
    return ", and the number of training records again in the sums of a round's members"


def _use_of_counts(config: RunConfig) -> str:
    client, examples = config.client_privacy, config.federation.weighting == "examples"
    if config.secure_aggregation is not None:
        return (
            "; updates are weighted by it inside the sum, and all members are told the largest"
            if examples
            else "; all updates weigh the same"
        )
    if client is None:
        return "; deltas are weighted by it" if examples else "; all deltas weigh the same"
    if client.max_examples is None:
        return "; the mean does not use it, all clients weigh the same"
    return (
        f"; the published models use it only as the weight min(n / {client.max_examples}, 1), "
        "which the noise pays for"
    )


def _class_weights(config: RunConfig) -> Disclosure:
    what, weights = "class weights of the loss", config.training.class_weights
    if weights == "none":
        return _row(what, FIXED, "all 1")
    if weights == "balanced":  # refused with [privacy]
        return _row(what, CHARGED, "computed by each client from its own records, never sent; "
                    "what they change in its update is clipped and noised with it")  # fmt: skip
    return _row(what, FIXED, "one number per label, in run.toml")


def _from_sites(config: RunConfig) -> list[Disclosure]:
    """What a site sends in a round, or when something goes wrong."""
    record = config.privacy is not None
    secure = config.secure_aggregation is not None
    rows = [
        _row(
            "that a site takes part, when, for how long, and how often it fails",
            OPEN,
            "visible to the coordinator and to whoever watches the network"
            + ("; to the coordinator also, at which stage of a sum it is lost" if secure else ""),
        ),
        _row(
            "why a site refuses",
            OPEN,
            "a fixed sentence in a run with [privacy], else columns, rules and row numbers, never "
            "a cell's content; that records break the contract is told without noise",
        ),
    ]
    if record:
        rows += _of_records(config)
    elif secure:
        rows.append(_row("training loss of a site", NOT_SENT, "left out where updates are summed"))
    else:
        rows.append(_row("training loss of a site", OPEN, "with every delta, to the coordinator"))
    if config.secure_aggregation is not None:
        rows += _of_sums(config, config.secure_aggregation)
    rows.append(_client_metrics(config))
    if config.personal.rank or config.kept is not None:
        rows.append(_row("what a site keeps: its private adapter, head or factor", NOT_SENT,
                         "stays in personal/ of its folder; a private adapter is trained "
                         "without noise"))  # fmt: skip
    if config.uplink.codec != "fp32" or config.uplink.error_feedback:
        rows.append(
            _row(
                f"compression of deltas ({config.uplink.codec})",
                CHARGED,
                "works on values that are noised already" if record
                else "undone before updates are clipped and noised",
            )
        )  # fmt: skip
    return rows


def _of_sums(config: RunConfig, secure: SecureAggregation) -> list[Disclosure]:
    """What is seen instead of updates."""
    noised, per = noised_by_members(config), "round" if secure.group is None else "group"
    rows = [
        _row(
            "update of a single site",
            NOT_SENT,
            f"it leaves masked: what can be opened is one sum per {per} of at least "
            f"{secure.minimum} updates, unless more members collude than is assumed",
        ),
        _row(
            "sums of updates",
            CHARGED,
            "they are what the members' noise is made for" if noised else "sums of noised updates",
        ),
    ]
    if noised:
        why = "in a sum every member counts for one, whatever its records"
        return [*rows, _row("records, weights and steps of a sum's members", NOT_SENT, why)]
    return [
        *rows,
        _row(
            "records, weights and steps of a sum's members, summed",
            OPEN,
            "opened with the sum, exact; no single member's",
        ),
        _row(
            "that a value of an update is beyond secure_aggregation.range",
            CHARGED,
            "a function of noised values; the site is then lost at the stage of masks",
        ),
    ]


def _of_records(config: RunConfig) -> list[Disclosure]:
    assert config.privacy is not None  # _from_sites asks only then
    rows = [
        _row(
            "ε, δ, σ, q and the number of steps",
            OPEN,
            "σ, q and δ follow from the configuration and the number of records, ε also from the "
            "site's earlier runs; the steps are fixed in run.toml",
        ),
        _row("engine that computed the gradients", FIXED, "by run.toml and the model's layers"),
        _row(
            "head of the site's ledger",
            OPEN,
            "a hash over the site's book, in which records stand under a secret key of the site",
        ),
        _row("training loss of a site", NOT_SENT, "left out in a run with [privacy]"),
    ]
    if config.training.holdout:
        rows.append(
            _row(
                "which records of a site's file are held out",
                OPEN,
                "the guarantee is for one record of the training set; one more record in the file "
                "can also move others between training and held-out",
            )
        )
    if config.privacy.clipping == "adaptive":
        rows.append(
            _row(
                "clipping norm that follows the gradients' norms",
                CHARGED,
                "it stays at the site; the count of norms within it is noised, and σ states the "
                "noise of both",
            )
        )
    return rows


def _client_metrics(config: RunConfig) -> Disclosure:
    what = "metrics on a site's held-out records"
    if config.privacy is not None:
        return _row(what, NOT_SENT, "a site refuses them in a run with [privacy]")
    if clients_evaluate(config):
        return _row(what, OPEN, "sent after a round; the best round may be chosen by them")
    return _row(what, NOT_SENT, "the coordinator does not ask for them")


def _published(config: RunConfig) -> list[Disclosure]:
    """What the coordinator computes and publishes."""
    noised = "a function of noised deltas" if config.privacy else "a function of noised models"
    if noised_by_members(config):
        noised = "a function of noised sums"
    rows = [
        _row("models of every round, and what is made of them: merged, ONNX, int8", CHARGED,
             f"{noised}; int8 uses no records (weights are rounded, ranges are taken in use)"),
        _row("metrics on the coordinator's own records, each round and of the release", OPEN,
             "for the coordinator's records; for the sites' they cost nothing more, being "
             "functions of published models"),
        _row("choice of the best round", OPEN,
             "by those metrics; without any, it is the last round"),
    ]  # fmt: skip
    if config.federation.early_stopping is not None:
        rows.append(_row("number of rounds", OPEN, "the run stops early by those metrics"))
    if config.privacy is not None and config.client_privacy is None:
        what, why = "norms of deltas and the error of aggregation", "noised deltas"
        if config.secure_aggregation is not None:
            what, why = "norm of what a round changed", "sums; those of single deltas are not seen"
        in_log = f"in the coordinator's log and report; functions of {why}"
        rows.append(_row(what, CHARGED, in_log))
        rows.append(_row("bytes sent", FIXED, "follow from shapes, codec and who took part"))
    return rows


def _of_clients(config: RunConfig) -> list[Disclosure]:
    """What one client's presence shows in, when clients are protected."""
    assert config.client_privacy is not None  # disclosures asks only then
    adaptive = config.client_privacy.clipping == "adaptive"
    size = _row("clipping norm of updates", FIXED, "in run.toml")
    if adaptive:
        size = _row(
            "clipping norm of updates, which follows their norms",
            CHARGED,
            "the share of norms within it is noised; the noise of both is what z states",
        )
    drawn = (
        "the guarantee counts on the draw being secret: cards and reports do not name clients; "
        "whoever sees the draw is not covered"
    )
    logged = "record counts, participation, failures, norms and losses by client"
    if config.secure_aggregation is not None:
        drawn = (
            "seen by the coordinator and by the members of a sum; the guarantee does not count on "
            "it, and does not hide it. Cards and reports do not name clients"
        )
        logged = "record counts as told before round 1, participation and failures by client"
    return [
        size,
        _row("number of clients that may be drawn", FIXED, "in run.toml"),
        _row("who is drawn in which round", OPEN, drawn),
        _row(
            "the coordinator's log, events.jsonl",
            OPEN,
            f"{logged}; not for publication: summary, report and card leave them out",
        ),
    ]
