from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import ONE_FACTOR, REGAUGED, Method
from anabranch.server.aggregation.choose import rule_for
from anabranch.server.aggregation.fedavg import fedavg
from anabranch.server.aggregation.rule import Merged, Rule
from tests.lowrank import random_adapter, random_delta, spec_of
from tests.runs import table_run

METHODS = get_args(Method)


def config(method: str, federation: str = "", tables: str = "") -> RunConfig:
    fields = f'rounds = 2\nmethod = "{method}"\n{federation}'
    return table_run(("rounds = 2", fields), extra=tables)


def one_round(rule: Rule[Any], first: Adapter, clients: int = 3) -> tuple[Adapter, Merged]:
    """Return the adapter sent out in round 1 and what became of it."""
    state, adapter = rule.init(first)
    sent = rule.open(state, adapter, 1)
    spec = sent.spec
    parts = [rule.part(spec, 1, f"site-{i}", 3) for i in range(clients)]
    deltas = [random_delta(spec, i, part, i + 1).times(0.1) for i, part in enumerate(parts)]
    return sent, rule.merge(state, sent, deltas)[1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_a_round(method: str) -> None:
    run = config(method)
    rule = rule_for(run)

    _, merged = one_round(rule, random_adapter(spec_of(run.adapter.rank), 0))

    assert rule.name == method
    assert rule.regauges == (method in REGAUGED)
    assert merged.clients == 3
    assert merged.num_examples == 6
    factors = rule.part(spec_of(run.adapter.rank), 1, "a", 3).factors
    assert (factors == "both") == (method not in ONE_FACTOR)


@pytest.mark.parametrize("method", METHODS)
def test_weighting_reaches_the_rule(method: str) -> None:
    first = random_adapter(spec_of(config(method).adapter.rank), 0)

    one, other = (
        one_round(rule_for(config(method, f'weighting = "{w}"')), first)[1].adapter
        for w in ("examples", "uniform")
    )

    assert any(not np.array_equal(a, other.arrays[name]) for name, a in one.arrays.items())


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fedsa"}))
def test_a_local_head_is_not_asked_for(method: str) -> None:
    rule = rule_for(config(method, tables='\n[personal]\nhead = "local"\n'))
    spec = spec_of(config(method).adapter.rank)

    sent, merged = one_round(rule, random_adapter(spec, 0))

    assert not rule.part(spec, 1, "site", 3).dense
    np.testing.assert_array_equal(merged.adapter.arrays["head.bias"], sent.arrays["head.bias"])


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi", "adagrad"])
def test_the_server_table_wraps_the_rule(optimizer: str) -> None:
    tables = (
        f'\n[server]\noptimizer = "{optimizer}"\nlearning_rate = 0.1\nhead_learning_rate = 0.2\n'
        "tau = 1e-6\nschedule = 'linear'\n"
    )
    rule = rule_for(config("fedavg", tables=tables))
    first = random_adapter(spec_of(3), 0)

    sent, merged = one_round(rule, first)

    plain = one_round(fedavg(), first)[1].adapter
    change = {n: a - sent.arrays[n] for n, a in merged.adapter.arrays.items()}
    gradient = {n: a - sent.arrays[n] for n, a in plain.arrays.items()}
    assert rule.name == f"fedavg+{optimizer}"
    steps = {
        "momentum": lambda d: d,
        "adam": lambda d: 0.1 * d / (np.sqrt(0.01 * d**2 + 1e-12) + 1e-6),
        "yogi": lambda d: 0.1 * d / (np.sqrt(0.01 * d**2 + 1e-12) + 1e-6),
        "adagrad": lambda d: 0.1 * d / (np.sqrt(d**2 + 1e-12) + 1e-6),
    }
    for name, rate in (("head.weight", 0.2), ("k.lora_A.weight", 0.1)):
        wanted = rate * steps[optimizer](gradient[name].astype(float))
        np.testing.assert_allclose(change[name], wanted, rtol=1e-2, atol=1e-6)


def test_bias_correction_reaches_adam() -> None:
    tables = "\n[server]\nlearning_rate = 0.1\nbias_correction = true\n"

    sent, merged = one_round(rule_for(config("ffa", tables=tables)), random_adapter(spec_of(3), 0))

    step = merged.adapter.arrays["k.lora_B.weight"] - sent.arrays["k.lora_B.weight"]
    np.testing.assert_allclose(np.abs(step), 0.1, rtol=1e-3)


def test_a_robust_rule_takes_the_place_of_the_mean() -> None:
    tables = '\n[robust]\nrule = "median"\n'

    sent, merged = one_round(
        rule_for(config("rolora", tables=tables)), random_adapter(spec_of(3), 0)
    )

    assert merged.error is None
    part = rule_for(config("rolora")).part(spec_of(3), 1, "site", 3)
    stack = [random_delta(spec_of(3), i, part).arrays["head.bias"] * 0.1 for i in range(3)]
    change = merged.adapter.arrays["head.bias"] - sent.arrays["head.bias"]
    np.testing.assert_allclose(change, np.median(stack, axis=0), atol=1e-6)


def test_flexlora_takes_robust_coefficients() -> None:
    tables = '\n[robust]\nrule = "krum"\nbyzantine = 1\n'
    first = random_adapter(spec_of(3), 0)

    _, merged = one_round(rule_for(config("flexlora", tables=tables)), first, clients=5)

    plain = one_round(rule_for(config("flexlora")), first, clients=5)[1]
    assert not np.allclose(
        merged.adapter.arrays["head.bias"], plain.adapter.arrays["head.bias"], atol=1e-4
    )


def test_absent_ranks_reach_fedavg() -> None:
    first = random_adapter(spec_of(3), 0)
    rules = [rule_for(config("fedavg", f'absent_ranks = "{how}"')) for how in ("zero", "skip")]
    deltas = [random_delta(spec_of(3), i, rules[0].part(first.spec, 1, "", i + 2)) for i in (0, 1)]

    zero, skip = (rule.merge(None, first, deltas)[1].adapter.arrays for rule in rules)

    holder = first.arrays["k.lora_A.weight"][2] + deltas[1].arrays["k.lora_A.weight"][2]
    np.testing.assert_allclose(skip["k.lora_A.weight"][2], holder, atol=1e-6)
    np.testing.assert_allclose(zero["k.lora_A.weight"][2], holder / 2, atol=1e-6)


@pytest.mark.parametrize("method", ["fedavg", *sorted(ONE_FACTOR)])
def test_normalised_steps_need_deltas_that_say_theirs(method: str) -> None:
    with pytest.raises(ValueError, match="does not say how many steps it took"):
        one_round(rule_for(config(method, "normalize_steps = true")), random_adapter(spec_of(3), 0))


@pytest.mark.parametrize("method", ["fedex", "flora", "flexlora", "hetlora"])
def test_normalised_steps_do_not_go_with_products(method: str) -> None:
    with pytest.raises(ConfigError, match=f'does not go with federation.method = "{method}"'):
        config(method, "normalize_steps = true")
