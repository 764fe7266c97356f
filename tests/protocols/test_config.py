import json
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.config import RunConfig, not_finite, parse
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import SEPARABLE, ClientPrivacy, ColumnType, Contract, Method

MINIMAL = """
name = "chest-clinic"

[task]
kind = "text-classification"
labels = ["asthma", "other"]

[data.columns]
note = { type = "text" }
code = { type = "label" }

[model]
base = "minilm"

[federation]
rounds = 5
"""

TABLE: dict[str, Any] = {
    "name": "heart",
    "task": {"kind": "tabular-classification", "labels": ["no", "yes", "unknown"]},
    "data": {
        "columns": {
            "sex": {"type": "category", "values": ["f", "m"]},
            "age": {"type": "number", "min": 0, "max": 120, "mean": 54.5, "std": 9},
            "ill": {"type": "label"},
        },
        "forbidden": ["name", "born"],
        "min_rows": 50,
    },
    "model": {"base": "mlp", "hidden": [16, 8]},
    "federation": {"rounds": 20, "cohort": 4, "quorum": 3, "deadline_s": 60},
    "lora": {"rank": 0, "layers": "last:2"},
    "training": {"local_steps": 10, "class_weights": [1, 2.5, 1], "max_grad_norm": None},
    "privacy": {"epsilon": 8, "delta": 1e-4, "clipping": "automatic"},
    "seed": 7,
}


def table(**changes: Any) -> dict[str, Any]:
    """TABLE with values replaced; `training__seed=1` reaches into a section."""
    document: dict[str, Any] = json.loads(json.dumps(TABLE))
    for path, value in changes.items():
        *sections, field = path.split("__")
        place = document
        for section in sections:
            place = place[section]
        place[field] = value
    return document


def read(document: dict[str, Any]) -> RunConfig:
    """Return what a run.toml of this content means (TOML has no null: a field is left out)."""
    return parse(msgspec.toml.encode(without_null(document)), source="run.toml")


def without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_null(item) for name, item in value.items() if item is not None}
    return value


positive = st.floats(1e-9, 1e9)
counts = st.integers(1, 10**9)
share = st.floats(0, 1, exclude_max=True)
valid = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "federation__rounds": counts,
        "federation__deadline_s": positive,
        "federation__weighting": st.sampled_from(["examples", "uniform"]),
        "training__learning_rate": positive,
        "training__momentum": share,
        "training__batch_size": counts,
        "training__schedule": st.sampled_from(["constant", "linear", "cosine"]),
        "training__warmup": share,
        "training__class_weights": st.just("none") | st.lists(positive, min_size=3, max_size=3),
        "lora__targets": st.lists(st.text(), max_size=3),
        "lora__layers": st.just("all") | st.integers(1, 99).map("last:{}".format),
        "privacy__epsilon": positive,
        "privacy__clipping_norm": st.floats(1e-6, 1e6),
        "task__labels": st.lists(st.text(), min_size=3, max_size=3, unique=True),
        "data__columns__age__min": st.floats(-1e30, 120),
    },
)


@given(changes=valid)
def test_toml_and_json_mean_the_same_and_have_one_digest(changes: dict[str, Any]) -> None:
    """The file on the coordinator, and the message that reaches a site."""
    config = read(table(**changes))
    arrived = msgspec.json.decode(msgspec.json.encode(config), type=RunConfig)

    assert arrived == config
    assert arrived.digest() == config.digest()
    assert msgspec.convert(msgspec.to_builtins(config), RunConfig) == config


@given(changes=valid)
def test_configurations_are_equal_exactly_if_their_digests_are(changes: dict[str, Any]) -> None:
    config, plain = read(table(**changes)), read(TABLE)

    assert (config == plain) == (config.digest() == plain.digest())


@given(text=st.text() | st.binary())
def test_any_text_is_a_configuration_or_one_clear_error(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"^run\.toml: "):
        parse(text, source="run.toml")


def test_the_order_of_columns_is_part_of_the_agreement() -> None:
    """Features stand in this order, so another order is another model."""
    columns = TABLE["data"]["columns"]
    turned = table(data__columns=dict(reversed(columns.items())))

    assert read(turned).digest() != read(TABLE).digest()


def test_bounds_themselves_are_allowed() -> None:
    config = read(table(federation__quorum=4, data__columns__age__min=120))

    assert config.federation.quorum == config.federation.cohort
    assert config.data.columns["age"].min == config.data.columns["age"].max


def test_defaults_are_filled_in() -> None:
    config = parse(MINIMAL, source="run.toml")

    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (8, 16, ("query", "value"))
    assert config.privacy is None
    assert config.data.column("text") == "note"
    assert config.digest() == parse(MINIMAL.encode(), source="elsewhere.toml").digest()


