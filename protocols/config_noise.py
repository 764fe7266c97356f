"""What does not go with noise that the members of a secure sum make together.

Record level, [privacy] noise = "distributed": a round is one step of SGD whose clipped gradients
the members add up in the ring, so a record's part of the sum is bounded by learning rate x C /
batch_size, whatever the site. Client level, [client_privacy] with [secure_aggregation]: each
member clips its own update.
"""

from __future__ import annotations

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import Privacy, SecureAggregation, Tables

RECORDS = 'privacy.noise = "distributed"'
CLIENTS = "[client_privacy] with [secure_aggregation]"

# Records of a batch, on average, whose sum may be rounded to float32 within noise.MARGIN: twice as
# many move by 2 · 2⁻²⁴ · 2¹⁵ = 0.4 % of one record's bound.
MOST_BATCH = 1 << 14


def check_noise(config: Tables) -> None:
    """Raise ConfigError, naming the field, for a run whose sensitivity is not known."""
    secure = config.secure_aggregation
    if config.privacy is not None and config.privacy.noise == "distributed":
        if secure is None:
            raise ConfigError(
                f"{RECORDS} needs [secure_aggregation]: only a sum of members hides a site behind "
                "the noise of others"
            )
        _check_records(config.privacy, config)
        _check_members(RECORDS, secure, config)
    if config.client_privacy is not None and secure is not None:
        _check_clients(config)
        _check_members(CLIENTS, secure, config)


def _check_records(privacy: Privacy, config: Tables) -> None:
    training = config.training
    rows = (
        (training.local_steps != 1, "training.local_steps = 1", "a later step depends on records"),
        (training.optimizer != "sgd", 'training.optimizer = "sgd"', "a moment is no sum"),
        (training.momentum != 0, "training.momentum = 0", "it is nothing in one step"),
        (
            training.weight_decay != 0,
            "training.weight_decay = 0",
            "what is sent is gradients alone",
        ),
        (
            training.schedule != "constant",
            'training.schedule = "constant"',
            "noise is the same in all rounds",
        ),
        (training.warmup != 0, "training.warmup = 0", "noise is the same in all rounds"),
        (privacy.clipping != "flat", 'privacy.clipping = "flat"', "the bound is C in all rounds"),
        (
            config.federation.weighting != "uniform",
            'federation.weighting = "uniform"',
            "a weight by records would change a record's part of the sum",
        ),
        (privacy.delta is None, "privacy.delta", "the noise is agreed on before sites are counted"),
        (
            training.batch_size > MOST_BATCH,
            f"training.batch_size of at most {MOST_BATCH}, got {training.batch_size}",
            "rounding a sum of more gradients to float32 may take more of a record's bound than is "
            "kept for it. Lower training.batch_size",
        ),
    )
    for wrong, wanted, why in rows:
        if wrong:
            raise ConfigError(f"{RECORDS} needs {wanted}: {why}")
    if config.kept is not None:
        raise ConfigError(
            f"{RECORDS} does not go with fedsa or a local head: what a site keeps to itself has no "
            'noise of its own. Take another method, or noise = "local"'
        )
    if config.client_privacy is not None:
        raise ConfigError(
            f"{RECORDS} does not go with [client_privacy]: the members noise a sum once. Leave one "
            'of the two out, or set privacy.noise = "local"'
        )


def _check_clients(config: Tables) -> None:
    privacy = config.client_privacy
    if privacy is not None and privacy.clipping != "fixed":
        raise ConfigError(
            f'{CLIENTS} needs client_privacy.clipping = "fixed": the norms of updates that a '
            "quantile would follow are seen by nobody"
        )
    if config.federation.weighting != "uniform":
        raise ConfigError(
            f'{CLIENTS} needs federation.weighting = "uniform": each member clips and noises for '
            "itself, and a weight would tell of its records"
        )


def _check_members(what: str, secure: SecureAggregation, config: Tables) -> None:
    if secure.group is not None:
        raise ConfigError(
            f"{what} does not go with secure_aggregation.group: of a small group all others may "
            "collude, and its sum would have one member's noise. Leave group and [robust] out"
        )
    if config.federation.mixed_ranks:
        raise ConfigError(
            f"{what} does not go with federation.mixed_ranks: noise covers one part, which all "
            "sites train"
        )
    if config.federation.normalize_steps:
        raise ConfigError(
            f"{what} does not go with federation.normalize_steps: it scales what was noised. Leave "
            "it out"
        )
