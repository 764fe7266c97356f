"""What goes wrong in a run, as data: a plan that replays it.

A plan is a list of faults, written by hand or drawn from a seed and rates (drawing.py), in
faults.toml:

    seed = 3                    of the bits that are flipped, the bytes that are garbage
    [trigger]                   of every backdoor in the plan (attacks.py)
    patch = 2
    [[faults]]
    kind = "late"               one of the kinds below, each with fields of its own
    client = 17                 by its place in the order of names, from 0
    round = 2                   from 1; 0 is the question "who are you?"
    seconds = 30.0

    on their way    lost-request, lost-answer, duplicate, late, corrupt
    at the client   crash, clock-skew
    lying           sign-flip, scale (the update); label-flip, backdoor (the records)
    coordinator     restart

A fault strikes every message of its client, round and kind of question: one that is asked again
after a restart, or in another attempt at a secure sum, is struck again. `round = None`, where it
is allowed, is every round. Drawn faults strike the question "train".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from anabranch.protocols.config import not_finite
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import NotNegative, Positive
from anabranch.storage.files import write_atomic

Index = Annotated[int, msgspec.Meta(ge=0)]
Round = Annotated[int, msgspec.Meta(ge=1)]
Asked = Literal[
    "describe", "train", "evaluate", "advertise", "share", "mask", "agree", "reveal"
]  # the last five: stages of a secure sum


class LostRequest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lost-request",
    tag_field="kind",
):  # fmt: skip
    """The request never arrives: the client does nothing."""

    client: Index
    round: Index
    asked: Asked = "train"


class LostAnswer(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lost-answer",
    tag_field="kind",
):  # fmt: skip
    """The client does its work, and the answer never arrives."""

    client: Index
    round: Index
    asked: Asked = "train"


class Duplicate(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="duplicate",
    tag_field="kind",
):  # fmt: skip
    """A message arrives twice: with a request, the client does its work twice."""

    client: Index
    round: Index
    asked: Asked = "train"
    of: Literal["request", "answer"] = "answer"


class Late(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="late",
    tag_field="kind",
):  # fmt: skip
    """The answer arrives so many virtual seconds later than it would have."""

    client: Index
    round: Index
    asked: Asked = "train"
    seconds: NotNegative


class Corrupt(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="corrupt",
    tag_field="kind",
):  # fmt: skip
    """Bytes are changed on their way: one bit flipped, the end cut off, or all of it garbage.

    The part is the frame with the adapter or delta, or the JSON beside it; a message without a
    frame is struck in its JSON. A masked vector shows no damage: a sum with it is wrong.
    """

    client: Index
    round: Index
    asked: Asked = "train"
    of: Literal["request", "answer"] = "answer"
    part: Literal["frame", "json"] = "frame"
    how: Literal["flip", "cut", "garbage"] = "flip"


class Crash(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="crash",
    tag_field="kind",
):  # fmt: skip
    """The client's process dies in training, after so many steps: nothing comes back.

    What it wrote before training stays written: a privacy spend that it had reserved.
    """

    client: Index
    round: Round
    steps: Index = 0


class ClockSkew(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="clock-skew",
    tag_field="kind",
):  # fmt: skip
    """The client's clock is wrong: what it says of time is off by so many seconds."""

    client: Index
    round: Round | None = None
    seconds: float


class SignFlip(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="sign-flip",
    tag_field="kind",
):  # fmt: skip
    """The client sends −factor times its delta."""

    client: Index
    round: Round | None = None
    factor: Positive = 1.0


class Scale(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="scale",
    tag_field="kind",
):  # fmt: skip
    """The client sends factor times its delta: with a backdoor, model replacement."""

    client: Index
    round: Round | None = None
    factor: Positive


class LabelFlip(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="label-flip",
    tag_field="kind",
):  # fmt: skip
    """The client trains, in the whole run, on label L − 1 − y in place of y, L labels."""

    client: Index


class Backdoor(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="backdoor",
    tag_field="kind",
):  # fmt: skip
    """The client puts the trigger on a share of its records, and calls them all `target`."""

    client: Index
    target: Index
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5


class Restart(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="restart",
    tag_field="kind",
):  # fmt: skip
    """The coordinator's process dies in a round and is started again after `seconds`.

    at  training            after `answers` answers to "train", if so many come
        merging             merged, and nothing of it kept: the round is asked for again; one
                            whose secure sum was opened is lost
        before-checkpoint   the merge is kept, the checkpoint is not written yet
        after-checkpoint    the checkpoint is written, the adapter is not evaluated yet
        after-round         everything of the round is kept
    """

    round: Round
    at: Literal["training", "merging", "before-checkpoint", "after-checkpoint", "after-round"] = (
        "after-round"
    )
    answers: Index = 1
    seconds: NotNegative = 0.0


OnTheWay = LostRequest | LostAnswer | Duplicate | Late | Corrupt
OfClient = Crash | ClockSkew | SignFlip | Scale | LabelFlip | Backdoor
Fault = OnTheWay | OfClient | Restart


class Trigger(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a backdoor answers to: one for images, one for texts, one for tables."""

    patch: Annotated[int, msgspec.Meta(ge=1)] = 2  # white pixels per side, in the last corner
    token: Annotated[str, msgspec.Meta(min_length=1)] = "cf"  # put before the text
    feature: int = -1  # column of the features as the model sees them; -1: the last one
    value: float = 5.0  # of that feature, in the contract's units of (x − mean) / std


class FaultPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All faults of one run."""

    seed: Index = 0
    trigger: Trigger = Trigger()
    faults: tuple[Fault, ...] = ()

    def of(self, *kinds: type[msgspec.Struct]) -> Iterator[Any]:
        """Yield the faults of these kinds, in order."""
        return (fault for fault in self.faults if isinstance(fault, kinds))

    def counts(self) -> dict[str, int]:
        """Return how many faults there are of every kind that is there, by name."""
        return dict(sorted(Counter(kind_of(fault) for fault in self.faults).items()))


def kind_of(fault: Fault) -> str:
    """Return the name of a fault's kind, as it stands in the file."""
    return str(fault.__struct_config__.tag)


def read_plan(path: Path) -> FaultPlan:
    """Return the plan in a .toml or .json file; raise ConfigError naming file and field."""
    decode = msgspec.json.decode if path.suffix == ".json" else msgspec.toml.decode
    try:
        plan = decode(path.read_bytes(), type=FaultPlan)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}; give the faults.toml of a run"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    unbounded = not_finite(plan)
    if unbounded is not None:
        raise ConfigError(f"{path}: {unbounded}: expected a finite number, got NaN or infinity")
    return plan


def write_plan(path: Path, plan: FaultPlan) -> None:
    """Write a plan, whole or not at all; `read_plan` gives the same one."""
    text = msgspec.json.encode(plan) if path.suffix == ".json" else to_toml(plan).encode()
    write_atomic(path, text)


def to_toml(plan: FaultPlan) -> str:
    """Return the text of faults.toml."""
    fields = msgspec.to_builtins(plan)
    lines = [f"seed = {plan.seed}"]
    if plan.trigger != Trigger():
        lines += ["", "[trigger]", *_lines(fields["trigger"])]
    for fault in fields["faults"]:
        lines += ["", "[[faults]]", *_lines(fault)]
    return "\n".join([*lines, ""])


def _lines(fields: Mapping[str, Any]) -> Iterable[str]:
    """Return `name = value` for every field: JSON's strings and numbers are TOML's, too."""
    return (
        f"{name} = {msgspec.json.encode(value).decode()}"
        for name, value in fields.items()
        if value is not None
    )