FIELDS = [
    ({"name": "Heart"}, r"matching regex .* at `\$\.name`"),
    ({"name": "heart\n"}, r"matching regex .* at `\$\.name`"),
    ({"name": "../heart"}, r"matching regex .* at `\$\.name`"),
    ({"rounds": 3}, "Object contains unknown field `rounds`"),
    ({"training__epochs": 3}, r"unknown field `epochs` - at `\$\.training`"),
    ({"data__columns__age__typo": 3}, r"unknown field `typo` - at `\$\.data\.columns\[\.\.\.\]`"),
    ({"federation": {}}, r"missing required field `rounds` - at `\$\.federation`"),
    ({"federation__rounds": 0}, r"Expected `int` >= 1 - at `\$\.federation\.rounds`"),
    ({"federation__rounds": 1.5}, r"Expected `int`, got `float` - at `\$\.federation\.rounds`"),
    ({"federation__rounds": "5"}, r"Expected `int`, got `str` - at `\$\.federation\.rounds`"),
    ({"federation__method": "fedsgd"}, r"Invalid enum value 'fedsgd'"),
    ({"task__kind": "regression"}, r"Invalid enum value 'regression' - at `\$\.task\.kind`"),
    ({"task__labels": ["one"]}, r"Expected `array` of length >= 2 - at `\$\.task\.labels`"),
    ({"training__warmup": 1.0}, r"Expected `float` < 1\.0 - at `\$\.training\.warmup`"),
    ({"training__learning_rate": 0}, r"Expected `float` > 0\.0"),
    ({"training__class_weights": "heavy"}, r"at `\$\.training\.class_weights`"),
    ({"training__class_weights": [1, 0, 1]}, r"Expected `float` > 0\.0"),
    ({"lora__layers": "last:0"}, r"matching regex .* at `\$\.lora\.layers`"),
    ({"lora__layers": "all\n"}, r"matching regex .* at `\$\.lora\.layers`"),
    ({"privacy__epsilon": 0}, r"Expected `float` > 0\.0 - at `\$\.privacy\.epsilon`"),
    ({"privacy__delta": 0.1}, r"Expected `float` < 0\.1 - at `\$\.privacy\.delta`"),
    ({"model__image_size": 64}, r"Expected `int` <= 32 - at `\$\.model\.image_size`"),
    ({"seed": -1}, r"Expected `int` >= 0 - at `\$\.seed`"),
]

TOGETHER = [
    ({"task__labels": ["no", "no", "yes"]}, "task.labels: every label may appear once"),
    ({"data__columns__ill__type": "number"}, "exactly one column of type 'label', got none"),
    ({"data__columns__age": {"type": "label"}}, r"of type 'label', got \['age', 'ill'\]"),
    ({"task__kind": "text-classification"}, "exactly one column of type 'text', got none"),
    ({"task__kind": "image-classification"}, "exactly one column of type 'image', got none"),
    (
        {"data__columns": {"ill": {"type": "label"}}},
        "a tabular task needs a column of type number or category",
    ),
    ({"data__columns__sex__values": []}, "data.columns.sex: a category needs its closed set"),
    ({"data__columns__sex__values": ["f", "f"]}, "sex.values: every value may appear once"),
    ({"data__columns__age__values": ["1"]}, "age: `values` belongs to a category, this is a num"),
    ({"data__columns__sex__min": 1}, "sex: min, max, mean and std belong to a number, not cat"),
    ({"data__columns__ill__std": 2}, "ill: min, max, mean and std belong to a number, not label"),
    ({"data__columns__age__min": 121}, "data.columns.age: min 121 is above max 120"),
    ({"data__columns__ill__optional": True}, "ill: a column of type label cannot be optional"),
    ({"data__forbidden": ["born", "age"]}, "data.forbidden: 'age' is also a required column"),
    ({"federation__quorum": 5}, "federation.quorum: 5 deltas from a cohort of 4 clients"),
    (
        {"training__class_weights": [1, 2]},
        "class_weights: expected 3 numbers, one per label, got 2",
    ),
    ({"training__local_steps": None}, r"training.local_steps is required with \[privacy\]"),
    ({"training__class_weights": "balanced"}, r'"balanced" is computed from the records'),
]

