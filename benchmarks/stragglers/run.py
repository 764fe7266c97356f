"""FedProx's experiment on stragglers, run again: synthetic(1,1), 0, 50 and 90 % stragglers.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith 2020, "Federated Optimization in Heterogeneous
Networks" (arXiv:1812.06127), figure 1, right column: 30 devices, multinomial logistic regression,
SGD of rate 0.01, batches of 10, 10 devices a round, E = 20 epochs. In every round a share of the
chosen devices are stragglers: they get through x epochs, x uniform on 1 … 20.

    fedavg     drops stragglers
    partial    merges what they managed; FedProx with mu = 0
    fedprox    the same with mu = 1, the paper's value for this data set

Devices, batches and stragglers of a round are the same for all three. The generator is ours,
seeded, with the law of the paper; its authors' data is not published whole. A figure is the global
training loss Σ n_k F_k / Σ n_k, which the paper's figure 1 draws.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

import numpy as np
import torch
from flwr.app import Message

from anabranch.client.data.records import Records
from anabranch.client.flower import pack_refused
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.messages import Refused
from anabranch.server.charts import Line, line_chart
from anabranch.server.evaluation import initial_adapter
from anabranch.server.svg import Unit, stacked
from anabranch.simulations import engines
from anabranch.simulations.population.client import Conduct
from anabranch.simulations.population.clients import Partition, PopulationClients, client_name
from anabranch.simulations.population.synthetic import synthetic
from benchmarks.harness import ROOT, Figure, header, options, report

Method = Literal["fedavg", "partial", "fedprox"]
METHODS: tuple[Method, ...] = ("fedavg", "partial", "fedprox")
SHARES = (0.0, 0.5, 0.9)
SEEDS = (0, 1)
ROUNDS = 100
QUICK_ROUNDS = 8
EPOCHS = 20
LAST = 5  # rounds that stand for the end
MU = 1.0
MOST_RECORDS = 2_000  # of a device: the law has a heavy tail, and a round lasts as long as it
COHORT = 10
PACKAGES = ("torch", "flwr", "numpy")

RUN = """
name = "synthetic"
seed = {seed}
[task]
kind = "tabular-classification"
labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
[data.columns]
label = {{ type = "label" }}
{columns}
[model]
base = "logistic"
[training]
optimizer = "sgd"
momentum = 0.0
learning_rate = 0.01
batch_size = 10
local_epochs = {epochs}
max_grad_norm = 1e9               # the paper does not clip
[federation]
method = "fedavg"
rounds = {rounds}
cohort = {cohort}
proximal_mu = {mu}
client_evaluation = false
"""


@dataclass
class Stragglers:
    """Who is slow in a round, and how far it gets: drawn from the round's devices.

    A Tampering that sees who was asked; with `drop` a straggler gives up instead of answering,
    which is FedAvg's rule. It may be chosen again in the next round.
    """

    share: float
    seed: int
    drop: bool

    def __post_init__(self) -> None:
        self._asked: dict[int, set[int]] = {}  # round -> devices

    def request(self, client: int, message: Message) -> list[Message]:
        if message.metadata.message_type == "train":
            self._asked.setdefault(int(message.metadata.group_id), set()).add(client)
        return [message]

    def reply(self, client: int, reply: Message, request: Message) -> list[Message]:
        if request.metadata.message_type != "train" or not self.drop:
            return [reply]
        if self.epochs(client, int(request.metadata.group_id)) is None:
            return [reply]
        late = Refused(site=client_name(client), reason="internal", message="a straggler")
        return [Message(pack_refused(late), reply_to=request)]

    def epochs(self, client: int, number: int) -> int | None:
        """Return the epochs that a straggler manages; None: it is none."""
        asked = sorted(self._asked[number])
        rng = np.random.default_rng([self.seed, number])
        slow = rng.permutation(asked)[: round(self.share * len(asked))].tolist()
        epochs = rng.integers(1, EPOCHS + 1, len(slow)).tolist()
        return dict(zip(slow, epochs, strict=True)).get(client)

    def limit(self, client: str, number: int, planned: int) -> int:
        """Return the steps that a device gets through."""
        epochs = self.epochs(int(client.removeprefix("client-")), number)
        return planned if epochs is None or self.drop else planned * epochs // EPOCHS


def run_config(method: Method, seed: int, rounds: int) -> RunConfig:
    columns = "\n".join(f'x{i:02d} = {{ type = "number" }}' for i in range(60))
    mu = MU if method == "fedprox" else 0.0
    toml = RUN.format(
        seed=seed, columns=columns, epochs=EPOCHS, rounds=rounds, cohort=COHORT, mu=mu
    )
    return parse(toml, source="synthetic")


def losses(method: Method, share: float, seed: int, rounds: int) -> list[float]:
    """Return the global training loss after every round."""
    made = synthetic(1.0, 1.0, seed=seed, most_records=MOST_RECORDS)
    records, partition = made.records, made.partition
    config, stragglers = (
        run_config(method, seed, rounds),
        Stragglers(share, seed, method == "fedavg"),
    )
    conduct = Conduct(step_limit=stragglers.limit)
    curve: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        clients = PopulationClients(records, partition, Path(folder), conduct=conduct)
        engines.run(
            "cohort",
            config,
            clients,
            initial_adapter(config),
            run_name=f"{method}-{seed}",
            tampering=stragglers,
            checkpoint=lambda number, adapter: curve.append(loss(adapter, records, partition)),
        )
    return curve


def loss(adapter: Adapter, records: Records, partition: Partition) -> float:
    """Return the mean cross-entropy over all devices' training records."""
    weight, bias = (torch.from_numpy(adapter.arrays[f"head.{n}"]) for n in ("weight", "bias"))
    x, y = torch.from_numpy(np.asarray(records.inputs)), torch.from_numpy(records.labels)
    rows = torch.from_numpy(np.concatenate([partition.train(i) for i in range(len(partition))]))
    logits = x[rows] @ weight.T + bias
    return float(torch.nn.functional.cross_entropy(logits, y[rows]))


