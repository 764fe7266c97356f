"""What does not go with [secure_aggregation]: everything that needs more than a sum."""

from __future__ import annotations

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.secagg.fixed_point import Grid, ring_for
from anabranch.protocols.secagg.graph import smallest_company
from anabranch.protocols.tables import SEPARABLE, SecureAggregation, Tables

NOT = "[secure_aggregation] does not go with"


def check_secure(secure: SecureAggregation, config: Tables) -> None:
    """Raise ConfigError, naming the field, for a run that a sum of updates is not enough for."""
    federation, method, uplink = config.federation, config.method, config.uplink
    if method not in SEPARABLE:
        raise ConfigError(
            f'{NOT} federation.method = "{method}": it needs the factors of every site, or their '
            f"products, and the coordinator sees the sum alone. Take one of "
            f"{', '.join(sorted(SEPARABLE))}, or leave the method out"
        )
    if federation.mixed_ranks and method == "fedavg":
        raise ConfigError(
            f'{NOT} federation.mixed_ranks under federation.method = "fedavg": sites of a low rank '
            "are sent another adapter there, and all members of a sum train from one. Take "
            '"altqr", "ffa" or "rolora"'
        )
    if federation.buffer is not None:
        raise ConfigError(
            f"{NOT} federation.buffer: masks cancel among the sites of one round, and a late delta "
            "belongs to another. Leave federation.buffer out"
        )
    if uplink.codec != "fp32" or uplink.error_feedback:
        what = f'uplink.codec = "{uplink.codec}"' if uplink.codec != "fp32" else "error_feedback"
        raise ConfigError(
            f"{NOT} {what}: what it writes does not add up. The ring is the codec here: lower "
            "secure_aggregation.value_bits (12 bits, up to 15 sites: 2 bytes per value) and leave "
            "[uplink] out"
        )
    if config.robust is not None and secure.group is None:
        raise ConfigError(
            f"{NOT} [robust] alone: a robust rule compares updates, and there is only their sum. "
            "Set secure_aggregation.group (sites per group): the rule then works on the means of "
            "random groups"
        )
    if secure.group is not None and config.robust is None:
        raise ConfigError(
            "secure_aggregation.group is for [robust]: without it smaller sums show more for "
            "nothing. Leave group out, or add [robust]"
        )
    if secure.group is not None and secure.group < secure.minimum:
        raise ConfigError(
            f"secure_aggregation.group: groups of {secure.group} sites are below "
            f"secure_aggregation.minimum = {secure.minimum}: every opened sum must have so many"
        )
    if secure.colluding and 2 * secure.threshold < 1 + secure.colluding:
        raise ConfigError(
            f"secure_aggregation.threshold = {secure.threshold:g} does not hold with a share of "
            f"{secure.colluding:g} colluding: set it to {(1 + secure.colluding) / 2:g} or more, "
            "or, if no site colludes with the coordinator, secure_aggregation.colluding = 0"
        )
    if secure.group is not None and federation.cohort is not None:
        smallest_company(federation.cohort, secure)
    if secure.group is not None and federation.weighting != "uniform":
        raise ConfigError(
            'secure_aggregation.group needs federation.weighting = "uniform": a robust rule counts '
            "all sites the same, and a site that says it has very many records would round the "
            "updates of all others away"
        )
    if federation.cohort is not None and federation.cohort < secure.minimum:
        raise ConfigError(
            f"federation.cohort: {federation.cohort} sites a round are fewer than "
            f"secure_aggregation.minimum = {secure.minimum}, so no sum would ever be opened"
        )
    noised = config.privacy is not None and config.privacy.noise == "distributed"
    if config.client_privacy is None and not noised:  # noise has a grid of its own
        members = federation.cohort or secure.minimum  # at most, or at least if nobody says
        Grid(ring_for(members, secure.value_bits, secure.ring), members, secure.range)
