"""One cell of the grid: a federation over the product's own parts, without its engine.

    coordinator   rule = choose.rule_for(config); rule.init, open, part, merge
    client        load_adapter, fit or fit_private of its part, delta = after − before
    uplink        bytes of the frame that would be sent; with a codec, what comes out of it

Rounds, messages and failures are the engine's affair and tested there; the arithmetic here is
what runs in the product. With a fixed head (a seeded random one, as in FFA-LoRA, arXiv:2403.12313)
all learning is the adapter's: the head is neither trained nor sent.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from anabranch.client.privacy import plan_for
from anabranch.client.site import round_seed
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import load_adapter, read_adapter
from anabranch.client.tuning.metrics import evaluate
from anabranch.client.tuning.private import fit_private
from anabranch.client.tuning.text import TextClassifier
from anabranch.client.tuning.training import Schedule, fit, predict
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.part import Part
from anabranch.protocols.tables import (
    RESIDUAL,
    Federation,
    Lora,
    Privacy,
    Robust,
    Training,
    Uplink,
)
from anabranch.server.aggregation.choose import rule_for
from anabranch.server.aggregation.rule import Rule
from benchmarks.aggregation import data, model
from benchmarks.aggregation.model import LastMatrix

RANK = 8
MIXED = (2, 4, 8)  # client k has rank MIXED[k mod 3]
ROUNDS = 20
BATCH = 16
COHORT = {50: 20}  # clients asked per round; all of them otherwise
LOCAL_STEPS = {4: 12, 8: 8, 10: 6, 50: 4}
PRIVATE_BATCH = 64  # expected; AUTO-S clipping
PRIVATE_STEPS = 2
EXTRA_RANK = 24  # fedex, flora: of the frozen adapter that holds what the factors cannot

PLAIN = Uplink()
Head = Literal["fixed", "trained"]
Tamper = Callable[[int, Delta], Delta]  # (client, what it would send) -> what it sends


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One federation of the grid, but for its learning rate."""

    dataset: str
    head: Head
    clients: int
    partition: str
    epsilon: float  # 0: no privacy
    ranks: Literal["equal", "mixed"]
    rule: str  # a method, or "fedavg-skip"
    seed: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one federation came to."""

    accuracy: float
    macro_f1: float
    uplink_bytes: float  # mean frame of a client and round
    uplink_floats: float
    downlink_bytes: float  # mean frame of the adapter sent out, fp32
    error: float  # mean aggregation error over the rounds; NaN where the rule measures none
    cpu_seconds: float


@dataclass(frozen=True, eq=False)
class Prepared:
    """A corpus with its base model and cached features."""

    corpus: data.Corpus
    source: TextClassifier
    train: model.Cached
    held: dict[str, Examples]  # "validation" and "test"


def prepare(corpus: data.Corpus, cache: Path) -> Prepared:
    """Return a corpus ready for use; features are computed into `cache` if they are not there."""
    source = model.whole(corpus)
    parts = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    cached = {
        part: model.features(source, records, cache / f"{corpus.name}-{records.digest()[:16]}.npy")
        for part, records in parts.items()
    }
    held = {part: model.examples(cached[part], parts[part]) for part in ("validation", "test")}
    return Prepared(corpus, source, cached["train"], held)


def config_for(cell: Cell, labels: tuple[str, ...], rate: float, rounds: int = ROUNDS) -> RunConfig:
    """Return the run.toml of a cell."""
    method, _, absent = cell.rule.partition("-")
    private = cell.epsilon > 0
    lora = Lora(rank=RANK, alpha=2.0 * RANK, targets=("dense",))
    federation: dict[str, Any] = {"method": method, "absent_ranks": absent or "zero"}
    if method in RESIDUAL:
        federation["residual_rank"] = EXTRA_RANK
    return msgspec.structs.replace(
        model.config_for(cell.dataset, labels, lora),
        federation=Federation(rounds=rounds, client_evaluation=False, **federation),
        training=Training(
            learning_rate=rate,
            schedule="linear",  # over the whole run: the last rounds disturb the result less
            batch_size=PRIVATE_BATCH if private else BATCH,
            local_steps=PRIVATE_STEPS if private else LOCAL_STEPS[cell.clients],
        ),
        privacy=Privacy(epsilon=cell.epsilon, clipping="automatic") if private else None,
        seed=cell.seed,
    )


def federate(
    prepared: Prepared,
    cell: Cell,
    rate: float,
    *,
    held: Literal["validation", "test"] = "test",
    rounds: int = ROUNDS,
    robust: Robust | None = None,
    uplink: Uplink = PLAIN,
    tamper: Tamper = lambda client, delta: delta,
) -> Outcome:
    """Run one federation; `tamper` turns what a client trained into what it sends."""
    started = time.process_time()
    config = config_for(cell, prepared.corpus.labels, rate, rounds)
    config = msgspec.structs.replace(config, robust=robust, uplink=uplink)
    rule = rule_for(config)
    classifier = model.classifier(prepared.source, config.adapter, cell.seed)
    clients = Clients.of(prepared, cell, config, classifier)
    state, adapter = rule.init(first_adapter(classifier, cell))
    errors, down = [], []
    for number in range(1, rounds + 1):
        sent = rule.open(state, adapter, number)
        down.append(len(wire.encode(sent)))
        state, merged = rule.merge(state, sent, clients.train(rule, sent, number, tamper))
        adapter = merged.adapter
        errors.append(math.nan if merged.error is None else merged.error)
    figures = score(classifier, adapter, prepared.held[held])
    return Outcome(
        accuracy=figures["accuracy"],
        macro_f1=figures["macro_f1"],
        uplink_bytes=statistics.mean(clients.frames),
        uplink_floats=statistics.mean(clients.floats),
        downlink_bytes=statistics.mean(down),
        error=statistics.mean(errors),
        cpu_seconds=time.process_time() - started,
    )


def first_adapter(classifier: LastMatrix, cell: Cell) -> Adapter:
    """Return the adapter of round 1: B = 0; a fixed head has seeded orthonormal rows."""
    adapter = read_adapter(classifier)
    if cell.head == "trained":
        return adapter
    shape = adapter.arrays["head.weight"].shape
    rng = np.random.default_rng([cell.seed, 1])
    rows = np.linalg.qr(rng.standard_normal(shape[::-1]))[0].T.astype(np.float32)
    return Adapter(adapter.spec, {**adapter.arrays, "head.weight": rows})


def score(classifier: LastMatrix, adapter: Adapter, examples: Examples) -> dict[str, float]:
    """Return the product's figures of an adapter on held-out records."""
    load_adapter(classifier, adapter)
    return evaluate(predict(classifier, examples.features), examples.labels.numpy())


