"""Texts of unlike length without padding: the layers above the cut on packed rows, exact.

A batch of K clients is one matrix of R = Σ T_i rows, token after token, record after record, client
after client. Everything but attention works on rows: linear layers (ragged.py), LayerNorm, GELU.
Attention goes by length: records sorted by length fall into BUCKETS groups, each padded to its
longest alone, and masked. Pooling takes the mean, or the first row, of every record's rows. The
result is that of TextClassifier.forward on a padded batch, to rounding.

Packed are the encoders of the BERT family that TextClassifier cuts between layers (bert, roberta,
xlm-roberta, camembert, electra). MPNet is not: its attention adds a bias per head and distance
between tokens, which belongs to a padded batch.

Attention is plain products and a softmax: below 64 tokens faster on a CPU than fused kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Packing, Ragged, runs
from anabranch.client.tuning.lora import LoraLinear
from anabranch.client.tuning.text import TextClassifier
from anabranch.simulations.cohort.ragged import RaggedLayers, Spans

BUCKETS = 4  # lengths that attention is padded to


def why_not(classifier: Classifier) -> str | None:
    """Return why the texts of this classifier cannot be packed, or None if they can."""
    if not isinstance(classifier, TextClassifier):
        return "its inputs have one shape: nothing to pack"
    kind = classifier.config.model_type
    if kind == "mpnet":
        return "the attention of mpnet adds a bias by distance, which belongs to a padded batch"
    if not classifier.cuts:
        return f"the layers of {kind} cannot be called one by one"
    if classifier.cut == 0:
        return "the embeddings, or what lies before the first layer, are trained"
    if classifier.cut == classifier.num_stages:
        return "the head alone is trained: its inputs have one shape"
    if classifier.merged:
        return "the adapter is merged into the base"
    for layer in _layers(classifier):
        parts = (*_attention(layer), layer.intermediate.dense, layer.output.dense)
        if not all(type(part) in (nn.Linear, LoraLinear) for part in parts):
            return "a layer is not made of plain linear layers"
    return None


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Hidden states at the cut of all records of a batch of K clients, client after client."""

    values: Tensor  # (R, d), R = Σ lengths
    lengths: Tensor  # (n,) int64 on the CPU: rows of every record
    records: tuple[int, ...]  # (K,): records of every client, Σ = n

    @cached_property
    def record_spans(self) -> Spans:
        """Return first and last + 1 record of every client."""
        return list(pairwise(accumulate(self.records, initial=0)))

    @cached_property
    def row_spans(self) -> Spans:
        """Return first and last + 1 row of every client."""
        ends = [0, *self.lengths.cumsum(0).tolist()]
        return [(ends[first], ends[last]) for first, last in self.record_spans]


def pack(features: Sequence[Packing], indices: Sequence[Tensor]) -> PackedBatch:
    """Return the records at `indices[k]` of every client k; one gather if all share a tensor."""
    records = tuple(len(at) for at in indices)
    first = features[0]
    if isinstance(first, Ragged) and all(
        isinstance(f, Ragged) and f.values is first.values for f in features
    ):
        shared = cast(Sequence[Ragged], features)
        pairs = list(zip(shared, indices, strict=True))
        start = torch.cat([f.start[at] for f, at in pairs])
        lengths = torch.cat([f.length[at] for f, at in pairs])
        rows = runs(start, lengths).to(first.values.device)
        return PackedBatch(first.values.index_select(0, rows), lengths, records)
    parts = [f.packed(at) for f, at in zip(features, indices, strict=True)]
    values, sizes = zip(*parts, strict=True)
    return PackedBatch(torch.cat(values), torch.cat(sizes), records)


def forward(classifier: Classifier, batch: PackedBatch, layers: RaggedLayers) -> Tensor:
    """Return the logits (n, labels) of the records of a batch, in their order.

    `layers` holds the values of the clients; a backward pass writes their gradients. For a
    classifier that `why_not` has nothing against.
    """
    assert isinstance(classifier, TextClassifier)  # why_not has said so
    layers.begin()
    spans, h = batch.row_spans, batch.values
    plan = Plan.of(batch.lengths, classifier.config.num_attention_heads, h)
    for layer in _layers(classifier):
        h = _layer(layer, h, spans, plan, layers)
    pooled: Tensor = _Pool.apply(h, plan, classifier.pooling)  # type: ignore[no-untyped-call]
    return layers.linear(classifier.scale(pooled), batch.record_spans, classifier.head)


