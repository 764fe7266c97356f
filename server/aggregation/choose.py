"""From a run's [federation] and [server] tables to its rule."""

from __future__ import annotations

from typing import Any

from anabranch.protocols.config import RunConfig
from anabranch.server.aggregation.adaptive import constant, fedadam, linear_decay
from anabranch.server.aggregation.fedavg import fedavg
from anabranch.server.aggregation.rule import Aggregator


def rule_for(config: RunConfig) -> Aggregator[Any]:
    """Return the aggregation rule that `config` asks for."""
    rule = fedavg(config.federation.weighting)
    server = config.server
    if server is None:
        return rule
    head = server.head_learning_rate or server.learning_rate
    if server.schedule == "linear":
        rate = linear_decay(server.learning_rate, head, config.federation.rounds)
    else:
        rate = constant(server.learning_rate, head)
    return fedadam(rule, rate, beta1=server.beta1, beta2=server.beta2, tau=server.tau)
