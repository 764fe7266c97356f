"""Every engine gives the run that clients give one after another: drawn configurations.

A population of eight clients, some of one record, is trained for two rounds by the sequential
engine and by cohorts. Whatever a client did, said or was refused must be the same, client by
client, and so must the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from anabranch.client.data.records import Records
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.tables import Training
from anabranch.server.evaluation import initial_adapter
from anabranch.simulations import engines
from anabranch.simulations.population.books import SimulatedBooks
from anabranch.simulations.population.client import Conduct
from anabranch.simulations.population.clients import Partition, PopulationClients
from tests.client.tuning.conftest import encoders  # noqa: F401 - a fixture
from tests.simulations.rig import Events

RECORDS = 120
LABELS = '["a", "b", "c"]'
METHODS = ["fedavg", "ffa", "rolora", "altqr", "fedex", "flora", "flexlora", "hetlora", "fedsa"]
TOLERANCE = 2e-5
HUGE = 1e6
COMPARED = ("steps", "num_examples", "loss", "norm", "epsilon", "noise_multiplier", "metrics")
# name -> task, [model] and [lora]
MODELS = {
    "logistic": ("tabular", 'base = "logistic"', "rank = 0"),
    "mlp": ("tabular", 'base = "mlp"\nhidden = [5, 7]', 'rank = 3\ntargets = ["hidden.*"]'),
    "mlp-full": (
        "tabular",
        'base = "mlp"\nhidden = [5, 7]',
        'rank = 0\nmodules_to_save = ["hidden.*"]',
    ),
    "vit": (
        "image",
        'base = "vit"\npatch = 4\nwidth = 8\ndepth = 2\nheads = 2',
        'rank = 3\nlayers = "last:1"',
    ),
    "cnn": ("image", 'base = "cnn"', 'rank = 0\nmodules_to_save = ["*"]'),
    "bert": ("text", 'base = "{bert}"\nmax_tokens = 16', 'rank = 3\nlayers = "last:2"'),
    "roberta": (
        "text",
        'base = "{roberta}"\nmax_tokens = 16\npooling = "cls"',
        'rank = 2\nlayers = "last:1"\ntargets = ["query"]',
    ),
    "mpnet": ("text", 'base = "{mpnet}"\nmax_tokens = 16', 'rank = 2\ntargets = ["q", "k"]'),
}
COLUMNS = {
    "tabular": '"n0" = { type = "number" }\n"n1" = { type = "number" }',
    "image": '"x" = { type = "image" }',
    "text": '"x" = { type = "text" }',
}


@dataclass(frozen=True)
class Fewer:
    """A step limit: nothing, one step, all but one, or all of them."""

    seed: int

    def __call__(self, name: str, number: int, planned: int) -> int:
        return [0, 1, max(planned - 1, 0), planned][(self.seed + number + int(name[-1])) % 4]


@dataclass(frozen=True)
class Own:
    """Settings of a client's own; client 3 diverges."""

    def __call__(self, name: str, training: Training) -> Training:
        if name.endswith("3"):
            return msgspec.structs.replace(
                training, optimizer="sgd", learning_rate=1e30, max_grad_norm=None
            )
        return msgspec.structs.replace(training, learning_rate=training.learning_rate / 2)


@dataclass(frozen=True)
class Lying:
    """Other labels at every third client."""

    def __call__(self, name: str, honest: Records) -> Records:
        if int(name[-1]) % 3:
            return honest
        return Records(honest.inputs, (honest.labels + 1) % 3)


@dataclass(frozen=True, eq=False)
class World:
    """One drawn run."""

    config: RunConfig
    clients: Callable[[Path], PopulationClients]


def records_of(task: str) -> Records:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, RECORDS).astype(np.int64)
    if task == "tabular":
        return Records(rng.normal(labels[:, None], 1, (RECORDS, 2)).astype(np.float32), labels)
    if task == "image":
        return Records(rng.random((RECORDS, 1, 8, 8)).astype(np.float32), labels)
    words = [rng.integers(0, 35, rng.integers(1, 11)) for _ in range(RECORDS)]
    return Records([" ".join(f"w{i}" for i in text) for text in words], labels)