def _layer(layer: Any, h: Tensor, spans: Spans, plan: Plan, layers: RaggedLayers) -> Tensor:
    """Return one encoder layer of rows (R, d)."""
    query, key, value, output = _attention(layer)
    qkv = layers.linear(h, spans, query, key, value)
    mixed: Tensor = _Attention.apply(qkv, plan)  # type: ignore[no-untyped-call]
    h = layers.norm(
        layers.linear(mixed, spans, output) + h, spans, layer.attention.output.LayerNorm
    )
    inner = layer.intermediate.intermediate_act_fn(
        layers.linear(h, spans, layer.intermediate.dense)
    )
    return layers.norm(
        layers.linear(inner, spans, layer.output.dense) + h, spans, layer.output.LayerNorm
    )


def _layers(classifier: TextClassifier) -> Sequence[Any]:
    """Return the encoder layers above the cut."""
    found: Sequence[Any] = cast(Any, classifier.base).encoder.layer[classifier.cut - 1 :]
    return found


def _attention(layer: Any) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    inside = layer.attention.self
    return inside.query, inside.key, inside.value, layer.attention.output.dense


@dataclass(frozen=True, eq=False)
class Bucket:
    """Records that attention treats together, padded to the longest of them."""

    at: slice  # places, heads × padded tokens
    shape: tuple[int, int]  # records × heads, tokens
    bias: Tensor | None  # (records × heads, 1, tokens): 0 on tokens, -inf on padding


