"""The client-level audit of a run: canary clients through the coordinator's own rule.

As in "one-shot" auditing (Andrew et al. 2024, arXiv:2302.03098) canary clients send updates in
random directions, far longer than S; here directions are orthogonal and every canary client is
in the federation by a fair coin, so that the guesses prove a bound without further assumptions
(client/audit/guesses.py). All other clients of the population send nothing: the guarantee holds
for every set of clients, and its adversary knows what the others send.

What runs is the product's: `with_client_privacy` around the run's own rule, `PoissonCohorts` for
the draws, a fresh ChaCha20 stream for draws and noise. The noisy mean of every round is looked
at, before the rule inside makes the next adapter of it. Nothing of it is published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.client.audit.canaries import Canaries, Seen, draw_directions
from anabranch.client.audit.checks import Check, Ints
from anabranch.client.audit.evidence import Claim, canary_guesses, mechanism_checks
from anabranch.client.audit.replay import MOST_REPLAYS, Replay
from anabranch.client.audit.report import Part, part_of
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.part import Part as Slice
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.aggregation.choose import rule_for
from anabranch.server.aggregation.private import ClientPlan, with_client_privacy
from anabranch.server.aggregation.rule import Merged, Rule
from anabranch.server.client_privacy import PoissonCohorts, plan_of

SCORE = "Σ over rounds of ⟨v_i, noisy mean update⟩; v_i the canary client's direction"
THREAT_MODEL = (
    "sees every round's noisy mean, knows all other clients' updates, not who is in a cohort"
)


def audit_clients(
    config: RunConfig,
    first: Adapter,
    *,
    canaries: int,
    rng: np.random.Generator,
    on_replay: Callable[[], None] = lambda: None,
) -> tuple[Claim, list[Replay]]:
    """Replay the coordinator's rounds with canary clients, starting from `first`.

    Raises PrivacyError if the run has no [client_privacy], or is refused as the run itself.
    """
    plan = plan_of(config)
    if plan is None:
        raise PrivacyError("this run has no [client_privacy]: there is no client-level claim")
    each = min(canaries, _most(config, plan, first))
    count = min(-(-canaries // each), MOST_REPLAYS)
    replays = []
    for i in range(count):
        replays.append(replay(config, plan, first, min(each, canaries - i * each), rng))
        on_replay()
    return claim_of(plan), replays


def claim_of(plan: ClientPlan) -> Claim:
    """Return what the plan promises of one client, and the noise that its update gets."""
    return Claim(
        epsilon=plan.epsilon,
        delta=plan.delta,
        sigma=plan.update_noise,
        sample_rate=plan.sample_rate,
        steps=plan.rounds,
    )


def client_checks(
    claim: Claim, replays: list[Replay], rng: np.random.Generator, level: float
) -> list[Check]:
    """Return all tests of the client-level guarantee."""
    guessed = canary_guesses(replays, claim)
    first = Check(
        name="canaries",
        p_value=guessed.p_value,
        found=f"{guessed.best.correct} of {guessed.best.guessed} guesses right",
        expected=f"what ε = {claim.epsilon:.3f} allows",
    )
    return [first, *mechanism_checks(replays, claim, rng, level)]


def client_part(claim: Claim, replays: list[Replay], checks: list[Check], level: float) -> Part:
    """Return the client-level part of the report, every test at `level`."""
    return part_of(
        "clients",
        "client",
        claim,
        canary_guesses(replays, claim),
        checks,
        replays=len(replays),
        score=SCORE,
        threat_model=THREAT_MODEL,
        level=level,
    )


def replay(
    config: RunConfig, plan: ClientPlan, first: Adapter, canaries: int, rng: np.random.Generator
) -> Replay:
    """Run all rounds once with `canaries` canary clients; coins and directions come from `rng`."""
    included = rng.random(canaries) < 0.5
    names = [f"canary-{i}" for i in range(int(included.sum()))]
    others = [f"client-{i}" for i in range(plan.population - canaries)]
    secret = Randomness.fresh()
    means: list[Delta] = []
    inner = rule_for(msgspec.structs.replace(config, client_privacy=None))
    rule = with_client_privacy(_recorded(inner, means), plan, secret.normal)
    cohorts = PoissonCohorts(plan, secret.sample)
    state, adapter = rule.init(first)
    fits: list[Seen] = []
    for number in range(1, plan.rounds + 1):
        adapter = rule.open(state, adapter, number)
        part = rule.part(adapter.spec, number, "", adapter.spec.rank)
        tensors = _tensors(adapter.spec, part)
        size = len(tensors)
        probe = Canaries(
            directions=draw_directions(np.arange(size), canaries, rng),
            tensors=tensors,
            included=included,
            records=len(others),
            expected_batch=plan.expected_cohort,
            clipping_norm=state.clipping_norm,
        )
        drawn = cohorts.draw([*others, *names])
        at = [int(name.removeprefix("canary-")) for name in drawn if name.startswith("canary-")]
        sent = Delta(adapter.spec, _zeros(adapter, part), plan.max_examples or 1, part=part)
        deltas = _deltas(sent, probe.gradients(at, size))
        state, merged = rule.merge(state, adapter, deltas)
        adapter = merged.adapter
        probe.observe(len(drawn), {n: torch.from_numpy(a) for n, a in means[-1].arrays.items()})
        fits.append(probe.seen)
    return Replay(included=included, fits=tuple(fits))


def _most(config: RunConfig, plan: ClientPlan, first: Adapter) -> int:
    """Return how many canary clients one replay holds: orthogonal, and within the population."""
    rule = rule_for(msgspec.structs.replace(config, client_privacy=None))
    spec = first.spec
    sizes = [
        len(_tensors(spec, rule.part(spec, number, "", spec.rank)))
        for number in range(1, plan.rounds + 1)
    ]
    return min(plan.population, *sizes)


def _tensors(spec: AdapterSpec, part: Slice) -> Ints:
    """Return which tensor each value of a part is of, by its place among the adapter's names."""
    places = {name: place for place, name in enumerate(sorted(spec.shapes))}
    shapes = sorted(part.shapes(spec).items())
    return np.concatenate([np.full(int(np.prod(s)), places[name]) for name, s in shapes])


def _recorded(rule: Rule[Any], means: list[Delta]) -> Rule[Any]:
    """Return `rule`, noting down every delta that it is given to merge: the private means."""

    def merge(state: Any, adapter: Adapter, deltas: Iterable[Delta]) -> tuple[Any, Merged]:
        given = list(deltas)
        means.extend(given)
        return rule.merge(state, adapter, given)

    return replace(rule, merge=merge)


def _zeros(adapter: Adapter, part: Slice) -> dict[str, NDArray[np.float32]]:
    return {name: np.zeros(shape, np.float32) for name, shape in part.shapes(adapter.spec).items()}


def _deltas(like: Delta, flat: Tensor) -> Iterator[Delta]:
    """Yield one delta of the shapes of `like` for every row; tensors stand in order of names."""
    names = sorted(like.arrays)
    ends = np.cumsum([like.arrays[name].size for name in names])[:-1]
    for row in flat.numpy():
        pieces = zip(names, np.split(row, ends), strict=True)
        arrays = {name: piece.reshape(like.arrays[name].shape) for name, piece in pieces}
        yield replace(like, arrays=arrays)
