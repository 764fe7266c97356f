"""The peer on devices: the same LoRA step as an ExecuTorch training program.

Run by an interpreter that has executorch beside anabranch[client]; shapes are static, because
its exporter of the joint graph takes no others. SGD and data loading are left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from executorch.exir import EdgeCompileConfig, to_edge
from executorch.extension.training import _load_for_executorch_for_training
from torch import Tensor, nn
from torch.export import export
from torch.export.experimental import _export_forward_backward

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from benchmarks.edge import task

torch.set_num_threads(1)


class Loss(nn.Module):
    """Token ids, mask and labels to the mean cross-entropy."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and predictions."""
        logits = self.classifier.logits(ids, mask)
        return nn.functional.cross_entropy(logits, labels), logits.detach().argmax(1)


def step(records: int, tokens: int, count: int) -> dict[str, Any]:
    """Return CPU seconds of each of `count` forward and backward passes."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 100, (records, tokens), generator=rng)
    args = (ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(records) % 2)
    program = _export_forward_backward(
        export(Loss(load_classifier(task.config())), args, strict=False)
    )
    config = EdgeCompileConfig(_check_ir_validity=False)
    buffer = to_edge(program, compile_config=config).to_executorch().buffer
    with tempfile.NamedTemporaryFile(suffix=".pte") as file:
        file.write(buffer)
        file.flush()
        module = _load_for_executorch_for_training(file.name)
        seconds = []
        for _ in range(count):
            began = time.process_time()
            module.forward_backward("forward", args)
            seconds.append(time.process_time() - began)
    return {"seconds": seconds}


def main() -> None:
    """Answer requests until the pipe closes."""
    for line in sys.stdin:
        request = json.loads(line)
        request.pop("op")
        sys.stdout.write(json.dumps(step(**request)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