@dataclass(eq=False)
class Clients:
    """All clients of a federation in one process, one after another on one classifier."""

    cell: Cell
    config: RunConfig
    classifier: LastMatrix
    examples: list[Examples]
    frames: list[int] = dataclasses.field(default_factory=list)  # bytes, one per delta
    floats: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def of(
        cls, prepared: Prepared, cell: Cell, config: RunConfig, classifier: LastMatrix
    ) -> Clients:
        """Return the clients of a cell with their records."""
        train = prepared.corpus.train
        parts = data.partition(train, cell.partition, cell.clients, cell.seed)
        examples = [model.examples(prepared.train, train, part.tolist()) for part in parts]
        return cls(cell, config, classifier, examples)

    def train(self, rule: Rule[Any], sent: Adapter, number: int, tamper: Tamper) -> Iterator[Delta]:
        """Yield what the coordinator receives from this round's cohort."""
        for client in self.cohort(number):
            limit = RANK if self.cell.ranks == "equal" else MIXED[client % len(MIXED)]
            part = rule.part(sent.spec, number, str(client), limit)
            start = sent.only(part) if rule.truncates else sent
            load_adapter(self.classifier, start)
            trained = msgspec.structs.replace(part, dense=self.cell.head == "trained")
            steps = self.fit(client, number, trained)
            after = read_adapter(self.classifier)
            n = len(self.examples[client])
            delta = after.minus(start, num_examples=n, part=trained, steps=steps)
            yield self.received(tamper(client, delta), part, number)

    def cohort(self, number: int) -> list[int]:
        """Return the clients asked in a round, ascending."""
        count = COHORT.get(self.cell.clients, self.cell.clients)
        rng = np.random.default_rng([self.cell.seed, number])
        return sorted(rng.choice(self.cell.clients, count, replace=False).tolist())

    def fit(self, client: int, number: int, part: Part) -> int:
        """Train one client's part in place; return its steps."""
        training, examples = self.config.training, self.examples[client]
        steps, rounds = training.local_steps, self.config.federation.rounds
        assert steps is not None  # config_for sets it
        if self.config.privacy is None:
            seed = round_seed(self.cell.seed, str(client), number)
            schedule = Schedule(first_step=(number - 1) * steps, total_steps=rounds * steps)
            fit(
                self.classifier,
                examples,
                training,
                steps=steps,
                schedule=schedule,
                seed=seed,
                part=part,
            )
            return steps
        plan = plan_for(self.config.privacy, training, rounds, len(examples))
        seed = round_seed(self.cell.seed, f"noise/{client}", number) >> 1
        fit_private(
            self.classifier,
            examples,
            plan,
            training,
            steps=steps,
            step_offset=(number - 1) * steps,
            part=part,
            engine="opacus",  # the model calls lora_A and lora_B by itself (model.py)
            generator=torch.Generator().manual_seed(seed),  # a benchmark: no guarantee is given
        )
        return steps

    def received(self, delta: Delta, part: Part, number: int) -> Delta:
        """Return what the coordinator reads in this delta's frame, as a delta of the rule's part.

        A fixed head is in the part, not in the frame: its change is zero.
        """
        rng = np.random.default_rng([self.cell.seed, number, len(self.frames)])
        frame = wire.encode(delta, codec=self.config.uplink.codec, rng=rng)
        self.frames.append(len(frame))
        self.floats.append(sum(array.size for array in delta.arrays.values()))
        spec = delta.spec
        read = wire.decode_delta(frame, spec, delta.part, codec=self.config.uplink.codec)
        zeros = {name: np.zeros(shape, np.float32) for name, shape in part.shapes(spec).items()}
        arrays = {**zeros, **read.arrays}
        return Delta(spec, arrays, read.num_examples, part=part, steps=read.steps)
