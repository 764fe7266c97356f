"""Every rule that adds makes of a secure sum what it makes of the updates themselves."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.protocols.tables import Personal, Robust, Server
from tests.secure_cases import SummingToy, furthest, plain_of, secured, step_of, toys
from tests.simulations.federation import Federation
from tests.simulations.rig import SIZES, adapter, config

FINE = 28  # bits: what a round rounds is small beside what later rounds make of it
LINEAR: list[dict[str, Any]] = [
    {"method": "fedavg"},
    {"method": "fedavg", "weighting": "uniform"},
    {"method": "fedavg", "normalize_steps": True},
    {"method": "fedavg", "proximal_mu": 0.1},
    {"method": "ffa"},
    {"method": "rolora"},
    {"method": "fedsa"},
]


@pytest.mark.parametrize("federation", LINEAR, ids=str)
def test_a_rule_that_adds_is_within_a_step_of_the_grid_in_one_round(
    federation: dict[str, Any],
) -> None:
    run = secured(config(rounds=1, **federation), value_bits=16)

    got, plain = Federation(toys(SIZES), run=run).run(), plain_of(toys(SIZES), run)

    uniform = "weighting" in federation
    steps = 3 if "normalize_steps" in federation else 1  # a toy's: the mean is multiplied by them
    weights = [1.0 if uniform else float(size) for size in SIZES.values()]
    off = furthest(got.adapter, plain.adapter)
    assert 0 < off <= steps * step_of(run, len(SIZES), weights)
    assert off < furthest(got.adapter, adapter()) / 10


@pytest.mark.parametrize("federation", [*LINEAR, {"method": "altqr"}], ids=str)
def test_every_rule_that_sums_merges_the_same(federation: dict[str, Any]) -> None:
    run = secured(config(rounds=3, **federation), value_bits=FINE)

    got, plain = Federation(toys(SIZES), run=run).run(), plain_of(toys(SIZES), run)

    assert furthest(got.adapter, plain.adapter) < 1e-4  # rounds pull towards a common target
    assert furthest(got.adapter, adapter()) > 0.01
    assert [r.method for r in got.history] == [r.method for r in plain.history]


@pytest.mark.parametrize(("low", "moved"), [(2, 2), (3, 1)])
def test_ranks_are_trained_in_company_only(low: int, moved: int) -> None:
    run = secured(config(rounds=1, method="ffa", mixed_ranks=True), value_bits=FINE)
    sites = [SummingToy(f"site-{i}", 10 + i, step=1.0) for i in range(6)]
    for site in sites[:low]:  # of the others one may drop out, and three are needed
        site.max_rank = 1

    federation = Federation(sites, run=run)
    result = federation.run()

    changed = result.adapter.arrays["layer.lora_B.weight"] - adapter().arrays["layer.lora_B.weight"]
    assert np.count_nonzero(np.isclose(changed, 1.0, atol=1e-4).all(axis=0)) == moved
    assert np.count_nonzero(changed.any(axis=0)) == moved
    assert federation.events.of("secure_dropout") == []


@pytest.mark.parametrize("method", ["ffa", "rolora", "altqr"])
def test_every_method_of_mixed_ranks_is_summed(method: str) -> None:
    run = secured(config(rounds=2, method=method, mixed_ranks=True), value_bits=FINE)
    sites = toys(SIZES)
    sites[1].max_rank = 1

    got = Federation(sites, run=run).run()

    assert furthest(got.adapter, adapter()) > 0.01
    assert [len(one.trained) for one in got.history] == [4, 4]


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi", "adagrad"])
def test_a_server_optimiser_works_on_the_secure_mean(optimizer: Any) -> None:
    """With τ = 0.01 an optimiser makes of an error e in the mean 100 e at most."""
    table = Server(optimizer=optimizer, learning_rate=0.5, tau=0.01)
    run = secured(msgspec.structs.replace(config(rounds=3), server=table), value_bits=FINE)

    got, plain = Federation(toys(SIZES), run=run).run(), plain_of(toys(SIZES), run)

    assert furthest(got.adapter, plain.adapter) < 1e-4
    assert furthest(got.adapter, adapter()) > 0.05


def test_the_head_that_sites_keep_is_in_no_sum() -> None:
    run = secured(msgspec.structs.replace(config(rounds=2), personal=Personal(head="local")))

    federation = Federation(toys(SIZES), run=run)
    got, plain = federation.run(), plain_of(toys(SIZES), run)

    assert furthest(got.adapter, plain.adapter) < 1e-4
    np.testing.assert_array_equal(got.adapter.arrays["head.weight"], 0.0)
    whole = Federation(toys(SIZES), run=secured(config(rounds=2)))
    whole.run()
    values = [one.events.of("secure_sum_started")[0]["values"] for one in (federation, whole)]
    assert values == [14, 29]


def test_a_robust_rule_works_on_the_means_of_groups() -> None:
    tables = config(rounds=1, method="ffa", weighting="uniform")
    base = msgspec.structs.replace(tables, robust=Robust(rule="median"))
    run = secured(base, group=3, minimum=3)
    sizes = {f"site-{i}": 10 for i in range(9)}
    sites = [SummingToy(name, 10, step=1.0) for name in sizes]
    sites[4].step = -3.9  # one liar spoils one group, and the median is of three

    federation = Federation(sites, run=run)
    result = federation.run()

    assert np.allclose(result.adapter.arrays["head.weight"], 1.0, atol=1e-3)
    (told,) = federation.events.of("secure_sum")
    assert sorted(map(len, told["groups"])) == [3, 3, 3]
    assert sorted(name for one in told["groups"] for name in one) == sorted(sizes)
