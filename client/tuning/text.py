"""Text classifiers: a Hugging Face encoder, cut between its layers, pooled to one vector.

Stages of the BERT family (bert, roberta, xlm-roberta, camembert, electra, mpnet):

    0: embeddings     1 … L: encoder.layer.0 … L-1     L + 1: pooling

For every other architecture the encoder is one stage: with LoRA anywhere in it nothing is
computed in advance (the cut is 0), with the head alone everything is.

Attention is the plain matrix form ("eager"): on a CPU it is faster than the fused kernels
up to 64 tokens, and it exports to a clean graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anabranch.client.tuning.classifier import Classifier
from anabranch.protocols.errors import ModelError

CUT_BETWEEN_LAYERS = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet"})
POOLER = "pooler"  # BERT's own pooling layer is not used, and removed


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer and the SHA-256 of what defines it."""

    tokenizer: Any
    digest: str


class TextClassifier(Classifier):
    """A Hugging Face text encoder with mean or [CLS] pooling."""

    unit_features = True

    def __init__(
        self,
        base: nn.Module,
        tokenizer: Tokenizer,
        *,
        num_labels: int,
        base_digest: str,
        pooling: Literal["mean", "cls"],
        max_tokens: int,
    ) -> None:
        self.config = cast(Any, base).config
        self.pooling = pooling
        self.max_tokens = max_tokens
        self.tokenizer = tokenizer.tokenizer
        self.blocks = _blocks(base)
        self.cuts = can_cut(base)
        super().__init__(
            base,
            width=self.config.hidden_size,
            num_labels=num_labels,
            base_digest=base_digest,
            tokenizer_digest=tokenizer.digest,
            function=f"{pooling}:{self.unit_features}:{self.config.to_json_string()}",
        )
        _require_room(base, max_tokens)

    @property
    def num_stages(self) -> int:
        """Return L + 2: embeddings, layers, pooling; or 2: encoder, pooling."""
        return self.num_blocks + 2 if self.cuts else 2

    def stage_of(self, name: str) -> int:
        """Return i + 1 for what lies in layer i, and 0 for everything else."""
        prefix = f"{self.blocks}."
        if not self.cuts or not name.startswith(prefix):
            return 0
        return int(name.removeprefix(prefix).partition(".")[0]) + 1

    def run(self, h: Tensor, mask: Tensor | None, start: int, stop: int) -> Tensor:
        """Return the output of stages start … stop - 1.

        `h` is token ids (B, T) for start = 0, else hidden states (B, T, d); the result is
        hidden states, or pooled vectors (B, d) if the last stage is in the range.
        """
        if start == stop:
            return h
        if start == 0 and mask is not None and self.config.pad_token_id:
            h = h.masked_fill(~mask, self.config.pad_token_id)  # batches are padded with 0
        if self.cuts:
            h = self._run_layers(h, mask, start, stop)
        elif start == 0:
            attention_mask = None if mask is None else mask.long()
            h = self.base(input_ids=h, attention_mask=attention_mask).last_hidden_state
        if start < self.num_stages <= stop:
            h = self.scale(pool(h, mask, self.pooling))
        return h

    def _run_layers(self, h: Tensor, mask: Tensor | None, start: int, stop: int) -> Tensor:
        base = cast(Any, self.base)
        if start == 0:
            h = base.embeddings(input_ids=h)
            if hasattr(base, "embeddings_project"):  # electra
                h = base.embeddings_project(h)
        layers = base.encoder.layer[max(start - 1, 0) : max(stop - 1, 0)]
        if len(layers) == 0:
            return h
        rest: list[Tensor | None] = [attention_bias(mask, h.dtype)]
        if self.config.model_type == "mpnet":
            rest.append(base.encoder.compute_position_bias(h))
        for layer in layers:
            out = layer(h, *rest)
            h = out[0] if isinstance(out, tuple) else out
        return h

    def encode(self, inputs: Sequence[str] | NDArray[np.float32]) -> list[Tensor]:
        """Return the token ids (T,) of each text, special tokens included, cut to max_tokens."""
        if len(inputs) == 0:
            return []
        encoded = self.tokenizer(
            list(inputs), truncation=True, max_length=self.max_tokens, padding=False
        )
        return [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]


def attention_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return what is added to attention scores: 0 on tokens, -max on padding; (B, 1, 1, T)."""
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None, :]


def pool(h: Tensor, mask: Tensor | None, pooling: Literal["mean", "cls"]) -> Tensor:
    """Return one vector (B, d) per sequence: the first token's, or the mean over real tokens."""
    if pooling == "cls":
        return h[:, 0]
    if mask is None:
        return h.mean(dim=1)
    weights = mask.to(h.dtype)[:, :, None]
    return (h * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


def can_cut(base: nn.Module) -> bool:
    """Return whether the encoder's layers can be called one by one."""
    config = cast(Any, base).config
    decoder = getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False)
    return config.model_type in CUT_BETWEEN_LAYERS and not decoder


def _blocks(base: nn.Module) -> str | None:
    """Return the name of the encoder's list of layers: its longest ModuleList."""
    if can_cut(base):
        return "encoder.layer"
    lists = {n: len(m) for n, m in base.named_modules() if isinstance(m, nn.ModuleList)}
    return max(lists, key=lambda name: lists[name], default=None)


def _require_room(base: nn.Module, max_tokens: int) -> None:
    """Raise ModelError if the encoder has fewer positions than max_tokens."""
    positions = getattr(cast(Any, base).config, "max_position_embeddings", None)
    if positions is None:
        return
    # RoBERTa and MPNet number positions from padding_idx + 1.
    padding = getattr(getattr(base, "embeddings", None), "padding_idx", None)
    room = positions - (0 if padding is None else padding + 1)
    if max_tokens > room:
        raise ModelError(f"model.max_tokens = {max_tokens}: the base has only {room} positions")
