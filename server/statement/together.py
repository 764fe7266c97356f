"""The guarantees of noise that the members of secure sums make together, in words and as JSON.

The mechanism and what is assumed of it: protocols/secagg/noise.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anabranch.protocols.secagg.noise import DistributedNoise
from anabranch.protocols.tables import SecureAggregation
from anabranch.server.statement.numbers import small, upper

CHARGED = (
    "A site charges its ledger for every attempt to sum a round, also for one that is never "
    "opened, and stays out of a sum that would exceed its budget."
)


@dataclass(frozen=True, kw_only=True)
class Together:
    """The noise of a run's sums, and who has to be honest."""

    noise: DistributedNoise
    threshold: float  # share of a sum's members that must be in it, more than
    colluding: float  # share of the invited that may collude, at most
    minimum: int  # members of an opened sum, at least

    @classmethod
    def of(cls, noise: DistributedNoise, secure: SecureAggregation) -> Together:
        """Return what the tables of a run say."""
        return cls(
            noise=noise,
            threshold=secure.threshold,
            colluding=secure.colluding,
            minimum=secure.minimum,
        )


def against(together: Together) -> str:
    """Return whom it protects against, and on which condition."""
    return (
        "against the coordinator, any c = "
        f"⌊{together.colluding:.4g}·M⌋ of the M invited to a sum that tell it all they know, and "
        "everyone who sees what it publishes"
    )


def how(together: Together) -> str:
    """Return how the noise comes about."""
    noise = together.noise
    return (
        "Mechanism: secure aggregation. The coordinator sees sums of updates alone, on a grid of "
        f"step {noise.step:.4g}; a sum of n members whose keys arrived is opened when t of them "
        f"are in it, t the largest of ⌊{together.threshold:.4g}·n⌋ + 1, ⌊(n + c)/2⌋ + 1 and "
        f"{together.minimum}. Each member adds Skellam noise of variance V / a before it masks, "
        f"with a = t − c, V = (σ·D2)², σ = {noise.noise_multiplier:.4f}, and D2 = "
        f"{noise.sensitivities.l2:.1f} steps the sensitivity, rounding included. So the honest "
        "members of every opened sum have made noise of variance V or more, and each further one "
        "that is in it adds to that. In sums of more than 128 members a is less: the honest "
        "members that a coordinator which lies about who is there could leave. Accountant: Rényi "
        f"divergences (Agarwal, Kairouz, Liu 2021), T = {noise.rounds} rounds."
    )


def client_text(together: Together, rounds: int) -> str:
    """Return the client-level guarantee."""
    noise = together.noise
    return (
        "Client level: the update of one client, made of all its records. The sequence of all sums "
        f"that are opened in rounds 1 to {rounds} is (ε_u, δ_u)-differentially private with ε_u = "
        f"{upper(noise.epsilon)} and δ_u = {small(noise.delta)}, with respect to replacing the "
        "updates of one honest client, in all rounds that it takes part in, by zeros, "
        f"{against(together)}. "
        f"Its whole update is clipped to ℓ2 norm S = {noise.bound:g}. That cohorts are drawn at "
        "random lowers no ε here: the coordinator knows who is drawn (q = 1). That a client took "
        "part is not hidden."
    )


def record_text(together: Together, rounds: int) -> str:
    """Return the record-level guarantee."""
    return (
        "Record level: one record of a site. For every honest site k, the sequence of all sums "
        f"that are opened in rounds 1 to {rounds} is (ε_k, δ_k)-differentially private with "
        f"respect to adding or removing one record of its training set, {against(together)}. "
        "Updates have no noise of their own: it is the sum that is private, and a site's update "
        "is never seen. What a site's messages hold beside it is marked below as charged, fixed "
        "in advance or not covered."
    )


def record_mechanism(clipping_norm: float) -> str:
    """Return how a site's update is made."""
    return (
        "Each round is one step of DP-SGD: a site draws a Poisson sample of its records and clips "
        f"each record's gradient to ℓ2 norm C = {clipping_norm:g}; the sum, over batch_size, is "
        "its update. Amplification by sampling is counted for records, whose draw nobody sees."
    )


def as_json(together: Together, *, shared: bool = False) -> dict[str, Any]:
    """Return the guarantee for summary.json; `shared`: what all sites have in common alone."""
    noise = together.noise
    client = noise.unit == "client"
    own = {
        "unit": "the updates of one client" if client else "one record of one site",
        "neighbours": "updates replaced by zeros" if client else "one record added or removed",
        "rounds": noise.rounds,
        "epsilon": noise.epsilon,
        "delta": noise.delta,
    }
    common = {
        "against": "the coordinator, colluding members, and everyone who sees what it publishes",
        "mechanism": "distributed Skellam",
        "accountant": "RDP",
        "noise_multiplier": noise.noise_multiplier,
        "variance": noise.variance,  # V, in steps²
        "step": noise.step,
        "l1": noise.sensitivities.l1,
        "l2": noise.sensitivities.l2,
        "bound": noise.bound,
        "sample_rate": noise.sample_rate,
        "threshold": together.threshold,
        "colluding": together.colluding,
        "minimum": together.minimum,
    }
    return common if shared else own | common
