"""The peer: the same LoRA step by torch in eager mode, in a process of its own.

MiniLM with the product's own classifier: encoder, mean pooling, head; loss, backward pass, and
nothing else. The whole encoder runs in every step, as on the device.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.edge.runtime.measure import peak_bytes
from benchmarks.edge import task

torch.set_num_threads(1)


class Worker:
    """Holds the classifier."""

    def __init__(self) -> None:
        self.classifier = load_classifier(task.config())
        self.parameters = list(trainable_parameters(self.classifier).values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=task.LEARNING_RATE)

    def step(self, records: int, tokens: int, count: int, optimize: bool = False) -> dict[str, Any]:
        """Return CPU seconds of each of `count` gradient steps."""
        rng = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 100, (records, tokens), generator=rng)
        mask = torch.ones_like(ids, dtype=torch.bool)
        labels = torch.arange(records) % self.classifier.num_labels
        seconds = []
        for _ in range(count):
            began = time.process_time()
            logits = self.classifier.logits(ids, mask)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            gradients = torch.autograd.grad(loss, self.parameters)
            seconds.append(time.process_time() - began)
            if optimize:
                for parameter, gradient in zip(self.parameters, gradients, strict=True):
                    parameter.grad = gradient
                self.optimizer.step()
        return {"seconds": seconds, "peak": peak_bytes()}


def main() -> None:
    """Answer requests until the pipe closes."""
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("op"))(**request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
