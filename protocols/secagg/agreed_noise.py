"""The noise of a run's secure sums, from its configuration: every party computes the same.

    unit     bound S                            q                        δ unless given
    client   client_privacy.clipping_norm       1                        min(1/1000, 1 / (10 N))
    record   learning rate · C / batch_size     batch_size / n_least     must be given

A client: q = 1, because the coordinator, against whom the guarantee is, knows who takes part; that
cohorts are drawn at random amplifies nothing. N is client_privacy.population.

A record: the sum of clipped gradients is divided by batch_size at every site, so S is the same
for all. n_least are the training records of a site with data.min_rows rows: a site with fewer does
not take part, one with more has a smaller q, and so a smaller ε, in its own ledger.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError, ProtocolError
from anabranch.protocols.secagg.contribution import WEIGHT_UNIT
from anabranch.protocols.secagg.fixed_point import write_counters
from anabranch.protocols.secagg.noise import (
    MARGIN,
    DistributedNoise,
    Random,
    honest_members,
    in_ring,
    noised,
    plan_noise,
    ring_limit,
)
from anabranch.protocols.secagg.terms import Terms
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import ClientPrivacy, Privacy, SecureAggregation

LARGEST_DELTA = 1e-3  # that a client is betrayed outright
LEAST_POPULATION = 100  # clients: with fewer the noise drowns what there is to learn
LARGEST_BATCH = 2.0  # of batch_size: what a batch beyond it adds to a value may be cut off

_plan = functools.lru_cache(maxsize=64)(plan_noise)


def values_of(spec: AdapterSpec) -> int:
    """Return d of a run that trains this adapter: all its values, whatever a round's part is."""
    return sum(math.prod(shape) for shape in spec.shapes.values())


def noise_of(config: RunConfig, values: int) -> DistributedNoise | None:
    """Return the noise that the members of each secure sum make together; None: none.

    `values`: values_of the run's adapter. Raises PrivacyError if no noise reaches ε, or δ is too
    large for those it protects.
    """
    secure = config.secure_aggregation
    if secure is None:
        return None
    if config.client_privacy is not None:
        return _of_clients(config.client_privacy, config, values, secure.range)
    if config.privacy is not None and config.privacy.noise == "distributed":
        return _of_records(config.privacy, config, values, secure.range)
    return None


def contribute_noised(
    delta: Delta,
    terms: Terms,
    noise: DistributedNoise,
    secure: SecureAggregation,
    *,
    advertised: int,
    random: Random,
) -> NDArray[Any]:
    """Return a member's vector (length(terms),) in the ring, noised, before it is masked.

    As contribution.contribute, whose sums mean_of reads, but for this: values are clipped or cut,
    never refused, and the counters say one record, one step and one weight of every member.
    `advertised`: members whose keys arrived, this one's among them. Raises ProtocolError for
    terms of another grid, ConfigError if nobody's noise is certain, PrivacyError as noised does.
    """
    invited = len(terms.members)
    ring, limit = ring_limit(noise, invited, secure)
    honest = honest_members(advertised, invited, secure)
    vector = np.concatenate([array.reshape(-1) for array in delta.arrays.values()])
    counters = [1, WEIGHT_UNIT, WEIGHT_UNIT]
    expected = (ring.bits, limit, WEIGHT_UNIT, len(vector), len(counters), None)
    told = terms.ring, terms.limit, terms.weight, terms.values, terms.counters, terms.group
    if told != expected:
        raise ProtocolError(
            f"terms of round {terms.round}: (ring, limit, weight, values, counters, group) = "
            f"{told}, and the noise of this run is made for {expected}"
        )
    values = in_ring(noised(vector, noise, honest, random), ring)
    return np.concatenate([values, write_counters(counters, ring, invited)])


def least_records(config: RunConfig) -> int:
    """Return n_least, a site's training records where it has data.min_rows rows; at least 1."""
    kept = config.data.min_rows * (1 - config.training.holdout)
    return max(1, math.floor(kept) - 1 if config.training.holdout else config.data.min_rows)


def _of_clients(
    privacy: ClientPrivacy, config: RunConfig, values: int, reach: float
) -> DistributedNoise:
    population = privacy.population
    delta = privacy.delta or min(LARGEST_DELTA, 1 / (10 * population))
    if delta >= 1 / population:
        raise PrivacyError(
            f"client_privacy.delta = {delta:g} is not below 1/N = {1 / population:g} of "
            f"{population} clients: it would allow releasing whole clients"
        )
    found = _plan(
        "client",
        bound=privacy.clipping_norm,
        values=values,
        reach=min(reach, privacy.clipping_norm),
        epsilon=privacy.epsilon,
        delta=delta,
        rounds=config.federation.rounds,
        sample_rate=1.0,
    )
    if population < LEAST_POPULATION:
        raise PrivacyError(
            f"client_privacy.population = {population}: too few clients for client-level privacy, "
            f"which needs at least {LEAST_POPULATION}; epsilon = {privacy.epsilon:g} at delta = "
            f"{delta:g} over {config.federation.rounds} rounds takes noise of "
            f"{found.noise_multiplier:.2f} x clipping_norm on each coordinate of the sum. Protect "
            'records instead: set [privacy] with noise = "distributed"'
        )
    return found


def _of_records(privacy: Privacy, config: RunConfig, values: int, reach: float) -> DistributedNoise:
    training, least = config.training, least_records(config)
    if privacy.delta is None or privacy.delta >= 1 / least:
        raise PrivacyError(
            f"privacy.delta = {privacy.delta}: expected one below 1/n = {1 / least:g} of a site "
            f"with {least} training records (data.min_rows, less what is held out)"
        )
    rate = max(training.learning_rate, training.head_learning_rate or 0.0)
    return _plan(
        "record",
        bound=rate * privacy.clipping_norm / training.batch_size * (1 + MARGIN),
        values=values,
        reach=min(reach, LARGEST_BATCH * rate * privacy.clipping_norm),
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        rounds=config.federation.rounds,
        sample_rate=min(1.0, training.batch_size / least),
    )
