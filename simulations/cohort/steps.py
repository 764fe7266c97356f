"""The steps of a cohort: one forward and one backward pass for all clients, then one update.

Clients stand in descending order of their steps: those that are done leave from the end, and
the matrices of stacked.py are cut to the first rows. A client's loss is the mean over its own
batch, so every row of the gradient is that of the client alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.client.local import Learned, Local, nothing_learned
from anabranch.client.tuning.training import diverged
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import AnabranchError
from anabranch.simulations.cohort.batches import Batch, Steps
from anabranch.simulations.cohort.kernels import Kernel, kernel_for
from anabranch.simulations.cohort.products import FLOAT32, Products
from anabranch.simulations.cohort.stacked import Layout, Masks, Stacked


def train_together(
    locals: Sequence[Local], masks: Sequence[Masks], products: Products = FLOAT32
) -> list[Learned | AnabranchError]:
    """Train clients of one classifier and one optimiser; an error is that client's alone.

    `locals` have at least one step, most steps first; `masks` say what each of them trains
    (active.union). Raises Unbatchable, with nothing changed, if a layer cannot be used so.
    """
    classifier = locals[0].classifier
    layout = Layout(classifier.spec, set().union(*masks))
    stacked = Stacked(layout, locals, masks, classifier.device)
    losses = torch.zeros(locals[0].steps, len(locals), device=classifier.device)
    with kernel_for(locals, products) as kernel, torch.enable_grad():
        steps = Steps(locals, classifier, filled=kernel.filled)
        clients = 0
        for step, batch in enumerate(steps):
            if batch.clients != clients:
                clients = batch.clients
                kernel.bind(*stacked.views(clients))
            losses[step, :clients] = _backward(kernel, batch)
            kernel.require_complete()
            stacked.update(step, clients)
    return _results(locals, stacked, losses.cpu().double().numpy(), steps.counts)


def _backward(kernel: Kernel, batch: Batch) -> Tensor:
    """Return the loss of every client (K,), after the backward pass of their sum.

    Loss of record i: −share_i · log p_i[y_i], p = softmax(z); its gradient: share_i · (p − y)_i.
    """
    # Over columns: a softmax over few labels in a row is slow.
    log_p = torch.log_softmax(kernel.logits(batch).t().contiguous(), 0)
    labels = batch.labels.unsqueeze(0)
    losses = log_p.gather(0, labels).squeeze(0).mul_(batch.share)
    error = log_p.exp_().scatter_add_(0, labels, log_p.new_full((1, 1), -1.0).expand_as(labels))
    kernel.backward(error.mul_(batch.share).t())
    if batch.sizes is None:
        return losses.view(batch.clients, -1).sum(1).neg_()
    return torch.stack([own.sum() for own in losses.split(batch.sizes)]).neg_()


def _results(
    locals: Sequence[Local],
    stacked: Stacked,
    losses: NDArray[np.float64],
    counts: NDArray[np.int64],
) -> list[Learned | AnabranchError]:
    """Return what came of every client; `losses` and the records in them are (steps, K)."""
    step = np.arange(len(losses))[:, None]
    stop = np.array([local.steps for local in locals])
    epoch = [math.ceil(len(x.examples) / x.training.batch_size) for x in locals]
    last = np.where((step < stop) & (step >= stop - epoch), counts, 0)
    finite = np.isfinite(losses)
    means = (np.where(finite, losses, 0.0) * last).sum(0) / last.sum(0)
    fine = set(np.flatnonzero(finite.all(0)).tolist())
    afters = Adapter.of_rows(stacked.layout.spec, stacked.values.cpu().numpy())
    results: list[Learned | AnabranchError] = []
    for k, local in enumerate(locals):
        after = afters[k]
        if k not in fine:
            results.append(failed(local, diverged(losses[:, k], local.steps, local.training)))
            continue
        if isinstance(after, AnabranchError):
            results.append(failed(local, after))
            continue
        results.append(Learned(after=after, steps=local.steps, loss=float(means[k])))
    return results


def failed(local: Local, error: AnabranchError) -> Learned | AnabranchError:
    """Return what training that failed comes to, as in `train_alone`."""
    try:
        return nothing_learned(local, error)
    except AnabranchError as told:
        return told
