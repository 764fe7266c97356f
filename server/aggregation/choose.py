"""From a run's tables to its rule: a method, an optimiser around it, privacy around both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import ONE_FACTOR, Server
from anabranch.server.aggregation.altqr import altqr
from anabranch.server.aggregation.fedavg import fedavg
from anabranch.server.aggregation.fedex import fedex
from anabranch.server.aggregation.fedsa import fedsa
from anabranch.server.aggregation.ffa import ffa
from anabranch.server.aggregation.flexlora import flexlora
from anabranch.server.aggregation.flora import flora
from anabranch.server.aggregation.hetlora import hetlora
from anabranch.server.aggregation.mean import Combine, normalized_mean, weighted_mean
from anabranch.server.aggregation.optimizers import (
    Optimizer,
    adagrad,
    adam,
    constant,
    linear_decay,
    momentum,
    with_optimizer,
    yogi,
)
from anabranch.server.aggregation.private import ClientPlan, Normal, with_client_privacy
from anabranch.server.aggregation.robust import coefficients_for, combine_for
from anabranch.server.aggregation.rolora import rolora
from anabranch.server.aggregation.rule import Rule

FACTOR_RULES: dict[str, Callable[..., Rule[None]]] = {
    "ffa": ffa,
    "rolora": rolora,
    "altqr": altqr,
    "fedsa": fedsa,
}


def rule_for(
    config: RunConfig, plan: ClientPlan | None = None, normal: Normal | None = None
) -> Rule[Any]:
    """Return the aggregation rule that `config` asks for.

    With [client_privacy] the plan of the run and a source of noise are needed; without them
    PrivacyError: the rule alone would publish what nobody has noised. Not with
    [secure_aggregation], whose sums come noised by their members.
    """
    rule = _without_privacy(config)
    if config.client_privacy is None or config.secure_aggregation is not None:
        return rule
    if plan is None or normal is None:
        raise PrivacyError(
            "[client_privacy]: a rule needs the run's plan and a source of noise "
            "(server/client_privacy.py, plan_of; client/tuning/randomness.py)"
        )
    return with_client_privacy(rule, plan, normal)


def _without_privacy(config: RunConfig) -> Rule[Any]:
    rule = _method(config)
    if config.personal.head == "local":
        rule = replace(rule, part=_without_dense(rule.part))
    if config.server is None:
        return rule
    return with_optimizer(rule, optimizer_for(config.server, config.federation.rounds))


def optimizer_for(server: Server, rounds: int) -> Optimizer:
    """Return the optimiser of a [server] table for a run of so many rounds."""
    head = server.head_learning_rate or server.learning_rate
    if server.schedule == "linear":
        rate = linear_decay(server.learning_rate, head, rounds)
    else:
        rate = constant(server.learning_rate, head)
    beta1, beta2, tau = server.beta1, server.beta2, server.tau
    match server.optimizer:
        case "momentum":
            return momentum(rate, beta=beta1)
        case "adagrad":
            return adagrad(rate, beta1=beta1, tau=tau)
        case "yogi":
            return yogi(rate, beta1=beta1, beta2=beta2, tau=tau)
        case "adam":
            correct = server.bias_correction
            return adam(rate, beta1=beta1, beta2=beta2, tau=tau, bias_correction=correct)


def _method(config: RunConfig) -> Rule[Any]:
    federation, weighting = config.federation, config.federation.weighting
    method = config.method
    if method == "fedavg":
        return fedavg(weighting, federation.absent_ranks, combine=_combine(config))
    if method in ONE_FACTOR:
        return FACTOR_RULES[method](weighting, seed=config.seed, combine=_combine(config))
    return _product_method(config)


def _combine(config: RunConfig) -> Combine:
    if config.robust is not None:
        return combine_for(config.robust)
    return normalized_mean if config.federation.normalize_steps else weighted_mean


def _product_method(config: RunConfig) -> Rule[Any]:
    """Return a rule on products of factors."""
    federation = config.federation
    match config.method:
        case "fedex":
            return fedex(config.lora.rank, federation.weighting)
        case "flora":
            return flora(config.lora.rank, config.seed, federation.weighting)
        case "flexlora":
            reweight = None if config.robust is None else coefficients_for(config.robust)
            return flexlora(federation.weighting, reweight)
        case _:
            return hetlora(federation.weighting)


def _without_dense(
    part: Callable[[AdapterSpec, int, str, int], Part],
) -> Callable[[AdapterSpec, int, str, int], Part]:
    """Return the same parts without dense tensors: the head stays at the sites."""

    def narrowed(spec: AdapterSpec, number: int, client: str, limit: int) -> Part:
        return msgspec.structs.replace(part(spec, number, client, limit), dense=False)

    return narrowed