LORA = {"lora__rank": 4, "lora__targets": ["*"], "privacy": None}
METHODS = [
    ({"federation__method": "ffa"}, r'"ffa" needs lora\.rank above 0; take "fedavg"'),
    (
        LORA | {"federation__method": "altqr", "server": {"learning_rate": 0.1}},
        r'\[server\] does not go with federation\.method = "altqr"',
    ),
    (
        LORA | {"federation__method": "rolora", "federation__buffer": 3},
        r'federation\.buffer does not go with federation\.method = "rolora".*Take "ffa"',
    ),
    (
        LORA | {"federation__method": "ffa", "federation__buffer": 2},
        r"federation\.quorum: 3 deltas from a buffer of 2",
    ),
    (
        LORA | {"federation__method": "ffa", "federation__residual_rank": 2},
        r'residual_rank is for "fedex" and "flora", not',
    ),
    (
        LORA | {"federation__method": "fedex", "federation__mixed_ranks": True},
        r'mixed_ranks does not go with federation\.method = "fedex".*Take "altqr"',
    ),
    (
        LORA | {"federation__method": "hetlora", "federation__normalize_steps": True},
        r'normalize_steps does not go with federation\.method = "hetlora"',
    ),
    (
        LORA | {"federation__method": "flexlora", "uplink": {"error_feedback": True}},
        r'uplink\.error_feedback does not go with federation\.method = "flexlora"',
    ),
    (
        LORA | {"federation__method": "ffa", "federation__absent_ranks": "skip"},
        r'absent_ranks is for "fedavg", not "ffa"',
    ),
    (
        LORA | {"federation__method": "fedavg", "robust": {"rule": "median"}},
        r'\[robust\] does not go with .*"fedavg": a robust',
    ),
    (
        LORA | {"federation__method": "flexlora", "robust": {"rule": "median"}},
        r'robust\.rule = "median" works on coordinates',
    ),
    (
        LORA | {"federation__method": "ffa", "robust": {"rule": "krum"}},
        r"robust\.byzantine is required: how many clients may lie",
    ),
    (
        LORA
        | {
            "federation__method": "ffa",
            "federation__normalize_steps": True,
            "robust": {"rule": "median"},
        },
        r"goes neither with federation\.normalize_steps nor with federation\.buffer",
    ),
    (
        LORA | {"personal": {"head": "local"}, "lora__modules_to_save": ["x"]},
        r"lora\.modules_to_save: with fedsa or a local head",
    ),
    ({"personal": {"head": "local"}}, r'personal\.head = "local" with lora\.rank = 0'),
    ({"personal": {"rank": 2}}, r"personal\.rank needs lora\.rank above 0"),
    (
        LORA | {"federation__method": "fedsa", "personal": {"rank": 2}},
        r"personal\.rank is for models that all sites share",
    ),
]

INFINITE = [
    ({"privacy__epsilon": float("inf")}, r"privacy\.epsilon: expected a finite number"),
    ({"training__learning_rate": float("inf")}, r"training\.learning_rate: expected a finite"),
    ({"data__columns__age__min": float("-inf")}, r"data\.columns\.age\.min: expected a finite"),
    ({"data__columns__age__max": float("nan")}, r"data\.columns\.age\.max: expected a finite"),
    ({"data__columns__age__mean": float("nan")}, r"data\.columns\.age\.mean: expected a finite"),
    (
        {"training__class_weights": [1.0, float("inf"), 1.0]},
        r"training\.class_weights\.1: expected a finite number, got NaN or infinity",
    ),
]


@pytest.mark.parametrize(("changes", "says"), FIELDS + TOGETHER + METHODS + INFINITE)
def test_a_wrong_configuration_is_refused_by_field(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        read(table(**changes))

    assert str(refusal.value).startswith("run.toml: ")


@pytest.mark.parametrize(("changes", "says"), TOGETHER + METHODS)
def test_a_message_is_checked_as_the_file_is(changes: dict[str, Any], says: str) -> None:
    """A site does not trust that its coordinator looked."""
    data = json.dumps(table(**changes)).encode()

    with pytest.raises(ConfigError, match=says):
        msgspec.json.decode(data, type=RunConfig)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"\xff", "can't decode byte 0xff"),
        ("", "missing required field `name`"),
        ("name = ", "Invalid value"),
        ("seed = 1\nseed = 2", "Cannot overwrite a value"),
        ("seed = " + "[" * 99_999, "nested too deeply"),
    ],
)
def test_what_is_not_toml_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^run\.toml: .*{says}"):
        parse(text, source="run.toml")


@pytest.mark.parametrize(
    ("method", "residual_rank", "rank"),
    [("fedavg", None, 4), ("altqr", None, 4), ("fedex", None, 16), ("flora", 2, 6)],
)
def test_a_method_with_a_residual_widens_the_adapter_and_keeps_its_scaling(
    method: str, residual_rank: int | None, rank: int
) -> None:
    changes: dict[str, Any] = {
        "federation__method": method,
        "federation__residual_rank": residual_rank,
    }
    config = read(table(**LORA, **changes))

    assert config.adapter.rank == rank
    assert config.adapter.alpha / rank == config.lora.alpha / config.lora.rank


