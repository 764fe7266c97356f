"""Plans drawn from a seed: which fault strikes whom, and when.

Draws are one stream per (seed, kind, round), so a plan for more clients or more rounds has the
same faults for those there were. Who lies is drawn once, for the whole run, with round 0 in
the place of a round.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
import numpy as np

from anabranch.protocols.tables import Positive, Share
from anabranch.simulations.faults.plan import (
    Backdoor,
    ClockSkew,
    Corrupt,
    Crash,
    Duplicate,
    Fault,
    FaultPlan,
    Index,
    LabelFlip,
    Late,
    LostAnswer,
    LostRequest,
    Restart,
    Round,
    Scale,
    SignFlip,
    Trigger,
)


class Rates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often each kind strikes, and how hard."""

    lost_request: Share = 0.0  # chance, per client and round
    lost_answer: Share = 0.0
    duplicate: Share = 0.0
    late: Share = 0.0
    late_s: Positive = 60.0  # mean of the exponential delay
    corrupt: Share = 0.0
    crash: Share = 0.0
    crash_steps: Round = 10  # a crash comes after 0 to so many steps, evenly
    clock_skew: Share = 0.0  # share of the clients, for the whole run
    clock_skew_s: Positive = 300.0  # standard deviation
    sign_flip: Share = 0.0  # share of the clients, for the whole run; so for the others
    sign_flip_factor: Positive = 1.0
    scale: Share = 0.0
    scale_factor: Positive = 10.0
    label_flip: Share = 0.0
    backdoor: Share = 0.0
    backdoor_target: Index = 0
    backdoor_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    restart: Share = 0.0  # chance, per round


# The place of a kind in its stream's seed: never to be changed, or plans change with it.
STREAMS = {
    "lost-request": 1, "lost-answer": 2, "duplicate": 3, "late": 4, "corrupt": 5, "crash": 6,
    "clock-skew": 7, "sign-flip": 8, "scale": 9, "label-flip": 10, "backdoor": 11, "restart": 12,
}  # fmt: skip
RESTARTS = ("training", "merging", "before-checkpoint", "after-checkpoint", "after-round")


def draw(
    rates: Rates, *, seed: int, clients: int, rounds: int, trigger: Trigger | None = None
) -> FaultPlan:
    """Return the plan of (seed, rates) for clients 0 … clients − 1 and rounds 1 … rounds."""
    faults = [
        *_of_rounds(rates, seed, clients, rounds),
        *_of_clients(rates, seed, clients),
        *_of_coordinator(rates, seed, rounds),
    ]
    return FaultPlan(seed=seed, trigger=trigger or Trigger(), faults=tuple(faults))


def _of_rounds(rates: Rates, seed: int, clients: int, rounds: int) -> Iterator[Fault]:
    for number in range(1, rounds + 1):
        for client, _ in _struck("lost-request", rates.lost_request, seed, clients, number):
            yield LostRequest(client=client, round=number)
        for client, _ in _struck("lost-answer", rates.lost_answer, seed, clients, number):
            yield LostAnswer(client=client, round=number)
        for client, u in _struck("duplicate", rates.duplicate, seed, clients, number):
            of: Literal["request", "answer"] = "request" if u[0] < 0.5 else "answer"
            yield Duplicate(client=client, round=number, of=of)
        for client, u in _struck("late", rates.late, seed, clients, number):
            yield Late(client=client, round=number, seconds=-rates.late_s * float(np.log1p(-u[0])))
        for client, u in _struck("corrupt", rates.corrupt, seed, clients, number):
            yield _corrupt(client, number, u)
        for client, u in _struck("crash", rates.crash, seed, clients, number):
            yield Crash(client=client, round=number, steps=int(u[0] * (rates.crash_steps + 1)))


def _corrupt(client: int, number: int, u: tuple[float, ...]) -> Corrupt:
    """Return one of the ways in which bytes are corrupted.

    The JSON of a request is cut or garbage: a flipped bit of it may be a valid request for
    something else, which only the transport's own checks can find.
    """
    of: Literal["request", "answer"] = "request" if u[0] < 0.25 else "answer"
    part: Literal["frame", "json"] = "frame" if u[1] < 0.5 else "json"
    ways: tuple[Literal["flip", "cut", "garbage"], ...] = ("cut", "garbage", "flip")
    ways = ways[:2] if (of, part) == ("request", "json") else ways
    how = ways[int(u[2] * len(ways))]
    return Corrupt(client=client, round=number, of=of, part=part, how=how)


def _of_clients(rates: Rates, seed: int, clients: int) -> Iterator[Fault]:
    for client, u in _struck("clock-skew", rates.clock_skew, seed, clients, 0):
        normal = float(np.sqrt(-2 * np.log1p(-u[0])) * np.cos(2 * np.pi * u[1]))  # Box, Muller
        yield ClockSkew(client=client, seconds=rates.clock_skew_s * normal)
    for client, _ in _struck("sign-flip", rates.sign_flip, seed, clients, 0):
        yield SignFlip(client=client, factor=rates.sign_flip_factor)
    for client, _ in _struck("scale", rates.scale, seed, clients, 0):
        yield Scale(client=client, factor=rates.scale_factor)
    for client, _ in _struck("label-flip", rates.label_flip, seed, clients, 0):
        yield LabelFlip(client=client)
    for client, _ in _struck("backdoor", rates.backdoor, seed, clients, 0):
        yield Backdoor(client=client, target=rates.backdoor_target, share=rates.backdoor_share)


def _of_coordinator(rates: Rates, seed: int, rounds: int) -> Iterator[Fault]:
    for number in range(1, rounds + 1):
        for _, u in _struck("restart", rates.restart, seed, 1, number):
            at = RESTARTS[int(u[0] * len(RESTARTS))]
            yield msgspec.convert({"kind": "restart", "round": number, "at": at}, Restart)


def _struck(
    kind: str, rate: float, seed: int, clients: int, number: int
) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yield (client, three uniform numbers in [0, 1)) for every client that is struck.

    Row i of the stream is client i's, whoever else there is.
    """
    if not rate:
        return
    draws = np.random.default_rng([seed, STREAMS[kind], number]).random((clients, 4))
    for client in np.flatnonzero(draws[:, 0] < rate):
        yield int(client), tuple(draws[client, 1:].tolist())
