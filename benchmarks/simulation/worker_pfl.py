"""pfl (PyTorch): its FederatedAveraging over its SimulatedBackend, in one process or several."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["PFL_PYTORCH_DEVICE"] = "cpu"

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

from benchmarks.simulation.gate import Gate
from benchmarks.simulation.peer import Job, Peer, jobs
from benchmarks.simulation.workloads import BATCH


class Rounds(TrainingProcessCallback):  # type: ignore[misc]  # pfl has no types here
    """Ends every round at the gate."""

    def __init__(self, gate: Gate, peer: Peer, job: Job) -> None:
        self._gate, self._peer, self._job, self._round = gate, peer, job, 0

    def on_train_begin(self, *, model: object) -> Metrics:
        """Wait for the first round."""
        self._gate.begin(self._job.loss_round)
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: object, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Report a round."""
        self._round += 1
        self._gate.lap(self._peer.loss, last=self._round == self._job.rounds)
        return False, Metrics()


def run(job: Job, gate: Gate) -> None:
    """Run the rounds of a job."""
    peer = Peer(job)
    module = peer.model
    model = PyTorchModel(
        model=module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(peer.parameters.values(), 1.0),
    )
    turns = [turn for one in peer.plan for turn in one]
    places = iter(range(len(turns)))

    def dataset(place: int) -> Dataset:
        return Dataset(peer.records(*turns[place]), user_id=str(turns[place][0]))

    federated = FederatedDataset(dataset, lambda: next(places))
    backend = SimulatedBackend(
        training_data=federated, val_data=federated, postprocessors=[WeightByUser()]
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job.rounds,
            evaluation_frequency=10**6,
            train_cohort_size=len(peer.plan[0]),
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_learning_rate=job.work.rate, local_num_epochs=1, local_batch_size=BATCH
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[Rounds(gate, peer, job)],
    )


if __name__ == "__main__":
    gate = Gate()
    for job in jobs():
        run(job, gate)