PRIVATE = {"epsilon": 8, "delta": 1e-4}


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, "altqr"),
        ({"federation__mixed_ranks": True}, "altqr"),
        ({"robust": {"rule": "median"}}, "altqr"),
        ({"uplink": {"codec": "int8", "error_feedback": True}}, "altqr"),
        ({"privacy": PRIVATE}, "fedavg"),
        ({"privacy": PRIVATE, "federation__mixed_ranks": True}, "altqr"),
        ({"server": {"learning_rate": 0.1}}, "fedavg"),
        ({"federation__buffer": 3}, "fedavg"),
        ({"federation__normalize_steps": True}, "fedavg"),
        ({"lora__rank": 0}, "fedavg"),
        ({"model": {"base": "logistic"}}, "fedavg"),
        ({"privacy": PRIVATE, "federation__method": "ffa"}, "ffa"),
    ],
)
def test_without_a_method_the_situation_chooses_one_that_fits_it(
    changes: dict[str, Any], method: str
) -> None:
    assert read(table(**{**LORA, **changes})).method == method


CLIENT_PRIVATE: dict[str, Any] = {
    **LORA,
    "federation__quorum": 1,
    "client_privacy": {"epsilon": 3, "population": 500, "max_examples": 100},
}


@pytest.mark.parametrize("method", sorted(SEPARABLE))
def test_client_level_privacy_goes_with_one_update_per_client(method: Method) -> None:
    config = read(table(**CLIENT_PRIVATE, federation__method=method))

    assert (config.method, config.client_privacy) == (
        method,
        ClientPrivacy(epsilon=3, population=500, max_examples=100),
    )


def test_client_level_privacy_changes_no_default_method() -> None:
    assert read(table(**CLIENT_PRIVATE)).method == read(table(**LORA)).method == "altqr"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *(
            ({"federation__method": method}, rf'method = "{method}".*Take one of altqr, fedavg')
            for method in sorted(set(get_args(Method)) - SEPARABLE)
        ),
        ({"federation__mixed_ranks": True}, "mixed_ranks: noise covers one part"),
        ({"federation__buffer": 2, "federation__method": "ffa"}, "Leave buffer out"),
        ({"robust": {"rule": "median"}}, r"Leave \[robust\] out"),
        ({"federation__normalize_steps": True}, "and set training.local_steps"),
        ({"federation__quorum": 2}, "federation.quorum = 2.*Leave quorum out"),
        ({"training__holdout": 0.2}, "client_evaluation: metrics of clients are not noised"),
        (
            {"client_privacy": {"epsilon": 3, "population": 500}},
            'Set federation.weighting = "uniform", or client_privacy.max_examples',
        ),
        ({"federation__weighting": "uniform"}, "leave one of the two out"),
    ],
)
def test_client_level_privacy_refuses_what_it_does_not_account_for(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        read(table(**{**CLIENT_PRIVATE, **changes}))


def test_without_client_evaluation_clients_may_hold_records_out() -> None:
    quiet = {"training__holdout": 0.2, "federation__client_evaluation": False}

    assert read(table(**CLIENT_PRIVATE, **quiet)).training.holdout == 0.2


def test_what_stays_at_the_sites_is_told_as_a_part() -> None:
    assert read(TABLE).kept is None
    fedsa = read(table(**LORA, federation__method="fedsa"))
    assert fedsa.kept == Part(factors="B")
    assert read(table(**LORA, personal={"head": "local"})).kept == Part(factors="none")


def test_a_frozen_configuration_is_not_changed_by_accident() -> None:
    config = parse(MINIMAL, source="run.toml")

    with pytest.raises(AttributeError, match="immutable"):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("kind", get_args(ColumnType))
def test_the_only_column_of_a_type_is_found(kind: ColumnType) -> None:
    contract = msgspec.convert({"columns": {"x": {"type": kind}}}, Contract)

    assert contract.column(kind) == "x"


Wrap = Callable[[float], object]


@given(
    wraps=st.lists(st.sampled_from([lambda x: (0.0, x), lambda x: {"a": x, "b": 1}]), max_size=4),
    value=st.floats(),
)
def test_a_value_that_json_cannot_carry_is_found_at_any_depth(
    wraps: list[Wrap], value: float
) -> None:
    nested: Any = value
    for wrap in wraps:
        nested = wrap(nested)

    assert (not_finite(nested) is None) == (abs(value) <= 1.7976931348623157e308)