@st.composite
def worlds(draw: st.DrawFn, folders: dict[str, Path], name: str) -> World:
    def pick(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    task, model, lora = MODELS[name]
    adapted = "rank = 0" not in lora
    private, seed = pick(False, False, True), draw(st.integers(0, 99))
    method = pick(*METHODS) if adapted else "fedavg"
    # AdamW moves a value by its learning rate even where a gradient is hardly more than rounding.
    optimizer, rate = pick(("sgd", 0.03), ("sgd", 0.003), ("adamw", 2e-4))
    weights = pick('"none"', "[0.5, 1.0, 3.0]", '"none"' if private else '"balanced"')
    clip = pick("max_grad_norm = 0.3", "", "max_grad_norm = 1.0")
    training = f"""
        batch_size = {pick(1, 3, 50)}
        optimizer = "{optimizer}"
        learning_rate = {rate}
        weight_decay = {pick(0.0, 0.1)}
        momentum = {pick(0.0, 0.9)}
        schedule = "{pick("constant", "linear", "cosine")}"
        warmup = {pick(0.0, 0.3)}
        class_weights = {weights}
        holdout = 0.2
        cache_bytes = {pick(1 << 26, 0, 2000)}
        {clip}
        {pick("local_steps = 1", "local_steps = 3") if private else pick("local_epochs = 2", "")}
    """
    federation = f"""
        rounds = 2
        cohort = 6
        method = "{method}"
        proximal_mu = {pick(0.0, 0.3)}
        mixed_ranks = {pick("true", "false")}
        client_evaluation = {pick("true", "false") if not private else "false"}
        {pick("", "", "buffer = 3", "normalize_steps = true")}
    """
    tables = pick(
        "",
        '[uplink]\ncodec = "fp16"\nerror_feedback = true',
        '[server]\noptimizer = "momentum"\nlearning_rate = 0.5',
        '[robust]\nrule = "median"',
        '[personal]\nhead = "local"',
        "[personal]\nrank = 2",
    )
    privacy = f"""
        [privacy]
        epsilon = 30.0
        delta = 0.01
        clipping = "{pick("flat", "automatic", "per-layer", "adaptive")}"
    """
    text = f"""
        name = "drawn"
        seed = {seed}
        [task]
        kind = "{task}-classification"
        labels = {LABELS}
        [data.columns]
        {COLUMNS[task]}
        "y" = {{ type = "label" }}
        [model]
        {model.format(**folders)}
        [lora]
        {lora}
        [training]
        {training}
        [federation]
        {federation}
        {tables}
        {privacy if private else ""}
    """
    try:
        config = parse(text, source="drawn")
    except ConfigError:  # tables that do not go with one another
        config = parse(text.replace(federation, PLAIN).replace(tables, ""), source="drawn")
    sizes = [draw(st.sampled_from([1, 2, 5, 9])) for _ in range(8)]
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    rows = np.random.default_rng(seed).permutation(RECORDS)[: start[-1]].astype(np.int64)
    held = np.array([int(size > 2) for size in sizes])
    ranks = np.array([pick(0, 1, 2) for _ in sizes]) if config.federation.mixed_ranks else None
    conduct = Conduct(
        step_limit=pick(None, Fewer(seed)) if not private else None,
        training_of=pick(None, Own()) if not private else None,
        poisoned=pick(None, None, Lying()),
        noise_seed=seed,
    )
    records = records_of(task)

    def clients(folder: Path) -> PopulationClients:
        return PopulationClients(
            records,
            Partition(rows, start, held),
            folder,
            max_ranks=ranks,
            books=SimulatedBooks() if private else None,
            conduct=conduct,
        )

    return World(config, clients)


PLAIN = '\n        rounds = 2\n        cohort = 6\n        method = "fedavg"\n'
PLAIN += "        client_evaluation = false\n"


def ran(
    engine: engines.Engine, world: World, folder: Path, workers: int = 1
) -> tuple[Adapter | str, Events]:
    """Return the adapter, or why there is none, and what happened."""
    events = Events()
    try:
        result = engines.run(
            engine,
            world.config,
            world.clients(folder),
            initial_adapter(world.config),
            run_name="drawn-1",
            workers=workers,
            event=events,
        )
    except RunError as error:
        return str(error), events
    return result.adapter, events


def require_same(world: World, folder: Path, engine: engines.Engine, workers: int = 1) -> None:
    alone, first = ran("sequential", world, folder / "alone")
    together, second = ran(engine, world, folder / "together", workers)

    for kind in ("site_trained", "site_evaluated", "site_failed"):
        ours, theirs = by_client(second, kind), by_client(first, kind)
        assert ours.keys() == theirs.keys(), kind
        for key, facts in theirs.items():
            for name in COMPARED:
                expected = facts.get(name)
                close = expected and pytest.approx(expected, rel=1e-3, abs=TOLERANCE)
                assert ours[key].get(name) == close, (key, name)
            assert ours[key].get("reason") == facts.get("reason")
            assert "see the site's log" not in facts.get("message", ""), facts  # unforeseen
    assert isinstance(together, str) == isinstance(alone, str)
    if isinstance(alone, Adapter) and isinstance(together, Adapter):
        for name, array in alone.arrays.items():
            relative = 1e-3 if world.config.uplink.codec != "fp32" else TOLERANCE
            absolute, most = relative, float(np.abs(array).max())
            if most > HUGE:  # of a client that diverges: rounding grew with its largest value
                relative, absolute = 0.0, 1e-2 * most
            got, wanted = (a.astype(np.float64) for a in (together.arrays[name], array))
            np.testing.assert_allclose(got, wanted, relative, absolute, err_msg=name)


def by_client(events: Events, kind: str) -> dict[tuple[str, int], dict[str, Any]]:
    return {(e["site"], e.get("round", 0)): e for e in events.of(kind)}


FEW = settings(
    max_examples=3,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,  # the same draws on every machine
)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@FEW
@given(data=st.data())
def test_a_cohort_is_the_run_of_its_clients_one_after_another(
    name: str,
    encoders: dict[str, Path],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    world = data.draw(worlds(encoders, name))
    require_same(world, tmp_path_factory.mktemp("run"), "cohort")


@pytest.mark.slow
@settings(FEW, max_examples=2)
@given(data=st.data())
def test_two_workers_are_the_run_of_their_clients_one_after_another(
    encoders: dict[str, Path],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    name = data.draw(st.sampled_from(["mlp", "vit", "bert"]))
    world = data.draw(worlds(encoders, name))
    require_same(world, tmp_path_factory.mktemp("run"), "cohort", workers=2)
