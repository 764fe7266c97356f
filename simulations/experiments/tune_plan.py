"""[tune] of experiment.toml: which settings of run.toml are searched, how often, by what measure.

[tune]
trials = 20                     runs, finished or pruned
metric = "accuracy"             or "loss": of the best round, on the validation records
pruner = "median"               ends a trial whose rounds are worse than the median so far
[tune.parameters]
"training.learning_rate" = { low = 1e-4, high = 1e-1, log = true }
"training.batch_size" = { low = 8, high = 64, step = 8 }       two whole bounds: whole numbers
"lora.rank" = { choices = [2, 4, 8] }
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import Count
from anabranch.simulations.experiments.settings import file_of, flatten

Choice = bool | int | float | str


class Parameter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values of one setting: those from `low` to `high`, or `choices`."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False  # equally likely in every order of magnitude
    step: Annotated[int, msgspec.Meta(ge=1)] | Annotated[float, msgspec.Meta(gt=0)] | None = None
    choices: tuple[Choice, ...] = ()

    def __post_init__(self) -> None:
        bounds = (self.low, self.high)
        if self.choices:
            if bounds != (None, None) or self.log or self.step is not None:
                raise ConfigError("give `choices`, or `low` and `high`, not both")
        elif self.low is None or self.high is None or self.low >= self.high:
            raise ConfigError(f"expected low < high, or choices, got {bounds}")
        elif self.whole and isinstance(self.step, float) and not self.step.is_integer():
            raise ConfigError(f"low and high are whole: expected a whole step, got {self.step:g}")
        elif self.log and (self.low <= 0 or self.step is not None):
            raise ConfigError("log = true needs low above 0, and goes without step")

    @property
    def whole(self) -> bool:
        """Whether values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


class Tune(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table."""

    parameters: dict[str, Parameter]
    trials: Count = 20
    metric: Literal["accuracy", "loss"] = "accuracy"
    pruner: Literal["median", "none"] = "median"
    warmup_rounds: Count = 1  # that no trial is pruned in
    startup_trials: Count = 5  # drawn at random, and never pruned, before the search begins

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Return which values of the metric are better."""
        return "maximize" if self.metric == "accuracy" else "minimize"


_PARAMETER: Final = frozenset(Parameter.__struct_fields__)


def read_tune(table: Mapping[str, Any], source: str) -> Tune:
    """Return what [tune] says; raise ConfigError naming the field.

    Only settings of run.toml are tuned: what clients are like is not ours to choose.
    """
    given = table.get("parameters")
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"{source}: [tune.parameters] is empty: name settings and their ranges")
    parameters = flatten(given, stop=_PARAMETER)
    for path in parameters:
        if file_of(path) != "run":
            raise ConfigError(
                f"{source}: [tune.parameters] {path}: only settings of run.toml are tuned; lay "
                "others beside each other with [sweep]"
            )
    try:
        return msgspec.convert({**table, "parameters": parameters}, Tune)
    except (msgspec.ValidationError, ConfigError) as error:
        raise ConfigError(f"{source}: [tune] {error}") from None
