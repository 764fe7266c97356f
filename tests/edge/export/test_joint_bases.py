"""Encoders of other families than BERT: their training steps in ONNX are torch's steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch.client.tuning.bases import load_classifier
from anabranch.edge.export.joint import check_against_torch, step_graph
from anabranch.protocols.tables import Lora, Model

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 66,
}
DISTIL = {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "max_position_embeddings": 66}
DEBERTA = SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
MARKS = {f"{name}_token_id": 2 for name in ("cls", "sep", "bos", "eos")}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "Roberta": (SIZES | {"pad_token_id": 1}, ("query", "value")),
    "MPNet": (SIZES | {"pad_token_id": 1}, ("q", "v")),
    "Electra": (SIZES | {"embedding_size": 16}, ("query", "value")),
    "DistilBert": (DISTIL, ("q_lin", "v_lin")),
    "Albert": (SIZES | {"embedding_size": 16}, ("query", "value")),
    "DebertaV2": (DEBERTA, ("query_proj", "value_proj")),
    "ModernBert": (SIZES | MARKS | {"pad_token_id": 0}, ("Wqkv",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_step_of_another_family(
    family: str,
    tmp_path: Path,
    wordpiece_folder: Callable[..., Path],
    make_config: Callable[..., Any],
) -> None:
    import transformers

    sizes, targets = FAMILIES[family]
    folder = wordpiece_folder(tmp_path / family)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(vocabulary), initializer_range=0.3, **sizes
    )
    getattr(transformers, f"{family}Model")(config).save_pretrained(folder)
    model = Model(base=str(folder), max_tokens=24)
    lora = Lora(rank=3, targets=targets)
    classifier = load_classifier(make_config("text", model=model, lora=lora))
    for clipped in (False, True):
        step = step_graph(classifier, clipped=clipped)
        assert check_against_torch(step, classifier, clipped=clipped) < 5e-5
