"""Server optimisers: torch's Adam is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Delta
from anabranch.protocols.config import Federation, Server
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.aggregation.adaptive import constant, fedadam, linear_decay
from anabranch.server.aggregation.choose import rule_for
from anabranch.server.aggregation.fedavg import fedavg
from tests.runs import table_run

SPEC = AdapterSpec(
    base="0" * 64,
    tokenizer="",
    rank=2,
    alpha=4.0,
    targets=("l",),
    tensors=(("head.weight", (3, 5)), ("l.lora_A.weight", (2, 4)), ("l.lora_B.weight", (3, 2))),
)


def deltas(seed: int, scale: float = 1.0) -> list[Delta]:
    rng = np.random.default_rng(seed)
    return [
        Delta(
            SPEC, {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in SPEC.tensors}, k
        )
        for k in (3, 7)
    ]


def test_rounds_of_fedadam_are_steps_of_torch_s_adam_on_minus_the_mean() -> None:
    rule = fedadam(fedavg(), constant(0.1, 0.3), beta1=0.8, beta2=0.95, tau=1e-3)
    state = rule.init()
    torch_values = {n: torch.zeros(s, dtype=torch.float64) for n, s in SPEC.tensors}
    groups = [
        {"params": [p], "lr": 0.3 if n.startswith("head.") else 0.1}
        for n, p in torch_values.items()
    ]
    adam = torch.optim.Adam(groups, betas=(0.8, 0.95), eps=1e-3)
    ours = {n: np.zeros(s) for n, s in SPEC.tensors}
    for number in range(5):
        cohort = deltas(number)
        mean = fedavg().apply(None, cohort)[1]
        for name, p in torch_values.items():
            p.grad = -torch.from_numpy(mean.arrays[name].astype(np.float64))
        adam.step()

        state, update = rule.apply(state, cohort)

        for name, value in ours.items():
            value += update.arrays[name]
            np.testing.assert_allclose(value, torch_values[name].numpy(), atol=1e-6)
    assert update.num_examples == 10


@given(scale=st.floats(1e-3, 1e3))
def test_the_first_update_does_not_depend_on_the_size_of_the_deltas(scale: float) -> None:
    rule = fedadam(fedavg(), constant(0.1, 0.1), tau=1e-12)

    one, scaled = (rule.apply(rule.init(), deltas(0, s))[1] for s in (1.0, scale))

    for name, array in one.arrays.items():
        np.testing.assert_allclose(scaled.arrays[name], array, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(np.abs(array), 0.1, rtol=1e-4)


def test_a_value_that_nobody_changed_stays() -> None:
    rule = fedadam(fedavg(), constant(0.1, 0.1))
    still = [Delta(SPEC, {n: np.zeros(s, np.float32) for n, s in SPEC.tensors}, 1)]

    update = rule.apply(rule.init(), still)[1]

    assert update.norm() == 0.0


def test_linear_decay_ends_one_step_above_zero() -> None:
    rate = linear_decay(0.4, 0.8, 4)

    assert [rate("l.lora_A.weight", t) for t in (1, 2, 3, 4)] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert rate("head.bias", 1) == 0.8


def test_the_configuration_chooses_the_rule() -> None:
    plain = table_run()
    server = "\n[server]\nlearning_rate = 0.1\nhead_learning_rate = 0.2\nschedule = 'linear'\n"
    config = table_run(extra=server)
    assert plain.server is None
    assert isinstance(config.server, Server)
    assert isinstance(config.federation, Federation)

    mean = rule_for(plain).apply(None, deltas(0))[1]
    rule = rule_for(config)
    state, first = rule.apply(rule.init(), deltas(0))
    second = rule.apply(state, deltas(0))[1]

    np.testing.assert_array_equal(
        mean.arrays["head.weight"],
        fedavg().apply(None, deltas(0))[1].arrays["head.weight"],
    )
    np.testing.assert_allclose(np.abs(first.arrays["head.weight"]), 0.2, rtol=1e-3)
    np.testing.assert_allclose(np.abs(second.arrays["l.lora_A.weight"]), 0.05, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta1": 1.0}, r"expected beta1 in \[0, 1\), got 1\.0"),
        ({"beta2": -0.1}, r"expected beta2 in \[0, 1\), got -0\.1"),
        ({"tau": 0.0}, r"expected tau > 0, got 0\.0"),
    ],
)
def test_constants_out_of_range_are_refused(options: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fedadam(fedavg(), constant(0.1, 0.1), **options)
