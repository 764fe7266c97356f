"""What all peers share: the product's own module, trained as their users train one.

The whole model runs forward in every step, from the records themselves. Texts are padded to the
longest of their batch, or with `padding = "fixed"` to 32 tokens. The convolutional network is
written out as its users write it, in torch's default memory layout; with `layout = "last"` it
gets the product's.

Run in the peers' environment: nothing here may import Flower, Opacus or pfl.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.convolution import ConvolutionalNetwork
from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.lora import trainable_parameters
from benchmarks.simulation.workloads import BATCH, WORKLOADS, Workload

JOBS = "SIMULATION_JOBS"  # environment variable
LOSS_RECORDS = 1000
Batch = tuple[Tensor, ...]  # (x, y), or of texts (ids, lengths, y)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is asked for."""

    workload: str
    rounds: int
    loss_round: int = 0  # after which the loss is reported; 0: never
    clients: int = 0  # 0: the workload's
    cohort: int = 0  # 0: the workload's
    plan: str = ""  # file; see plan.py
    threads: int = 1
    workers: int = 1
    layout: str = "default"  # of images: "default" or "last"
    padding: str = "batch"  # of texts: "batch" or "fixed"
    engine: Literal["cohort", "alone", "ray"] = "cohort"  # ours
    base_dtype: Literal["fp32", "bf16"] = "fp32"  # ours
    nodes: int = 0  # of a Ray cluster on this machine; ours
    shared: int = 0  # records that all clients draw theirs from; 0: each has its own; ours

    @property
    def work(self) -> Workload:
        """Return the workload, with as many clients as the job says."""
        workload = WORKLOADS[self.workload]
        clients, cohort = self.clients or workload.clients, self.cohort or workload.cohort
        return replace(workload, clients=clients, cohort=cohort)


def dump(jobs: Sequence[Job]) -> str:
    """Return jobs as JOBS holds them."""
    return json.dumps([asdict(one) for one in jobs])


def jobs() -> list[Job]:
    """Return what this process has to do, one after another, and set torch's threads."""
    found = [Job(**one) for one in json.loads(os.environ[JOBS])]
    torch.set_num_threads(found[0].threads)
    return found


class PeerModel(nn.Module):
    """Logits and loss of a batch; `loss` and `metrics` are what pfl asks a module for."""

    def __init__(self, classifier: Classifier, *, layout: str, padding: str) -> None:
        super().__init__()
        self.classifier = classifier
        self._layout, self._padding = layout, padding

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the logits of whole records."""
        if lengths is not None:
            longest = x.shape[1] if self._padding == "fixed" else int(lengths.max())
            mask = torch.arange(longest) < lengths[:, None]
            return self.classifier.logits(x[:, :longest], mask)
        base = self.classifier.base
        if isinstance(base, ConvolutionalNetwork):
            if self._layout == "last":
                x = x.contiguous(memory_format=torch.channels_last)
            x = functional.max_pool2d(functional.relu(base.conv1(x)), 2)
            x = functional.max_pool2d(functional.relu(base.conv2(x)), 2)
            logits: Tensor = self.classifier.head(functional.relu(base.dense(x.flatten(1))))
            return logits
        return self.classifier.logits(x, None)

    def loss(self, *batch: Tensor, eval: bool = False) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        return functional.cross_entropy(self(*batch[:-1]), batch[-1])

    def metrics(self, *batch: Tensor, eval: bool = False) -> dict[str, float]:
        """Return nothing: no engine evaluates in a round."""
        return {}


class Peer:
    """Model and records of a workload, and the turns of its rounds."""

    def __init__(self, found: Job) -> None:
        workload = found.work
        classifier = load_classifier(workload.config(found.rounds))
        records = workload.all_records()
        x, mask = collate(classifier.encode(records.inputs))
        labels = torch.from_numpy(records.labels)
        self.data: Batch = (x, labels) if mask is None else (x, mask.sum(dim=1), labels)
        self.model = PeerModel(classifier, layout=found.layout, padding=found.padding)
        self.parameters = dict(trainable_parameters(classifier))
        self._each, self._rate = workload.each, workload.rate
        self.plan = _turns(Path(found.plan))

    def records(self, client: int, order: list[int]) -> Batch:
        """Return a client's records in the order of a round."""
        at = torch.tensor(order) + client * self._each
        return tuple(tensor[at] for tensor in self.data)

    def train(self, client: int, order: list[int]) -> None:
        """Train one client, in place."""
        own = self.records(client, order)
        optimizer = torch.optim.SGD(self.parameters.values(), lr=self._rate)
        for batch in split(own):
            optimizer.zero_grad()
            self.model.loss(*batch).backward()
            optimizer.step()

    @torch.no_grad()
    def loss(self) -> float:
        """Return the mean cross-entropy over the first records, with the values as they are."""
        return evaluate(self.model.classifier, self.data)


def split(own: Batch) -> Iterator[Batch]:
    """Yield batches of consecutive records."""
    for at in range(0, len(own[-1]), BATCH):
        yield tuple(tensor[at : at + BATCH] for tensor in own)


@torch.no_grad()
def evaluate(classifier: Classifier, data: Batch) -> float:
    """Return the mean cross-entropy over the first records: the same on all engines."""
    x, labels = data[0][:LOSS_RECORDS], data[-1][:LOSS_RECORDS]
    mask = torch.arange(x.shape[1]) < data[1][:LOSS_RECORDS, None] if len(data) == 3 else None
    parts = [
        functional.cross_entropy(
            classifier.logits(x[i : i + 100], None if mask is None else mask[i : i + 100]),
            labels[i : i + 100],
            reduction="sum",
        )
        for i in range(0, len(x), 100)
    ]
    return float(cast(Tensor, sum(parts))) / len(x)


def values(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return copies of the trained values."""
    return {name: p.detach().clone() for name, p in parameters.items()}


@torch.no_grad()
def put(parameters: dict[str, nn.Parameter], start: dict[str, Tensor]) -> None:
    """Overwrite the trained values."""
    for name, parameter in parameters.items():
        parameter.copy_(start[name])


def _turns(file: Path) -> list[list[tuple[int, list[int]]]]:
    content = json.loads(file.read_bytes())
    return [[(turn["client"], turn["order"]) for turn in one] for one in content]
