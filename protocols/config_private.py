"""What does not go with [privacy] or [client_privacy]: what their accounting does not cover."""

from __future__ import annotations

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import SEPARABLE, ClientPrivacy, Tables


def check_private(config: Tables) -> None:
    """Refuse what would make epsilon depend on records, or train from what is not covered."""
    if config.training.local_steps is None:
        raise ConfigError(
            "training.local_steps is required with [privacy]: the number of noisy "
            "steps per round decides epsilon and must be fixed in advance"
        )
    if config.training.class_weights == "balanced":
        raise ConfigError(
            'training.class_weights = "balanced" is computed from the records and '
            "would not be covered by [privacy]: give one fixed number per label"
        )


def check_client_private(privacy: ClientPrivacy, config: Tables) -> None:
    """Refuse what would release more than the accounted sums, or break their sensitivity."""
    federation, method, goes = config.federation, config.method, "[client_privacy] does not go with"
    if method not in SEPARABLE:
        raise ConfigError(
            f'{goes} federation.method = "{method}": its clients send factors whose products are '
            f"added, not one update each. Take one of {', '.join(sorted(SEPARABLE))}"
        )
    if federation.mixed_ranks:
        raise ConfigError(
            f"{goes} federation.mixed_ranks: noise covers one part, which all sites train"
        )
    if federation.buffer is not None:
        raise ConfigError(
            f"{goes} federation.buffer: who is fast enough is no Poisson sample. Leave buffer out"
        )
    if config.robust is not None:
        raise ConfigError(
            f"{goes} [robust]: every update is clipped already, and the sensitivity of a robust "
            "rule is not known. Leave [robust] out"
        )
    if federation.normalize_steps:
        raise ConfigError(
            f"{goes} federation.normalize_steps: steps are counts of records, and not noised. "
            "Leave it out, and set training.local_steps"
        )
    if federation.quorum != 1:
        raise ConfigError(
            f"{goes} federation.quorum = {federation.quorum}: a cohort is a random sample, and a "
            "round whose size decided something would tell who took part. Leave quorum out"
        )
    if federation.client_evaluation and config.training.holdout > 0:
        raise ConfigError(
            f"{goes} federation.client_evaluation: metrics of clients are not noised. Set "
            "client_evaluation = false, and give the coordinator records of its own"
        )
    if federation.weighting == "examples" and privacy.max_examples is None:
        raise ConfigError(
            f'{goes} federation.weighting = "examples": a weight without a cap has no '
            'sensitivity. Set federation.weighting = "uniform", or client_privacy.max_examples'
        )
    if federation.weighting == "uniform" and privacy.max_examples is not None:
        raise ConfigError(
            'client_privacy.max_examples is for federation.weighting = "examples": leave one of '
            "the two out"
        )