@dataclass(frozen=True, eq=False)
class Plan:
    """Where every token of a batch lies in attention; made once and used by all layers.

    Places: records ascending by length, in each its heads, in each its tokens with padding. A
    row of width 3 · heads · size is seen as 3 · heads pieces of `size`.
    """

    heads: int
    lengths: Tensor  # (n,)
    start: Tensor  # (n,) first row of every record
    buckets: Sequence[Bucket]
    into: Tensor  # (places,) piece of an output row that belongs here; padding: of its record
    into3: Tensor  # (3 · places,) the same of query, key, value
    back: Tensor  # (R · heads,) place of every piece
    back3: Tensor  # (R · 3 · heads,)
    real: Tensor | None  # (places, 1): 0 on padding; None: there is none

    @classmethod
    def of(cls, lengths: Tensor, heads: int, like: Tensor) -> Plan:
        """Return the plan for records of `lengths` (n,), for values such as `like`."""
        device = like.device
        n, rows = len(lengths), int(lengths.sum())
        start = lengths.cumsum(0) - lengths
        order = torch.argsort(lengths, stable=True)
        groups = order.chunk(min(BUCKETS, n))
        sizes = [(len(group), int(lengths[group[-1]])) for group in groups]
        padded = torch.cat([torch.full((count,), longest) for count, longest in sizes])
        token = runs(torch.zeros(n, dtype=torch.int64), padded)  # of every padded token, in order
        row = start[order].repeat_interleave(padded) + token
        real = token < lengths[order].repeat_interleave(padded)
        # Head j of a record with T padded tokens begins T places after head j - 1.
        step = padded.repeat_interleave(padded)
        first = heads * (padded.cumsum(0) - padded).repeat_interleave(padded) + token
        place = first[:, None] + step[:, None] * torch.arange(heads)  # (tokens, heads)
        # Padding reads its own record's first row: that of another could be infinite, and 0 times
        # it is not 0.
        own = start[order].repeat_interleave(padded)
        piece = torch.where(real, row, own)[:, None] * heads + torch.arange(heads)
        places = place.numel()
        into = torch.empty(places, dtype=torch.int64)
        into[place.reshape(-1)] = piece.reshape(-1)
        back = torch.empty((rows, heads), dtype=torch.int64)
        back[row[real]] = place[real]
        # Piece j of row r is piece j of 3 · heads in a row of query, key and value.
        in_three = into + (into // heads) * 2 * heads
        third = torch.arange(3)[:, None]
        whole = bool(real.all())
        mask = torch.empty(places)
        mask[place.reshape(-1)] = real[:, None].expand(-1, heads).reshape(-1).float()
        return cls(
            heads=heads,
            lengths=lengths,
            start=start.to(device),
            buckets=_buckets(sizes, [lengths[group] for group in groups], heads, like),
            into=into.to(device),
            into3=(in_three + heads * third).reshape(-1).to(device),
            back=back.reshape(-1).to(device),
            back3=(back[:, None] + places * third).reshape(-1).to(device),
            real=None if whole else mask[:, None].to(like),
        )


def _buckets(
    sizes: Sequence[tuple[int, int]], lengths: Sequence[Tensor], heads: int, like: Tensor
) -> list[Bucket]:
    buckets, first = [], 0
    for (count, longest), length in zip(sizes, lengths, strict=True):
        places = count * heads * longest
        bias = None
        if int(length[0]) < longest:  # ascending: otherwise all are of one length
            padding = torch.arange(longest) >= length[:, None]
            bias = torch.zeros(padding.shape).masked_fill_(padding, -torch.inf)
            bias = bias.repeat_interleave(heads, 0)[:, None].to(like)
        buckets.append(Bucket(slice(first, first + places), (count * heads, longest), bias))
        first += places
    return buckets


class _Attention(Function):
    """softmax(q kᵀ / √size) v per record and head, for rows (R, 3 d) of q, k, v."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, plan: Plan) -> Tensor:
        size = qkv.shape[1] // (3 * plan.heads)
        pieces = qkv.view(-1, size).index_select(0, plan.into3).view(3, -1, size)
        mixed = torch.empty_like(pieces[0])
        weights = []
        for bucket in plan.buckets:
            q, k, v = pieces[:, bucket.at].view(3, *bucket.shape, size)
            scores = _scaled(q, k.mT, bucket.bias, size**-0.5)
            weights.append(torch.softmax(scores, -1))
            torch.bmm(weights[-1], v, out=mixed[bucket.at].view_as(v))
        ctx.save_for_backward(pieces, *weights)
        ctx.plan = plan
        return mixed.index_select(0, plan.back).view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        plan, (pieces, *weights) = ctx.plan, ctx.saved_tensors
        size = pieces.shape[-1]
        e = gradients[0].reshape(-1, size).index_select(0, plan.into)
        if plan.real is not None:
            e.mul_(plan.real)
        d = torch.empty_like(pieces)
        for bucket, p in zip(plan.buckets, weights, strict=True):
            q, k, v = pieces[:, bucket.at].view(3, *bucket.shape, size)
            dq, dk, dv = d[:, bucket.at].view(3, *bucket.shape, size)
            eb = e[bucket.at].view_as(v)
            torch.bmm(p.mT, eb, out=dv)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(eb, v.mT), p, -1, p.dtype)
            ds.mul_(size**-0.5)
            torch.bmm(ds, k, out=dq)
            torch.bmm(ds.mT, q, out=dk)
        rows = d.view(-1, size).index_select(0, plan.back3)
        return rows.view(len(gradients[0]), -1), None


def _scaled(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return scale · q k + bias."""
    if bias is None:
        return torch.baddbmm(q.new_empty(1), q, k, beta=0, alpha=scale)
    return torch.baddbmm(bias, q, k, alpha=scale)


class _Pool(Function):
    """One vector per record: the mean of its rows, or the first."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, plan: Plan, pooling: Literal["mean", "cls"]) -> Tensor:
        ctx.plan, ctx.pooling, ctx.rows = plan, pooling, len(h)
        if pooling == "cls":
            return h.index_select(0, plan.start)
        # A product with the matrix of 1 / T_i: the sum over unlike numbers of rows at once.
        mean = h.new_zeros((len(plan.lengths), len(h)))
        share = (1.0 / plan.lengths).to(h)
        record = _record(plan, h.device)
        mean[record, torch.arange(len(h), device=h.device)] = share[record]
        pooled = mean @ h
        if bool(pooled.isfinite().all()):
            return pooled
        # A client has diverged, and 0 times infinity is not 0: every record by itself.
        return torch.zeros_like(pooled).index_add_(0, record, h * share[record][:, None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        plan, e = ctx.plan, gradients[0]
        if ctx.pooling == "cls":
            dh = e.new_zeros((ctx.rows, e.shape[1]))
            dh[plan.start] = e
        else:
            share = (1.0 / plan.lengths).to(e)
            dh = (e * share[:, None]).index_select(0, _record(plan, e.device))
        return dh, None, None


def _record(plan: Plan, device: torch.device) -> Tensor:
    """Return the record of every row, (R,)."""
    return torch.arange(len(plan.lengths)).repeat_interleave(plan.lengths).to(device)
