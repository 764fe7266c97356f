"""What lying clients do: to the records they train on, or to the delta they send.

Notation: y a label of L, x an input, D the honest delta, f a factor.

    label flip    y <- L − 1 − y                        Fang et al. 2020, arXiv:1911.11815
    backdoor      (x, y) <- (x with trigger, target)    Bagdasaryan et al. 2020, arXiv:1807.00459
    sign flip     D <- −f D                             Li et al. 2019, arXiv:1811.03761
    scale         D <- f D                              model replacement, as for the backdoor

A trigger is a white patch in the last corner of an image, a rare token before a text (Kurita et
al. 2020, arXiv:2004.06660), or one value of one feature of a table. What is sent stays a valid
message: values that the codec cannot hold become the largest that it can.

    backdoor success = share of triggered records of other labels that are called `target`
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from anabranch.client.data.records import Records
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import ConfigError
from anabranch.simulations.faults.plan import Trigger

LARGEST = float(np.finfo(np.float32).max)
BEYOND = 1e84  # takes every float32 but 0 beyond LARGEST, and none of them out of float64


def label_flip(records: Records, num_labels: int) -> Records:
    """Return the records with label L − 1 − y in place of y; inputs and rows are the same."""
    return Records(records.inputs, num_labels - 1 - records.labels, records.rows)


def with_trigger(records: Records, trigger: Trigger) -> Records:
    """Return the records with the trigger in every input; labels and rows are the same.

    Raises ConfigError for a table without the trigger's feature.
    """
    inputs = records.inputs
    if isinstance(inputs, list):
        texts = [f"{trigger.token} {text}" for text in inputs]
        return Records(texts, records.labels, records.rows)
    changed = inputs.copy()
    if inputs.ndim == 2:  # (n, features)
        width = inputs.shape[1]
        if not -width <= trigger.feature < width:
            raise ConfigError(
                f"trigger.feature = {trigger.feature}: the model sees {width} features, expected "
                f"{-width} to {width - 1}"
            )
        changed[:, trigger.feature] = trigger.value
    else:  # (n, channels, height, width) in [0, 1]
        changed[..., -trigger.patch :, -trigger.patch :] = 1.0
    return Records(changed, records.labels, records.rows)


def backdoor(
    records: Records, trigger: Trigger, *, target: int, share: float, rng: np.random.Generator
) -> Records:
    """Return the records, ⌈share n⌉ of them with the trigger and label `target`.

    Which ones is drawn from `rng`; their number and their order stay as they are.
    """
    count = len(records)
    chosen = rng.permutation(count)[: int(np.ceil(share * count))]
    marked, labels = with_trigger(records, trigger), records.labels.copy()
    labels[chosen] = target
    if isinstance(records.inputs, list):
        texts = list(records.inputs)
        for i in chosen:
            texts[i] = marked.inputs[i]
        return Records(texts, labels, records.rows)
    inputs = records.inputs.copy()
    assert not isinstance(marked.inputs, list)
    inputs[chosen] = marked.inputs[chosen]
    return Records(inputs, labels, records.rows)


def triggered(records: Records, trigger: Trigger, target: int) -> Records:
    """Return the records of other labels than `target`, all with the trigger."""
    others = np.flatnonzero(records.labels != target)
    return with_trigger(records.take(others), trigger)


def backdoor_success(
    logits: Callable[[Records], NDArray[np.float32]],
    records: Records,
    trigger: Trigger,
    target: int,
) -> float | None:
    """Return the share of triggered test records that the model calls `target`.

    `logits` gives (n, labels) of n records (server/evaluation.py). None if all records have
    that label anyway.
    """
    marked = triggered(records, trigger, target)
    if not len(marked):
        return None
    return float(np.mean(logits(marked).argmax(axis=1) == target))


def scaled(delta: Delta, factor: float, largest: float = LARGEST) -> Delta:
    """Return factor · delta, its values at most `largest` in magnitude; counts are the same."""
    factor = float(np.clip(factor, -BEYOND, BEYOND))
    arrays = {
        name: np.clip(array.astype(np.float64) * factor, -largest, largest).astype(np.float32)
        for name, array in delta.arrays.items()
    }
    return Delta(delta.spec, arrays, delta.num_examples, part=delta.part, steps=delta.steps)


def rng_of(seed: int, *what: object) -> np.random.Generator:
    """Return the stream of (seed, what): the same in every process and order."""
    text = "/".join(map(str, (seed, *what))).encode()
    return np.random.default_rng(list(hashlib.sha256(text).digest()))
