"""run.toml: everything the parties of a run agree on before it starts.

Durations are seconds, sizes are bytes; a field's name says which. Unknown fields are
refused. The digest of the canonical JSON identifies the configuration on every side.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Literal

import msgspec

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.part import Part

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(gt=0, le=1)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]

TaskKind = Literal["text-classification", "image-classification", "tabular-classification"]
Device = Literal["cpu", "cuda"]
ColumnType = Literal["text", "image", "number", "category", "label"]


class Task(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[task]: what is predicted."""

    kind: TaskKind
    labels: Annotated[tuple[str, ...], msgspec.Meta(min_length=2)]  # order = index of the logit


class Column(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One column of the data contract."""

    type: ColumnType
    optional: bool = False  # an empty cell is allowed (number: `mean`; category: none of values)
    min: float | None = None  # numbers only
    max: float | None = None
    values: tuple[str, ...] = ()  # categories only: the closed set of values
    mean: float = 0.0  # numbers only: x -> (x − mean) / std, fixed in advance so that
    std: Positive = 1.0  # no statistic of the records is released


class Contract(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[data]: what every site's records must look like, checked before anything trains."""

    columns: dict[str, Column]
    min_rows: Count = 1
    max_characters: Count = 20_000  # per text cell
    forbidden: tuple[str, ...] = ()  # columns that must not be in the file at all

    def column(self, kind: ColumnType) -> str:
        """Return the name of the only column of a type; raise ConfigError if not exactly one."""
        names = [name for name, column in self.columns.items() if column.type == kind]
        if len(names) != 1:
            raise ConfigError(
                f"data.columns: expected exactly one column of type {kind!r}, got {names or 'none'}"
            )
        return names[0]


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[model]: the frozen base."""

    base: str  # "minilm", "vit", "mlp", "logistic", a local folder, or a hub id
    revision: str | None = None  # commit hash; required for a hub id
    pooling: Literal["mean", "cls"] = "mean"  # text: tokens -> one vector
    max_tokens: Annotated[int, msgspec.Meta(ge=4, le=8192)] = 64
    hidden: tuple[Count, ...] = (32,)  # mlp: widths of the hidden layers
    image_size: Annotated[int, msgspec.Meta(ge=8, le=32)] = 8  # vit: pixels per side
    channels: Literal[1, 3] = 1
    patch: Annotated[int, msgspec.Meta(ge=2, le=8)] = 2
    width: Annotated[int, msgspec.Meta(ge=8)] = 64
    depth: Count = 4
    heads: Count = 4


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[lora]: what is trained. Rank 0 trains the head (and modules_to_save) alone."""

    rank: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 8
    alpha: Positive = 16.0
    targets: tuple[str, ...] = ("query", "value")  # last components of nn.Linear names, or globs
    layers: Annotated[str, msgspec.Meta(pattern=r"^(all|last:[1-9][0-9]*)\Z")] = "all"
    modules_to_save: tuple[str, ...] = ()  # globs of modules trained in full, beside the head


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[training]: one client's local work in one round."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 1e-3
    head_learning_rate: Positive | None = None  # None: learning_rate
    weight_decay: NotNegative = 0.0
    momentum: Share = 0.9  # sgd only
    batch_size: Count = 32  # private training: the expected batch, q = batch_size / n
    local_epochs: Count = 1  # ignored by private training, which counts steps
    local_steps: Count | None = None  # overrides local_epochs; required with [privacy]
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # over the whole run
    warmup: Share = 0.0  # share of the run's steps
    max_grad_norm: Positive | None = 1.0  # None: no clipping; not used by private training
    class_weights: Literal["none", "balanced"] | tuple[Positive, ...] = "none"
    holdout: Share = 0.0  # share of each site's records kept for evaluation
    cache_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1 << 30  # frozen-prefix activations


Method = Literal[
    "fedavg", "ffa", "rolora", "altqr", "fedex", "flora", "flexlora", "hetlora", "fedsa"
]
ONE_FACTOR = frozenset({"ffa", "rolora", "altqr", "fedsa"})  # clients send A or B, never both
RESIDUAL = frozenset({"fedex", "flora"})  # an extra adapter holds what the factors cannot
BUFFERED = frozenset({"fedavg", "ffa", "fedsa"})  # a late delta still fits
REGAUGED = frozenset({"altqr", "fedex", "flora", "flexlora"})  # factors change between rounds


class Federation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[federation]: the rounds."""

    rounds: Count
    method: Method = "fedavg"
    absent_ranks: Literal["zero", "skip"] = "zero"  # fedavg: what a client of lower rank counts as
    residual_rank: Count | None = None  # fedex, flora: rank of the extra adapter; None: lora.rank
    normalize_steps: bool = False  # FedNova: unequal local steps count the same
    buffer: Count | None = None  # FedBuff: merge as soon as so many deltas are there; None: rounds
    proximal_mu: NotNegative = 0.0  # FedProx: + mu/2 · ‖w − w_t‖²; 0 is FedAvg
    weighting: Literal["examples", "uniform"] = "examples"
    cohort: Count | None = None  # clients asked per round; None: all that are connected
    quorum: Count = 1  # deltas needed for a round to count
    deadline_s: Positive = 3600.0  # per round
    early_stopping: Count | None = None  # stop after so many rounds without a better evaluation
    evaluate_every: Count = 1  # rounds; the last one is always evaluated
    client_evaluation: bool = True  # ask clients for held-out metrics (needs training.holdout)


class Server(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[server]: an optimiser on the mean delta; without this table the mean is added as it is."""

    optimizer: Literal["momentum", "adam", "yogi", "adagrad"] = "adam"
    learning_rate: Positive
    head_learning_rate: Positive | None = None  # None: learning_rate
    beta1: Share = 0.9  # momentum uses this one alone
    beta2: Share = 0.99
    tau: Positive = 1e-8
    bias_correction: bool = False  # adam: Kingma and Ba's; the FedAdam paper leaves it out
    schedule: Literal["constant", "linear"] = "constant"  # over the run's rounds


class Robust(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[robust]: what takes the place of the mean. Every client counts the same."""

    rule: Literal[
        "norm-clipping",
        "median",
        "trimmed-mean",
        "krum",
        "multi-krum",
        "geometric-median",
        "centred-clipping",
    ]
    byzantine: Annotated[int, msgspec.Meta(ge=0)] | None = None  # f; krum, multi-krum: required
    trim: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.2  # trimmed-mean: cut at each end
    clipping_norm: Positive | None = None  # the clippings; None: median norm of the round
    iterations: Count = 8  # geometric-median, centred-clipping


class Uplink(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[uplink]: how deltas are written on their way to the coordinator."""

    codec: Literal["fp32", "fp16", "int8", "int4", "top-k"] = "fp32"
    keep: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1  # top-k: share of the values sent
    error_feedback: bool = False  # what the codec left out is added to the next delta


class Personal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[personal]: what a site trains for itself and never sends."""

    head: Literal["shared", "local"] = "shared"  # local: every site keeps a head of its own
    rank: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0  # of a private adapter beside the shared
    pull: NotNegative = 0.1  # Ditto's lambda: towards the shared model
    local_epochs: Count = 1  # of the private adapter, in every round


class Privacy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[privacy]: record-level (ε, δ) for the whole run, per site, add/remove one record."""

    epsilon: Positive
    delta: Annotated[float, msgspec.Meta(gt=0, lt=0.1)] | None = None  # None: 1 / (10 n)
    clipping: Literal["flat", "automatic"] = "flat"  # automatic: AUTO-S, g · C / (‖g‖ + 0.01)
    clipping_norm: Positive = 1.0  # C


class Release(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[release]: what is made of the best adapter."""

    int8_tolerance: Share = 0.01  # accuracy the int8 model may lose against fp32


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
    release: Release = Release()
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def adapter(self) -> Lora:
        """Return [lora] as the method needs it: fedex and flora carry an extra frozen adapter.

        Its ranks come after those that are trained, and alpha / rank stays what it was.
        """
        if self.federation.method not in RESIDUAL or not self.lora.rank:
            return self.lora
        rank = self.lora.rank + (self.federation.residual_rank or self.lora.rank)
        return msgspec.structs.replace(
            self.lora, rank=rank, alpha=self.lora.alpha * rank / self.lora.rank
        )

    @property
    def kept(self) -> Part | None:
        """Return what every site trains with its part of the adapter and keeps to itself."""
        if self.federation.method == "fedsa":
            return Part(factors="B")
        return Part(factors="none") if self.personal.head == "local" else None

    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON: the identity of the agreement."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


def parse(text: bytes | str, *, source: str) -> RunConfig:
    """Return the configuration in TOML `text`, or raise ConfigError naming `source` and field."""
    try:
        return msgspec.toml.decode(text, type=RunConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, ConfigError) as error:
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
    if isinstance(training.class_weights, tuple) and len(training.class_weights) != len(labels):
        raise ConfigError(
            f"training.class_weights: expected {len(labels)} numbers, one per label, "
            f"got {len(training.class_weights)}"
        )
    _check_method(config)
    if config.privacy is not None:
        _check_private(config)


def _check_method(config: RunConfig) -> None:
    """Refuse tables that do not go with the aggregation method."""
    federation, robust, method = config.federation, config.robust, config.federation.method
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
    if config.personal.rank and config.lora.rank == 0:
        raise ConfigError("personal.rank needs lora.rank above 0: it stands beside that adapter")


def _check_robust(robust: Robust, config: RunConfig) -> None:
    method = config.federation.method
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


def _check_private(config: RunConfig) -> None:
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
    if config.federation.proximal_mu:
        raise ConfigError(
            "federation.proximal_mu is not part of private training: leave it out with [privacy]"
        )
