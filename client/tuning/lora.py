"""LoRA on the linear layers of a frozen base (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    h = W x + b + s · B A x      A: (rank, in)   B: (out, rank)   s = alpha / rank

A starts uniform in ±1/sqrt(in) (Kaiming-uniform with a = sqrt 5, as in PEFT), B at zero: an
adapter that is not trained changes nothing. W and b never change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import ModelError
from anabranch.protocols.spec import AdapterSpec, require_same_spec
from anabranch.protocols.tables import Lora

if TYPE_CHECKING:
    from anabranch.client.tuning.classifier import Classifier

HEAD = "head"  # the trainable linear layer above the base


def unset_linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """Return a layer whose values the caller sets; torch's global generator stays as it is.

    torch.nn.utils.skip_init would do, and loads sympy for it: a third of a second.
    """
    with torch.random.fork_rng(devices=[]):
        return nn.Linear(in_features, out_features, bias=bias)


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update beside it.

    A and B are nn.Linear modules, so that per-sample gradient hooks find layers they know.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, rng: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.lora_A = unset_linear(base.in_features, rank, bias=False)
        self.lora_B = unset_linear(rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5), generator=rng)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling = alpha / rank
        self._unmerged: Tensor | None  # W while W + s B A stands in its place
        self.register_buffer("_unmerged", None, persistent=False)
        self.to(base.weight.device)

    @property
    def merged(self) -> bool:
        """Return whether the update is folded into the weight."""
        return self._unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b + s B A x for x (…, in)."""
        y: Tensor = self.base(x)
        if self.merged:
            return y
        y = y + self.scaling * self.lora_B(self.lora_A(x))
        return y

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return W + s B A, shape (out, in)."""
        weight: Tensor = self.base.weight if self._unmerged is None else self._unmerged
        merged: Tensor = weight + self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        return merged

    def merge(self) -> None:
        """Put W + s B A in the place of W. W itself is kept: other classifiers share it."""
        merged = self.merged_weight()
        self._unmerged = self.base.weight.detach()
        self.base.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Put W back, bit for bit."""
        assert self._unmerged is not None  # unmerge() below checks
        self.base.weight = nn.Parameter(self._unmerged, requires_grad=False)
        self._unmerged = None

    def frozen_weights(self) -> dict[str, Tensor]:
        """Return the tensors of the frozen layer, not merged, by the names nn.Linear gives."""
        weights: dict[str, Tensor] = dict(self.base.state_dict())
        if self._unmerged is not None:
            weights["weight"] = self._unmerged
        return weights


def adapt(classifier: Classifier, lora: Lora, *, seed: int) -> None:
    """Add LoRA to the layers that `lora` names, free the modules it names, and set cut and spec.

    Raises ModelError when a pattern matches nothing, or when a layer is meant both for LoRA
    and for training in full. The classifier is then as it was.
    """
    freed = _modules_to_save(classifier, lora)
    targets = _targets(classifier, lora) if lora.rank else []
    for target in targets:
        inside = next((f for f in freed if f"{target}.".startswith(f"{f}.")), None)
        if inside is not None:
            raise ModelError(
                f"{target} is matched by lora.targets and, through {inside}, by "
                f"lora.modules_to_save: train it with LoRA or in full, not both"
            )
    _free(classifier, freed)
    rng = torch.Generator().manual_seed(seed)
    for target in targets:
        layer = classifier.base.get_submodule(target)
        assert isinstance(layer, nn.Linear)  # _targets takes no other
        adapted = LoraLinear(layer, lora.rank, lora.alpha, rng)
        classifier.base.set_submodule(target, adapted)
    names = [n for n, p in classifier.base.named_parameters() if p.requires_grad]
    classifier.cut = min(map(classifier.stage_of, names), default=classifier.num_stages)
    classifier.spec = AdapterSpec(
        base=classifier.base_digest,
        tokenizer=classifier.tokenizer_digest,
        rank=lora.rank if targets else 0,
        alpha=lora.alpha,
        targets=tuple(targets),
        tensors=tuple((n, tuple(p.shape)) for n, p in _asking(classifier).items()),
    )
    classifier.eval()


def _linears(classifier: Classifier) -> list[str]:
    modules = classifier.base.named_modules()
    return sorted(name for name, module in modules if isinstance(module, nn.Linear))


def _targets(classifier: Classifier, lora: Lora) -> list[str]:
    """Return the names of the linear layers to adapt, ascending."""
    linears = _linears(classifier)
    matched = set(_match(linears, lora.targets, "lora.targets", "linear layers"))
    chosen = sorted(matched & set(_in_layers(classifier, linears, lora.layers)))
    if not chosen:
        raise ModelError(
            f"lora.targets: {', '.join(lora.targets)} match no layer within lora.layers = "
            f'"{lora.layers}"; linear layers are {_listing(linears)}'
        )
    return chosen


def _in_layers(classifier: Classifier, names: list[str], layers: str) -> list[str]:
    """Return the names inside the blocks that `layers` ("all" or "last:k") selects."""
    if layers == "all":
        return names
    last, count = int(layers.removeprefix("last:")), classifier.num_blocks
    if last > count:
        raise ModelError(
            f'lora.layers = "{layers}": the base has {count} blocks; use "all" or a smaller number'
        )
    prefixes = tuple(f"{classifier.blocks}.{i}." for i in range(count - last, count))
    return [name for name in names if f"{name}.".startswith(prefixes)]


