"""What a run guarantees about privacy, as data: two guarantees that are stated apart.

    record level   (ε_k, δ_k) of what site k sent, for one record of site k
    client level   (ε_u, δ_u) of what is published, for one client with all its records

They are two theorems about the same run and do not add up: each holds by itself, against whom
it names. A guarantee that is absent is None, never a number.

    σ  noise multiplier: standard deviation of the noise over the clipping norm
    q  chance that a record is in one step's batch (Poisson sampling)
    T  noisy steps

Several records of one person, g of them at one site: in every step Bin(g, q) of them are in
the batch, so the step is dominated by Σ_j P[Bin(g, q) = j] · N(j, σ²) against N(0, σ²)
(Schuchardt et al. 2024, arXiv:2403.04867). T such steps are composed by the privacy loss
distribution of `dp_accounting`, rounded upwards.

Over sites: a record that is at one site alone is protected by that site's (ε_k, δ_k), so the
largest holds for all (parallel composition, McSherry 2009). Records at several sites add up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from scipy.stats import binom

from anabranch.client.privacy import LARGEST_EPSILON, Spend, epsilon_of
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.secagg.noise import DistributedNoise
from anabranch.protocols.spend import Unit
from anabranch.protocols.tables import Clipping
from anabranch.server.aggregation.private import ClientPlan
from anabranch.server.statement.disclosures import Disclosure, disclosures, noised_by_members
from anabranch.server.statement.sums import Sums
from anabranch.server.statement.together import Together

GROUPS = (2, 5)  # records of one person whose cost is stated
LISTED = 50  # sites that are named; of a larger simulated population those that spent most
GROUP_SITES = 8  # sites whose group costs are computed: seconds each
LOSS_INTERVAL = 0.02  # of the privacy loss, rounded up: ε is at most some hundredths larger
WEAK = 20.0  # ε beyond which larger groups are not computed: it takes gigabytes, for nothing
TOLERANCE = 0.02  # absolute and relative: two accountings of the same steps may differ by this


@dataclass(frozen=True, kw_only=True)
class SitePrivacy:
    """What one site spent on its records, as it says."""

    site: str
    epsilon: float  # the most that one of its records has spent, over all runs
    delta: float
    noise_multiplier: float  # σ
    sample_rate: float  # q
    steps: int  # noisy steps of this run that counted
    engine: str | None = None  # that computed the clipped gradients; None: the site does not say
    ledger: str | None = None  # head of its hash-chained ledger, hex; None: it does not say
    unheard: int = 0  # later rounds it was asked in, of which no delta counted: not in epsilon


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the coordinator knows about the run behind a release."""

    run: str
    base_name: str  # as in model.base
    rounds: int  # that reached their quorum
    best_round: int
    sites: tuple[str, ...]  # that sent at least one delta which counted
    privacy: tuple[SitePrivacy, ...] = ()  # one per site in a private run
    client: ClientPlan | None = None  # of a run with [client_privacy]
    noise: DistributedNoise | None = None  # that the members of secure sums made together
    simulated: bool = False  # the coordinator had the sites' records: a simulation
    versions: Mapping[str, str] = field(default_factory=dict)  # package -> version


@dataclass(frozen=True, kw_only=True)
class SiteGuarantee:
    """(ε, δ) of one site."""

    spent: SitePrivacy
    epsilon_run: float  # of this run's steps alone, computed from σ, q and steps
    groups: Mapping[int, float | None]  # g -> ε of this run; None: no useful bound


