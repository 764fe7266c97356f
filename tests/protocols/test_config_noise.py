"""Combinations with noise of secure sums that are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from anabranch.protocols.errors import ConfigError
from tests.noise_cases import CLIENT, RECORD, config


@pytest.mark.parametrize("base", [RECORD, CLIENT])
def test_what_goes_together(base: dict[str, Any]) -> None:
    assert config(base).secure_aggregation is not None


def test_local_noise_stays_the_default_and_goes_with_everything() -> None:
    run = config(RECORD, privacy__noise=None, training__local_steps=5, training__momentum=0.9)
    assert run.privacy is not None
    assert run.privacy.noise == "local"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"secure_aggregation": None}, r'"distributed" needs \[secure_aggregation\]'),
        ({"training__local_steps": 2}, "needs training.local_steps = 1"),
        ({"training__optimizer": "adamw"}, 'needs training.optimizer = "sgd"'),
        ({"training__momentum": 0.9}, "needs training.momentum = 0"),
        ({"training__weight_decay": 0.1}, "needs training.weight_decay = 0"),
        ({"training__schedule": "cosine"}, 'needs training.schedule = "constant"'),
        ({"training__warmup": 0.1}, "needs training.warmup = 0"),
        ({"privacy__clipping": "automatic"}, 'needs privacy.clipping = "flat"'),
        ({"privacy__delta": None}, "needs privacy.delta"),
        (
            {"training__batch_size": 16_385},
            "at most 16384, got 16385: .* Lower training.batch_size",
        ),
        ({"federation__weighting": "examples"}, 'needs federation.weighting = "uniform"'),
        ({"federation__normalize_steps": True}, "does not go with federation.normalize_steps"),
        (
            {"personal": {"head": "local"}, "lora__rank": 4, "federation__method": "ffa"},
            "does not go with fedsa or a local head",
        ),
        (
            {"federation__mixed_ranks": True, "lora__rank": 4, "federation__method": "altqr"},
            "does not go with federation.mixed_ranks",
        ),
        (
            {
                "robust": {"rule": "median"},
                "secure_aggregation__group": 5,
                "federation__method": "ffa",
                "lora__rank": 4,
            },
            "does not go with secure_aggregation.group",
        ),
        ({"client_privacy": CLIENT["client_privacy"]}, r"does not go with \[client_privacy\]"),
    ],
)
def test_record_level_refuses(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config(RECORD, **changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"client_privacy__clipping": "adaptive"}, 'needs client_privacy.clipping = "fixed"'),
        (
            {"federation__weighting": "examples", "client_privacy__max_examples": 10},
            'needs federation.weighting = "uniform"',
        ),
    ],
)
def test_client_level_refuses(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config(CLIENT, **changes)