def _modules_to_save(classifier: Classifier, lora: Lora) -> list[str]:
    modules = classifier.base.named_modules()
    owners = sorted(n for n, m in modules if n and next(m.parameters(), None) is not None)
    return _match(owners, lora.modules_to_save, "lora.modules_to_save", "modules with weights")


def _match(names: list[str], patterns: Iterable[str], field: str, what: str) -> list[str]:
    """Return the names whose last component is a pattern or that fit it as a glob.

    As in a shell without folders, `*` also matches dots: "*.output.dense" finds
    "encoder.layer.0.attention.output.dense" too, "*.layer.[0-9].output.dense" does not.
    """
    matched: set[str] = set()
    for pattern in patterns:
        hits = [n for n in names if n.rpartition(".")[2] == pattern or fnmatchcase(n, pattern)]
        if not hits:
            raise ModelError(
                f"{field}: {pattern!r} matches nothing in the base; {what} are {_listing(names)}"
            )
        matched.update(hits)
    return sorted(matched)


def _listing(names: list[str], limit: int = 40) -> str:
    """Return names for a message, with the numbers of blocks folded to *."""
    folded = [".".join("*" if p.isdigit() else p for p in name.split(".")) for name in names]
    unique = list(dict.fromkeys(folded))
    more = f" and {len(unique) - limit} more" if len(unique) > limit else ""
    return (", ".join(unique[:limit]) or "none") + more


def _free(classifier: Classifier, modules: list[str]) -> None:
    """Make the weights of `modules` trainable, as own copies: the base may be shared."""
    for module_name in modules:
        for name, module in classifier.base.get_submodule(module_name).named_modules():
            for part, weight in list(module.named_parameters(recurse=False)):
                full_name = ".".join(filter(None, (module_name, name, part)))
                if full_name in classifier.untrained:
                    continue  # inside two matching modules
                classifier.untrained[full_name] = weight.detach()
                setattr(module, part, nn.Parameter(weight.detach().clone()))


def trainable_parameters(classifier: Classifier) -> dict[str, nn.Parameter]:
    """Return the adapter's tensors, by the names in the spec, ascending.

    All of them, also those that a fit of one part has frozen for now (active.py). Raises
    ModelError on a merged classifier: its factors take no part in the forward pass.
    """
    _require_merged(classifier, False, "train, read or load")
    base = dict(classifier.base.named_parameters())
    return {
        name: base[name] if name in base else classifier.get_parameter(name)
        for name, _ in classifier.spec.tensors
    }


def _asking(classifier: Classifier) -> dict[str, nn.Parameter]:
    """Return the parameters of the base that ask for a gradient, and the head, ascending."""
    base = {n: p for n, p in classifier.base.named_parameters() if p.requires_grad}
    head = {f"{HEAD}.{n}": p for n, p in classifier.head.named_parameters()}
    return dict(sorted((base | head).items()))


def read_adapter(classifier: Classifier) -> Adapter:
    """Return a copy of the trainable tensors. Raises IncompatibleAdapter if one is not finite."""
    parameters = trainable_parameters(classifier)
    arrays = {n: p.detach().cpu().numpy().copy() for n, p in parameters.items()}
    return Adapter(classifier.spec, arrays)


def load_adapter(classifier: Classifier, adapter: Adapter) -> None:
    """Overwrite the trainable tensors, by name.

    Raises IncompatibleAdapter on any difference in base, tokenizer, rank, names or shapes; the
    classifier is then as it was.
    """
    require_same_spec(classifier.spec, adapter.spec)
    with torch.no_grad():
        for name, parameter in trainable_parameters(classifier).items():
            parameter.copy_(torch.tensor(adapter.arrays[name]))


def merge(classifier: Classifier) -> None:
    """Fold every update into its weight. Raises ModelError if that is done already."""
    _require_merged(classifier, False, "merge")
    for layer in _adapted(classifier.base).values():
        layer.merge()
    classifier.merged = True


def unmerge(classifier: Classifier) -> None:
    """Undo `merge`: every weight is again what it was. Raises ModelError if not merged."""
    _require_merged(classifier, True, "unmerge")
    for layer in _adapted(classifier.base).values():
        layer.unmerge()
    classifier.merged = False


def base_weights(base: nn.Module) -> dict[str, Tensor]:
    """Return a base's tensors, not merged, under the names they had before `adapt`."""
    adapted = _adapted(base)
    inside = tuple(f"{name}." for name in adapted)
    state = base.state_dict()
    weights = {name: tensor for name, tensor in state.items() if not name.startswith(inside)}
    for name, layer in adapted.items():
        weights |= {f"{name}.{part}": tensor for part, tensor in layer.frozen_weights().items()}
    return weights


def merged_weights(classifier: Classifier) -> dict[str, Tensor]:
    """Return W + s B A and all other weights of the base by the base's own names, and the head.

    What a plain copy of the base loads to compute the same as the adapted one.
    """
    weights = base_weights(classifier.base)
    for name, layer in _adapted(classifier.base).items():
        weights[f"{name}.weight"] = layer.merged_weight()
    head = {f"{HEAD}.{n}": p.detach() for n, p in classifier.head.named_parameters()}
    return weights | head


def _adapted(base: nn.Module) -> dict[str, LoraLinear]:
    return {name: m for name, m in base.named_modules() if isinstance(m, LoraLinear)}


def _require_merged(classifier: Classifier, wanted: bool, action: str) -> None:
    if classifier.merged is not wanted:
        state, step = ("not merged", "merge") if wanted else ("merged", "unmerge")
        raise ModelError(f"cannot {action}: the adapter is {state} into the base; {step} it first")