@dataclass(frozen=True, kw_only=True)
class RecordLevel:
    """Every site's guarantee; neighbours differ by one record of one site.

    Sites are not listed where clients are protected, too: a list would tell who took part. What
    holds then is what each site enforces by itself: the target, in this run.
    """

    sites: tuple[SiteGuarantee, ...]  # ascending by name; (): not listed
    rounds: int
    clipping: Clipping
    clipping_norm: float  # C; adaptive: the first one
    target_quantile: float  # adaptive alone
    target: float  # ε that the run may cost each site
    target_delta: float | None  # None: 1 / (10 n) of a site with n training records

    @property
    def epsilon(self) -> float:
        """Return the largest ε of a site, over all its runs; not listed: the target, in this."""
        return max((one.spent.epsilon for one in self.sites), default=self.target)

    @property
    def delta(self) -> float | None:
        """Return the largest δ of a site; not listed: target_delta."""
        return max((one.spent.delta for one in self.sites), default=self.target_delta)


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """Both guarantees, each there or None, and everything else that leaves or is published."""

    record: RecordLevel | None
    client: ClientPlan | None
    client_target: float | None  # ε that the run may cost a client
    disclosures: tuple[Disclosure, ...]
    rounds: int = 0
    together: Together | None = None  # noise of secure sums: of the level that its unit says
    sums: Sums | None = None  # what the coordinator saw instead of updates

    @property
    def private(self) -> bool:
        """Return whether there is any guarantee."""
        return not (self.record is None and self.client is None and self.together is None)

    @property
    def of_records(self) -> Together | None:
        """Return the noise of secure sums that protects records."""
        return self._of("record")

    @property
    def of_clients(self) -> Together | None:
        """Return the noise of secure sums that protects clients."""
        return self._of("client")

    @property
    def both(self) -> bool:
        """Return whether there is a guarantee at both levels."""
        of_clients = self.client is not None or self.of_clients is not None
        return self.record is not None and of_clients

    def _of(self, unit: Unit) -> Together | None:
        together = self.together
        return together if together is not None and together.noise.unit == unit else None


def state(config: RunConfig, facts: RunFacts) -> PrivacyStatement:
    """Return what the run guarantees.

    Raises PrivacyError, and so nothing is released, if the run was to be private and a number
    that its statement needs is missing, impossible, or below what the run must have cost.
    """
    together = _together(config, facts)
    by_members = together is not None and config.client_privacy is not None
    if config.client_privacy is not None and facts.client is None and not by_members:
        raise PrivacyError(
            "the run has [client_privacy], but there is no plan of its noise, so its client-level "
            "epsilon cannot be stated; nothing is released"
        )
    client = facts.client if config.client_privacy is not None and not by_members else None
    if client is not None and not (0 < client.epsilon < math.inf and 0 < client.delta < 1):
        raise PrivacyError(
            f"the client-level plan has (epsilon, delta) = ({client.epsilon}, {client.delta}): "
            "expected a finite epsilon above 0 and delta in (0, 1); nothing is released"
        )
    return PrivacyStatement(
        record=_record_level(config, facts),
        client=client,
        client_target=None if config.client_privacy is None else config.client_privacy.epsilon,
        disclosures=disclosures(config, simulated=facts.simulated),
        rounds=facts.rounds,
        together=together,
        sums=Sums.of(config, simulated=facts.simulated),
    )


def _together(config: RunConfig, facts: RunFacts) -> Together | None:
    """Return the noise that members of secure sums made together; None: there was to be none."""
    secure = config.secure_aggregation
    if secure is None or not noised_by_members(config):
        return None
    noise = facts.noise
    if noise is None or (facts.rounds > noise.rounds):
        raise PrivacyError(
            "the run's secure sums were to be noised by their members, and there is no plan of it "
            f"for its {facts.rounds} rounds; nothing is released"
        )
    return Together.of(noise, secure)


def _record_level(config: RunConfig, facts: RunFacts) -> RecordLevel | None:
    privacy = config.privacy
    if privacy is None:
        return None
    guaranteed = functools.partial(
        RecordLevel,
        rounds=facts.rounds,
        clipping=privacy.clipping,
        clipping_norm=privacy.clipping_norm,
        target_quantile=privacy.target_quantile,
        target=privacy.epsilon,
        target_delta=privacy.delta,
    )
    if config.client_privacy is not None:
        return guaranteed(sites=())
    known = {one.site: one for one in facts.privacy}
    missing = sorted(set(facts.sites) - known.keys())
    if missing or not known:
        who = f"site {missing[0]!r}" if missing else "any site"
        raise PrivacyError(
            f"release: no privacy facts of {who}, so its epsilon cannot be stated; nothing is "
            "released"
        )
    spent = [known[name] for name in sorted(known)]
    noise = facts.noise if privacy.noise == "distributed" else None
    costs = {one.site: _cost(one, noise) for one in spent}
    dearest = sorted(costs, key=lambda site: (-costs[site], site))[:GROUP_SITES]
    return guaranteed(
        sites=tuple(
            SiteGuarantee(
                spent=one,
                epsilon_run=costs[one.site],
                groups=(
                    _groups(one, costs[one.site]) if one.site in dearest and noise is None else {}
                ),
            )
            for one in spent
        )
    )


