"""run.toml: everything the parties of a run agree on before it starts.

Durations are seconds, sizes are bytes; a field's name says which. Unknown fields are
refused. The digest of the canonical JSON identifies the configuration on every side.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated

import msgspec

from anabranch.protocols.config_noise import check_noise
from anabranch.protocols.config_private import check_client_private, check_private
from anabranch.protocols.config_secure import check_secure
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import (
    BUFFERED,
    ONE_FACTOR,
    REGAUGED,
    RESIDUAL,
    ClientPrivacy,
    Column,
    Contract,
    Federation,
    Lora,
    Method,
    Model,
    Name,
    Personal,
    Privacy,
    Release,
    Robust,
    SecureAggregation,
    Server,
    Task,
    Training,
    Uplink,
)


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    name: Name
    task: Task
    data: Contract
    model: Model
    federation: Federation
    lora: Lora = Lora()
    training: Training = Training()
    server: Server | None = None
    robust: Robust | None = None
    uplink: Uplink = Uplink()
    personal: Personal = Personal()
    privacy: Privacy | None = None
    client_privacy: ClientPrivacy | None = None
    secure_aggregation: SecureAggregation | None = None
    release: Release = Release()
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def method(self) -> Method:
        """Return federation.method, or the one that this run's situation calls for.

        What is measured best where it can be used (docs/aggregation.md, "Which is the default").
        """
        federation = self.federation
        if federation.method is not None:
            return federation.method
        no_factors = not self.lora.rank or self.model.base == "logistic"
        moments = self.server is not None or federation.buffer is not None
        if no_factors or moments or federation.normalize_steps:
            return "fedavg"
        # Client-level noise enters B A exactly with one factor a round, and with the norm it was
        # drawn with; noise on both factors at once has a product of its own. So it changes nothing.
        one_factor = federation.mixed_ranks or self.robust is not None or self.uplink.error_feedback
        return "altqr" if one_factor or self.privacy is None else "fedavg"

    @property
    def adapter(self) -> Lora:
        """Return [lora] as the method needs it: fedex and flora carry an extra frozen adapter.

        Its ranks come after those that are trained, and alpha / rank stays what it was.
        """
        if self.method not in RESIDUAL or not self.lora.rank:
            return self.lora
        rank = self.lora.rank + (self.federation.residual_rank or 3 * self.lora.rank)
        return msgspec.structs.replace(
            self.lora, rank=rank, alpha=self.lora.alpha * rank / self.lora.rank
        )

    @property
    def kept(self) -> Part | None:
        """Return what every site trains with its part of the adapter and keeps to itself."""
        if self.method == "fedsa":
            return Part(factors="B")
        return Part(factors="none") if self.personal.head == "local" else None

    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON: the identity of the agreement."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


def parse(text: bytes | str, *, source: str) -> RunConfig:
    """Return the configuration in TOML `text`, or raise ConfigError naming `source` and field."""
    try:
        return msgspec.toml.decode(text, type=RunConfig)
    except (msgspec.DecodeError, ValueError, ConfigError) as error:  # ValueError: 5000 digits
        raise ConfigError(f"{source}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None


def not_finite(value: object, path: str = "") -> str | None:
    """Return the path of a NaN or infinity in structs, dicts and tuples: JSON has no word for it.

    msgspec would write it as null, which a field with a default reads as "not given".
    """
    inside: list[tuple[str, object]] = []
    match value:
        case float() if not math.isfinite(value):
            return path
        case RunConfig() if path:  # inside a message: it was checked when it was made
            return None
        case msgspec.Struct():
            inside = [(name, getattr(value, name)) for name in value.__struct_fields__]
        case dict():
            inside = list(value.items())
        case tuple():
            inside = [(str(index), item) for index, item in enumerate(value)]
    found = (not_finite(item, f"{path}.{name}" if path else name) for name, item in inside)
    return next((path for path in found if path is not None), None)


def _check(config: RunConfig) -> None:
    """Raise ConfigError for what single fields cannot say."""
    labels, data, training = config.task.labels, config.data, config.training
    unbounded = not_finite(config)
    if unbounded is not None:
        raise ConfigError(f"{unbounded}: expected a finite number, got NaN or infinity")
    if len(set(labels)) != len(labels):
        raise ConfigError("task.labels: every label may appear once")
    data.column("label")
    if config.task.kind == "text-classification":
        data.column("text")
    elif config.task.kind == "image-classification":
        data.column("image")
    elif not any(c.type in ("number", "category") for c in data.columns.values()):
        raise ConfigError("data.columns: a tabular task needs a column of type number or category")
    for name, column in data.columns.items():
        _check_column(f"data.columns.{name}", column)
    overlap = sorted(set(data.forbidden) & set(data.columns))
    if overlap:
        raise ConfigError(f"data.forbidden: {overlap[0]!r} is also a required column")
    cohort, quorum = config.federation.cohort, config.federation.quorum
    if cohort is not None and quorum > cohort:
        raise ConfigError(f"federation.quorum: {quorum} deltas from a cohort of {cohort} clients")
    _check_selection(config)
    if isinstance(training.class_weights, tuple) and len(training.class_weights) != len(labels):
        raise ConfigError(
            f"training.class_weights: expected {len(labels)} numbers, one per label, "
            f"got {len(training.class_weights)}"
        )
    _check_method(config)
    if config.privacy is not None:
        check_private(config)
    if config.client_privacy is not None:
        check_client_private(config.client_privacy, config)
    if config.secure_aggregation is not None:
        check_secure(config.secure_aggregation, config)
    check_noise(config)


def _check_selection(config: RunConfig) -> None:
    """Refuse choices by speed where there is nothing to choose, or where speed must not count."""
    federation = config.federation
    chosen = ("over_selection", federation.over_selection > 0), ("tiers", federation.tiers)
    for name in (f"federation.{name}" for name, value in chosen if value):
        if federation.cohort is None:
            raise ConfigError(f"{name} needs federation.cohort: without it, all clients are asked")
        if federation.buffer is not None:
            raise ConfigError(
                f"{name} does not go with federation.buffer: it waits for nobody in particular. "
                "Leave one of the two out"
            )
        if config.client_privacy is not None:
            raise ConfigError(
                f"[client_privacy] does not go with {name}: who is fast enough is no Poisson "
                f"sample. Leave {name.removeprefix('federation.')} out"
            )


def _check_method(config: RunConfig) -> None:
    """Refuse tables that do not go with the aggregation method."""
    federation, robust, method = config.federation, config.robust, config.method
    if method in REGAUGED and config.server is not None:
        raise ConfigError(
            f'[server] does not go with federation.method = "{method}": it writes the factors '
            "anew every round, so moments of earlier rounds belong to other coordinates. Leave "
            '[server] out, or take "fedavg", "ffa" or "rolora"'
        )
    if federation.buffer is not None and method not in BUFFERED:
        raise ConfigError(
            f'federation.buffer does not go with federation.method = "{method}": a late delta '
            'belongs to factors that are no more. Take "ffa", whose A is fixed'
        )
    if config.uplink.error_feedback and method in REGAUGED - ONE_FACTOR:
        raise ConfigError(
            f'uplink.error_feedback does not go with federation.method = "{method}": it writes '
            "both factors anew every round, and what a codec left out of the old ones fits no "
            'more. Leave it out, or take "fedavg", "ffa" or "altqr"'
        )
    if federation.buffer is not None and federation.quorum > federation.buffer:
        raise ConfigError(
            f"federation.quorum: {federation.quorum} deltas from a buffer of {federation.buffer}"
        )
    if federation.normalize_steps and method not in ONE_FACTOR | {"fedavg"}:
        raise ConfigError(
            f'federation.normalize_steps does not go with federation.method = "{method}": it '
            "normalises deltas, and this method adds products. Leave it out, or take "
            '"fedavg", "ffa", "rolora", "altqr" or "fedsa"'
        )
    if federation.mixed_ranks and method in ("fedex", "fedsa"):
        raise ConfigError(
            f'federation.mixed_ranks does not go with federation.method = "{method}": every site '
            'trains the same ranks there. Take "altqr", or leave the method out'
        )
    if federation.residual_rank is not None and method not in RESIDUAL:
        raise ConfigError(f'federation.residual_rank is for "fedex" and "flora", not "{method}"')
    if federation.absent_ranks != "zero" and method != "fedavg":
        raise ConfigError(f'federation.absent_ranks is for "fedavg", not "{method}"')
    if config.lora.rank == 0 and method != "fedavg":
        raise ConfigError(f'federation.method = "{method}" needs lora.rank above 0; take "fedavg"')
    if robust is not None:
        _check_robust(robust, config)
    if config.kept is not None and config.lora.modules_to_save:
        raise ConfigError(
            "lora.modules_to_save: with fedsa or a local head, dense tensors stay at the sites; "
            "leave it empty"
        )
    if config.kept is not None and config.lora.rank == 0:
        raise ConfigError('personal.head = "local" with lora.rank = 0 leaves nothing to share')
    if config.kept is not None and config.personal.rank:
        raise ConfigError(
            "personal.rank is for models that all sites share: with fedsa or a local head every "
            "site has one of its own already"
        )
    if config.personal.rank and config.lora.rank == 0:
        raise ConfigError("personal.rank needs lora.rank above 0: it stands beside that adapter")


def _check_robust(robust: Robust, config: RunConfig) -> None:
    method = config.method
    factors = config.lora.rank > 0
    if factors and method not in ONE_FACTOR | {"flexlora"}:
        raise ConfigError(
            f'[robust] does not go with federation.method = "{method}": a robust mean of A and B '
            'apart is no mean of their products. Take "ffa", "rolora" or "altqr" (one factor at '
            'a time) or "flexlora" (products)'
        )
    if method == "flexlora" and robust.rule in ("median", "trimmed-mean"):
        raise ConfigError(
            f'robust.rule = "{robust.rule}" works on coordinates, which products of factors do '
            'not show: take "ffa", "rolora" or "altqr", or another robust rule'
        )
    if robust.rule in ("krum", "multi-krum") and robust.byzantine is None:
        raise ConfigError("robust.byzantine is required: how many clients may lie")
    if config.federation.normalize_steps or config.federation.buffer is not None:
        raise ConfigError(
            "[robust] goes neither with federation.normalize_steps nor with federation.buffer: "
            "both trust what a client says of itself"
        )


def _check_column(path: str, column: Column) -> None:
    if column.optional and column.type in ("label", "image"):
        raise ConfigError(f"{path}: a column of type {column.type} cannot be optional")
    if column.type == "category" and not column.values:
        raise ConfigError(f"{path}: a category needs its closed set of `values`")
    if column.values and column.type != "category":
        raise ConfigError(f"{path}: `values` belongs to a category, this is a {column.type}")
    if len(set(column.values)) != len(column.values):
        raise ConfigError(f"{path}.values: every value may appear once")
    low, high = column.min, column.max
    if column.type != "number" and (low, high, column.mean, column.std) != (None, None, 0, 1):
        raise ConfigError(f"{path}: min, max, mean and std belong to a number, not {column.type}")
    if low is not None and high is not None and low > high:
        raise ConfigError(f"{path}: min {low:g} is above max {high:g}")
