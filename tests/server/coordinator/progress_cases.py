"""Runs of every rule and optimizer, and what is kept of them after each round."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch

from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.config import RunConfig
from anabranch.server.coordinator.progress_file import write
from anabranch.server.progress import Progress
from anabranch.server.rounds import RoundEngine
from anabranch.simulations.virtual_grid import VirtualGrid
from tests.simulations.faults.faulty import Steady, executor
from tests.simulations.rig import SIZES, ToySite, adapter, config

METHODS = ["fedavg", "ffa", "rolora", "altqr", "fedex", "flora", "flexlora", "hetlora", "fedsa"]
OPTIMIZERS = ["momentum", "adam", "yogi", "adagrad"]
ROBUST = ["norm-clipping", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median",
          "centred-clipping"]  # fmt: skip


def run_of(method: str = "fedavg", rounds: int = 3, **tables: Any) -> RunConfig:
    extra = method in ("fedex", "flora")
    federation = {"residual_rank": 1} if extra else {}
    run = config(rounds=rounds, method=method, **federation)
    lora = {"lora": {"rank": 1 if extra else 2}}
    return msgspec.convert(msgspec.to_builtins(run) | lora | tables, RunConfig)


def private_run() -> RunConfig:
    run = config(rounds=3, cohort=60, weighting="uniform", client_evaluation=False)
    tables = {"client_privacy": {"epsilon": 20.0, "population": 100, "clipping": "adaptive"}}
    return msgspec.convert(msgspec.to_builtins(run) | tables, RunConfig)


CASES = (
    {f"method {method}": run_of(method) for method in METHODS}
    | {
        f"server {name}": run_of(server={"optimizer": name, "learning_rate": 0.1})
        for name in OPTIMIZERS
    }
    | {
        f"robust {rule}": run_of("ffa", robust={"rule": rule, "byzantine": 0, "trim": 0.25})
        for rule in ROBUST
    }
    | {
        "tiers": config(rounds=3, cohort=2, tiers=2),
        "buffer": config(rounds=3, buffer=2),
        "client privacy": private_run(),
    }
)


def engine_of(run: RunConfig, **hooks: Any) -> RoundEngine:
    private = run.client_privacy is not None
    sites = (
        [ToySite(f"toy-{i:03}", 10) for i in range(100)]
        if private
        else [ToySite(name, n) for name, n in sorted(SIZES.items())]
    )
    grid = VirtualGrid(executor(sites), len(sites), journeys=Steady(len(sites)))
    if private:
        hooks["randomness"] = Randomness.reproducible(torch.Generator().manual_seed(5))
    time: dict[str, Any] = {"clock": grid.clock, "sleep": grid.sleep, "poll_s": math.inf}
    return RoundEngine(grid, run, run="toy-1", **time, **hooks)


def progresses(run: RunConfig) -> list[Progress]:
    kept: list[Progress] = []
    engine_of(run, progress=kept.append).run(adapter())
    return kept


def data_of(progress: Progress) -> bytes:
    pieces: list[bytes] = []
    write(pieces.append, progress)
    return b"".join(pieces)


SAMPLE = Progress(run="r", config="c", adapter=adapter(), state=None, best=adapter(), sites={})