def name_of(method: Method, share: float) -> str:
    return f"{method}_{share * 100:.0f}"


def compared(curves: dict[str, list[list[float]]], share: float, rounds: int) -> list[Figure]:
    """Return FedAvg's loss over FedProx's: over all rounds, and at the end."""
    found = []
    for name, window, target in (("", rounds, ">= 1"), ("_at_the_end", LAST, None)):
        dropped, kept = (
            [statistics.mean(curve[-window:]) for curve in curves[name_of(method, share)]]
            for method in ("fedavg", "fedprox")
        )
        ratios = [a / b for a, b in zip(dropped, kept, strict=True)]
        found.append(
            Figure(
                figure=f"loss.fedavg_over_fedprox_{share * 100:.0f}{name}",
                value=statistics.median(ratios),
                unit="ratio",
                target=target,
                spread=(min(ratios), max(ratios)),
                note=f"mean of {window} rounds; above 1: FedProx with partial work beats FedAvg "
                "that drops stragglers",
            )
        )
    return found


PANEL = 280.0  # height of a chart of three lines


def draw(curves: dict[str, list[list[float]]]) -> str:
    """Return one SVG file: a chart per share of stragglers, one under another."""
    unit, charts = Unit("{:.2f}".format, "{:.2g}".format), []
    for share in SHARES:
        label = f"global training loss, {share:.0%} stragglers"
        lines = [_line(method, curves[name_of(method, share)]) for method in METHODS]
        charts.append(line_chart(lines, label=label, unit=unit, y_title=label, zero=True))
    says = "Global training loss of FedAvg, partial work and FedProx under stragglers"
    return stacked(says, charts, PANEL)


def _line(method: Method, runs: Sequence[Sequence[float]]) -> Line:
    """Return the mean over seeds."""
    mean = np.mean(runs, axis=0)
    return Line(method, tuple((float(i + 1), float(value)) for i, value in enumerate(mean)))


def main(argv: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, argv)
    torch.set_num_threads(1)
    rounds, seeds = (QUICK_ROUNDS, SEEDS[:1]) if chosen.quick else (ROUNDS, SEEDS)
    figures, curves = [], dict[str, list[list[float]]]()
    for share in SHARES:
        for method in METHODS:
            name = name_of(method, share)
            curves[name] = [losses(method, share, seed, rounds) for seed in seeds]
            last = [statistics.mean(curve[-LAST:]) for curve in curves[name]]
            figures.append(
                Figure(
                    figure=f"loss.{name}",
                    value=statistics.mean(last),
                    unit="nats",
                    spread=(min(last), max(last)) if len(last) > 1 else None,
                    note=f"mean of the last {LAST} of {rounds} rounds, {len(seeds)} seeds",
                )
            )
            print(f"{name:16} {figures[-1].value:.4f}", flush=True)
    figures += [one for share in SHARES[1:] for one in compared(curves, share, rounds)]
    if not chosen.quick:
        (ROOT / "docs" / "images" / "stragglers.svg").write_text(draw(curves))
    head = header("stragglers", packages=PACKAGES, threads=1, seed=SEEDS[0], quick=chosen.quick)
    report(head, figures, chosen.json)


if __name__ == "__main__":
    main()