def _cost(one: SitePrivacy, noise: DistributedNoise | None = None) -> float:
    """Return ε of this run's steps; raise PrivacyError for numbers that cannot be true."""
    what = f"release: site {one.site!r} states"
    if not (0 < one.delta < 1 and 0 <= one.epsilon < math.inf):
        raise PrivacyError(
            f"{what} (epsilon, delta) = ({one.epsilon}, {one.delta}): expected a finite epsilon "
            "and delta in (0, 1); nothing is released"
        )
    try:
        spend = Spend(
            noise_multiplier=one.noise_multiplier,
            sample_rate=one.sample_rate,
            steps=one.steps,
            skellam=None if noise is None else noise.sensitivities,
        )
    except ValueError as error:
        raise PrivacyError(
            f"{what} an impossible mechanism: {error}; nothing is released"
        ) from None
    cost = epsilon_of([spend], one.delta)
    if one.epsilon < cost * (1 - TOLERANCE) - TOLERANCE:
        raise PrivacyError(
            f"{what} epsilon = {one.epsilon:.4f} over all its runs, but σ = "
            f"{one.noise_multiplier:g}, q = {one.sample_rate:g} and {one.steps} steps of this run "
            f"alone cost {cost:.4f}: its ledger has lost steps, or its records changed during the "
            "run. Nothing is released; let the site verify its ledger"
        )
    return cost


def _groups(one: SitePrivacy, cost: float) -> dict[int, float | None]:
    """Return g -> ε; None once a smaller group costs more than WEAK, without computing it."""
    found: dict[int, float | None] = {}
    before: float | None = cost
    for size in GROUPS:
        if before is not None:
            before = None if before > WEAK else group_epsilon(one, size)
        found[size] = before
    return found


def group_epsilon(one: SitePrivacy, size: int) -> float | None:
    """Return ε at the site's δ for `size` records of one person; None when it is above 100.

    An upper bound, for this run's Poisson-sampled Gaussian steps whose records are clipped to
    the same norm, and all `size` records added or all removed. At size 1 it is what the
    accountant of one record says, within the errors of both.
    """
    return _group_epsilon(one.noise_multiplier, one.sample_rate, one.steps, one.delta, size)


@functools.lru_cache(maxsize=1024)
def _group_epsilon(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, size: int
) -> float | None:
    from dp_accounting import NeighboringRelation  # here and not above: half a second
    from dp_accounting.dp_event import GaussianDpEvent, MixtureOfGaussiansDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(
        NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=LOSS_INTERVAL
    )
    chances = [float(binom.pmf(count, size, sample_rate)) for count in range(size + 1)]
    if sample_rate == 1:  # one Gaussian; as a mixture, dp_accounting fails at some σ
        accountant.compose(GaussianDpEvent(noise_multiplier / size), steps)
    else:
        mixture = MixtureOfGaussiansDpEvent(noise_multiplier, list(range(size + 1)), chances)
        accountant.compose(mixture, steps)
    epsilon = float(accountant.get_epsilon(delta))
    return epsilon if epsilon <= LARGEST_EPSILON else None


def guess(epsilon: float, delta: float) -> float:
    """Return how often a guess "was this one in?" can be right, of even odds: (e^ε + δ)/(1 + e^ε).

    Kairouz, Oh, Viswanath 2015 (arXiv:1311.0776): the two errors of any test satisfy
    FPR + e^ε FNR ≥ 1 − δ and e^ε FPR + FNR ≥ 1 − δ. Half is a coin.
    """
    miss = math.exp(-epsilon) if epsilon < 700 else 0.0
    return min(1.0, (1 + delta * miss) / (1 + miss))
