"""What FLamby published, and its methods as runs of the product.

Means over seeds 42 to 46 of flamby/results/results_benchmark_fed_heart_disease/heart_seed*.csv
(owkin/FLamby, paper arXiv:2210.04620). The same files name the hyper-parameters:

    batches of 4; SGD; 15 rounds of 100 steps; every hospital in every round
    FedAvg η = 1e-3        FedProx η = 1e-3, μ = 0.01
    FedAdam η = 1e-2       server: 1e-2, β = (0.9, 0.999), τ = 1e-8, no bias correction
    FedYogi η = 0.003162   server: 1e-2, the same β and τ
    FedAdagrad η = 0.003162   server: 0.316228, β_1 = 0.9
    pooled, local          Adam, η = 1e-3, 50 epochs

FLamby's data loader goes on with its epoch in the next round; the product begins a new one.
"""

from __future__ import annotations

import msgspec

from anabranch.client.privacy import epsilon_of, plan_for
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Privacy, Server, Training
from benchmarks.fed_heart.data import Floats, Split
from benchmarks.fed_heart.federation import (
    RUN,
    changed,
    counts,
    federated,
    random_start,
    sizes,
    trained,
    with_mean,
)

SEEDS = (42, 43, 44, 45, 46)
EPOCHS = 50
DELTA = 1e-4
TOLERANCE = 0.015

# method -> accuracy of Cleveland, Hungary, Switzerland, VA, mean of the four, pooled test
PUBLISHED: dict[str, tuple[float, ...]] = {
    "pooled_training": (0.7827, 0.7640, 0.7500, 0.6444, 0.7353, 0.7953),
    "local": (0.7462, 0.7461, 0.7250, 0.7022, 0.7299, 0.6512),
    "fedavg": (0.7308, 0.7191, 0.6500, 0.6400, 0.6850, 0.7480),
    "fedprox": (0.7308, 0.7191, 0.6500, 0.6400, 0.6850, 0.7480),
    "fedadam": (0.7519, 0.7461, 0.7375, 0.6667, 0.7255, 0.7787),
    "fedyogi": (0.7596, 0.7528, 0.7375, 0.6756, 0.7314, 0.7787),
    "fedadagrad": (0.7596, 0.7528, 0.7375, 0.6756, 0.7314, 0.7787),
}
# ε -> mean of the four hospitals, DP-FedAvg with δ = 1e-4. The ε are nominal: see the page.
PUBLISHED_PRIVATE = {50.0: 0.7016, 10.0: 0.7004, 5.0: 0.7036, 1.0: 0.6853, 0.1: 0.6056}


def nominal_epsilon(epsilon: float, num_examples: int, steps: int = 15 * 100) -> float:
    """Return the ε at δ = 1e-4 of FLamby's noise for a nominal one, at a hospital of that size.

    FLamby calibrates the noise to 15 epochs (`epochs = nrounds`) and takes 1500 steps. This
    grants it Poisson sampling, which its loop over the original loader does not do.
    """
    batches = -(-num_examples // 4)
    privacy = Privacy(epsilon=epsilon, delta=DELTA)
    training = Training(batch_size=4, local_steps=batches)
    plan = plan_for(privacy, training, rounds=15, num_examples=4 * batches)
    return epsilon_of([plan.spend(steps)], DELTA)


def server(kind: str, rate: float) -> Server:
    """Return FLamby's server optimiser for one logit as the product's for two."""
    return msgspec.convert(
        {
            "optimizer": kind,
            "learning_rate": rate / 2,
            "beta1": 0.9,
            "beta2": 0.999,
            "tau": 1e-8 / 2,
            "bias_correction": False,
        },
        Server,
    )


def run_of(rate: float, *, mu: float = 0.0, optimizer: Server | None = None) -> RunConfig:
    """Return a published federated method: its rates for one logit, halved for two."""
    config = changed(
        RUN,
        training={"learning_rate": rate / 2, "batch_size": 4, "local_steps": 100},
        federation={"rounds": 15, "proximal_mu": 2 * mu},
    )
    return msgspec.structs.replace(config, server=optimizer)


FEDERATED = {
    "fedavg": run_of(1e-3),
    "fedprox": run_of(1e-3, mu=0.01),
    "fedadam": run_of(1e-2, optimizer=server("adam", 1e-2)),
    "fedyogi": run_of(0.003162, optimizer=server("yogi", 1e-2)),
    "fedadagrad": run_of(0.003162, optimizer=server("adagrad", 0.316228)),
}
ALONE = msgspec.structs.replace(
    RUN.training, optimizer="adamw", learning_rate=1e-3 / 2, batch_size=4, local_epochs=EPOCHS
)


def reproduced(method: str, split: Split, seed: int) -> Floats:
    """Return the test accuracies of a published method for one seed, in the order of the table."""
    start = random_start(seed)
    model: Adapter | list[Adapter]
    if method == "pooled_training":
        model = trained(ALONE, split.pooled_train, start, seed)
    elif method == "local":
        model = [trained(ALONE, e, start, seed) for e in split.train]
    else:
        run = msgspec.structs.replace(FEDERATED[method], seed=seed)
        model = federated(run, split.train, start)
    return with_mean(counts(model, split) / sizes(split))
