"""FedProx's synthetic(α, β): clients whose models and inputs differ by known amounts.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks" (arXiv:1812.06127), section 5.1
and appendix C.1, from Shamir et al. 2014. For each client k, with 60 features and 10 labels:

    u_k ~ N(0, α)    W_k, b_k elementwise ~ N(u_k, 1)       how much local models differ: α
    B_k ~ N(0, β)    v_k elementwise ~ N(B_k, 1)            how much local inputs differ: β
    x ~ N(v_k, Σ), Σ diagonal with Σ_jj = j^(−1.2)
    y = argmax softmax(W_k x + b_k)

The number of records is lognormal(4, 2), rounded down, + 50: a power law. `iid` is the
paper's synthetic-IID: one W, b ~ N(0, 1) for all and v = 0.

α and β are standard deviations, as in the paper's code; for 0 and 1 that is the same as variances.
The seed is ours: the paper's data cannot be made again, its law can.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anabranch.client.data.records import Records
from anabranch.protocols.errors import ConfigError
from anabranch.simulations.population.clients import Partition
from anabranch.simulations.population.dealing import held_sizes
from anabranch.simulations.population.devices import Floats, Ints

FEATURES = 60
LABELS = 10


@dataclass(frozen=True, eq=False)
class Synthetic:
    """The records of all clients, client after client, and which of them are whose."""

    records: Records  # inputs float32 (n, 60)
    partition: Partition


def synthetic(
    alpha: float,
    beta: float,
    *,
    clients: int = 30,
    seed: int,
    holdout: float = 0.1,
    iid: bool = False,
    most_records: int | None = None,
) -> Synthetic:
    """Return synthetic(alpha, beta), or synthetic-IID with `iid`; the same for the same seed.

    Of each client's records about holdout · size are held out (the paper's code: 0.1). The
    lognormal has a heavy tail; `most_records` cuts it. Raises ConfigError for values out of range.
    """
    if alpha < 0 or beta < 0 or clients < 1 or not 0 <= holdout < 1:
        raise ConfigError(
            f"synthetic: alpha {alpha:g}, beta {beta:g}, clients {clients}, holdout {holdout:g}; "
            "expected alpha, beta >= 0, clients >= 1 and 0 <= holdout < 1"
        )
    rng = np.random.default_rng([seed, 0x5E7])
    sizes = rng.lognormal(4.0, 2.0, clients).astype(np.int64) + 50
    if most_records is not None:
        sizes = np.minimum(sizes, most_records)
    model_mean = alpha * rng.standard_normal(clients)
    input_mean = beta * rng.standard_normal(clients)
    scale = np.arange(1, FEATURES + 1) ** (-1.2 / 2)
    shared = rng.standard_normal((FEATURES + 1, LABELS))
    inputs, labels = [], []
    for k in range(clients):
        model, centre = shared, np.zeros(FEATURES)
        if not iid:
            model = model_mean[k] + rng.standard_normal((FEATURES + 1, LABELS))
            centre = input_mean[k] + rng.standard_normal(FEATURES)
        x = centre + scale * rng.standard_normal((int(sizes[k]), FEATURES))
        inputs.append(x)
        labels.append(_labels(x, model))
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    records = Records(np.concatenate(inputs).astype(np.float32), np.concatenate(labels))
    rows = np.arange(len(records), dtype=np.int64)
    return Synthetic(records, Partition(rows, start, held_sizes(sizes, holdout)))


def _labels(x: Floats, model: Floats) -> Ints:
    """Return argmax(W x + b); `model` is W stacked on b, (61, 10)."""
    labels: Ints = (x @ model[:-1] + model[-1]).argmax(axis=1).astype(np.int64)
    return labels
