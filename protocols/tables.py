"""The tables of run.toml, one struct each; protocols/config.py puts them together.

Durations are seconds, sizes are bytes; a field's name says which. What single fields cannot
say is checked where the whole file is known.
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

import msgspec

from anabranch.protocols.codecs.codec import CodecName
from anabranch.protocols.errors import ConfigError

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(gt=0, le=1)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]

TaskKind = Literal["text-classification", "image-classification", "tabular-classification"]
Device = Literal["cpu", "cuda"]
ColumnType = Literal["text", "image", "number", "category", "label"]
# of a record's gradient g to norm C. flat: g · min(1, C / ‖g‖); automatic (AUTO-S):
# g · C / (‖g‖ + 0.01); per-layer: flat on each of L tensors, to C / √L; adaptive: flat, C follows
# a quantile of the norms.
Clipping = Literal["flat", "automatic", "per-layer", "adaptive"]
Engine = Literal["fast", "opacus"]
# In float32, far smaller or larger norms would be rounded beyond what the noise is made for.
ClippingNorm = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]


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

    base: str  # "minilm", "vit", "cnn", "mlp", "logistic", a local folder, or a hub id
    revision: str | None = None  # commit hash; required for a hub id
    pooling: Literal["mean", "cls"] = "mean"  # text: tokens -> one vector
    max_tokens: Annotated[int, msgspec.Meta(ge=4, le=8192)] = 64
    hidden: tuple[Count, ...] = (32,)  # mlp: widths of the hidden layers
    image_size: Annotated[int, msgspec.Meta(ge=8, le=32)] = 8  # vit, cnn: pixels per side
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
SEPARABLE = ONE_FACTOR | {"fedavg"}  # a client's update can be clipped and added by itself
REGAUGED = frozenset({"altqr", "fedex", "flora", "flexlora"})  # factors change between rounds


class Federation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[federation]: the rounds."""

    rounds: Count
    method: Method | None = None  # None: RunConfig.method chooses, by docs/aggregation.md
    mixed_ranks: bool = False  # sites of a max_rank below lora.rank may take part
    absent_ranks: Literal["zero", "skip"] = "zero"  # fedavg: what a client of lower rank counts as
    residual_rank: Count | None = None  # fedex, flora: of the extra adapter; None: 3 × lora.rank
    normalize_steps: bool = False  # FedNova: unequal local steps count the same
    buffer: Count | None = None  # FedBuff: merge as soon as so many deltas are there; None: rounds
    proximal_mu: NotNegative = 0.0  # FedProx: + mu/2 · ‖w − w_t‖²; 0 is FedAvg
    weighting: Literal["examples", "uniform"] = "examples"
    cohort: Count | None = None  # clients asked per round; None: all that are connected
    quorum: Count = 1  # deltas needed for a round to count
    over_selection: NotNegative = 0.0  # ceil(cohort · (1 + o)) are asked, the first cohort count
    tiers: Annotated[int, msgspec.Meta(ge=2)] | None = None  # TiFL: cohorts of equal speed
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

    codec: CodecName = "fp32"
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
    clipping: Clipping = "flat"
    clipping_norm: ClippingNorm = 1.0  # C; adaptive: the first one
    target_quantile: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5  # adaptive: share within C
    engine: Engine = "fast"  # "opacus": the reference; also used for layers "fast" does not know
    # local: each site noises its own steps; distributed: the members of a secure sum noise it
    # together, so a site's share is smaller (docs/distributed_noise.md)
    noise: Literal["local", "distributed"] = "local"


class ClientPrivacy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[client_privacy]: client-level (ε, δ) of what the coordinator publishes, for the whole run.

    Neighbouring federations differ by one client with all its records. Cohorts are Poisson
    samples: in every round each of `population` clients is drawn with chance cohort / population.
    """

    epsilon: Positive
    population: Count  # clients that may be drawn, fixed in advance
    delta: Annotated[float, msgspec.Meta(gt=0, lt=0.1)] | None = None  # None: 1 / (10 population)
    clipping: Literal["fixed", "adaptive"] = "fixed"
    clipping_norm: Positive = 1.0  # S, of a client's whole update; adaptive: the first one
    target_quantile: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5  # adaptive: share within S
    max_examples: Count | None = None  # weight min(n / max_examples, 1); None: all count the same


class SecureAggregation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[secure_aggregation]: the coordinator learns the sum of a round's updates, and no update."""

    minimum: Annotated[int, msgspec.Meta(ge=2)] = 3  # updates in a sum that is opened, at least
    threshold: Annotated[float, msgspec.Meta(ge=0.5, lt=1)] = 2 / 3  # t = ⌊threshold · n⌋ + 1 stay
    colluding: Annotated[float, msgspec.Meta(ge=0, lt=0.5)] = 0.1  # share that may help it
    range: Positive = 4.0  # every value of an update lies in [−range, range]
    value_bits: Annotated[int, msgspec.Meta(ge=8, le=32)] = 20  # per value, at least
    ring: Literal[16, 24, 32, 64] | None = None  # bits; None: the narrowest that holds the sum
    # sites of a group, for [robust] alone: `minimum` and all who may collude, at least
    group: Annotated[int, msgspec.Meta(ge=2)] | None = None
    keystream: Literal["fastest", "aes-256-ctr", "chacha20"] = "fastest"  # at the coordinator
    deadline_s: Positive = 120.0  # of each of the five stages after training


class Release(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[release]: what is made of the best adapter."""

    int8_tolerance: Share = 0.01  # accuracy the int8 model may lose against fp32


class Tables(Protocol):
    """What checks of several tables look at: RunConfig (config.py), which imports them."""

    @property
    def training(self) -> Training:
        """Return [training]."""

    @property
    def federation(self) -> Federation:
        """Return [federation]."""

    @property
    def method(self) -> Method:
        """Return the aggregation method, that of the run's situation if none is given."""

    @property
    def robust(self) -> Robust | None:
        """Return [robust]."""

    @property
    def uplink(self) -> Uplink:
        """Return [uplink]."""

    @property
    def kept(self) -> object | None:
        """Return what every site keeps to itself; None: nothing."""

    @property
    def privacy(self) -> Privacy | None:
        """Return [privacy]."""

    @property
    def client_privacy(self) -> ClientPrivacy | None:
        """Return [client_privacy]."""

    @property
    def secure_aggregation(self) -> SecureAggregation | None:
        """Return [secure_aggregation]."""
