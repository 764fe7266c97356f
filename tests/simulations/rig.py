"""A federation small enough to know its result: sites that do a little numpy work.

Site k holds n_k records and pulls every value of the adapter towards its own target, with
noise from (seed, site, round), so that a wrong order, seed or weight changes the result.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from anabranch.client.flower import SiteLike, client_app
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.messages import Assignment, Evaluated, Trained
from anabranch.protocols.spec import AdapterSpec
from anabranch.simulations.grid import InProcessGrid

SPEC = AdapterSpec(
    base="0" * 64,
    tokenizer="",
    rank=2,
    alpha=4.0,
    targets=("layer",),
    tensors=(
        ("head.weight", (3, 5)),
        ("layer.lora_A.weight", (2, 4)),
        ("layer.lora_B.weight", (3, 2)),
    ),
)
SIZES = {"aarhus": 30, "bergen": 10, "cork": 20, "delft": 40}


def config(*, holdout: float = 0.2, seed: int = 7, **federation: Any) -> RunConfig:
    """Return a run of two rounds, changed by `federation`."""
    return msgspec.convert(
        {
            "name": "toy",
            "task": {"kind": "tabular-classification", "labels": ["no", "yes"]},
            "data": {"columns": {"x": {"type": "number"}, "y": {"type": "label"}}},
            "model": {"base": "logistic"},
            "federation": {"rounds": 2, "method": "fedavg", "deadline_s": 60.0, **federation},
            "training": {"holdout": holdout},
            "seed": seed,
        },
        RunConfig,
    )


def adapter(value: float = 0.0, spec: AdapterSpec = SPEC) -> Adapter:
    return Adapter(spec, {name: np.full(s, value, np.float32) for name, s in spec.tensors})


@dataclass
class ToySite:
    """Sends exactly `step` in every value, or with `step=None` a noisy pull to its target."""

    name: str
    num_examples: int = 10
    step: float | None = None
    held_out: int = 4
    max_rank: int | None = None

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        pass

    def sizes(self, config: RunConfig) -> tuple[Sequence[int], Sequence[int]]:
        return range(self.num_examples), range(self.held_out)

    def train(self, assignment: Assignment, before: Adapter) -> tuple[Trained, bytes]:
        arrays = {name: self._moved(a, name, assignment) for name, a in before.arrays.items()}
        delta = Adapter(before.spec, arrays).minus(
            before, num_examples=self.num_examples, part=assignment.part, steps=3
        )
        report = Trained(
            site=self.name, num_examples=self.num_examples, steps=3, seconds=0.5, loss=0.25
        )
        uplink = assignment.config.uplink
        return report, wire.encode(delta, codec=uplink.codec, keep=uplink.keep)

    def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
        distance = abs(float(adapter.arrays["head.weight"][0, 0]) - self._target())
        return Evaluated(
            site=self.name, num_examples=self.held_out, metrics={"accuracy": 1 / (1 + distance)}
        )

    def _target(self) -> float:
        return int(hashlib.sha256(self.name.encode()).hexdigest()[:4], 16) / 65536

    def _moved(self, array: Any, name: str, assignment: Assignment) -> Any:
        if self.step is not None:
            return array + np.float32(self.step)
        text = f"{assignment.config.seed}/{self.name}/{assignment.round}/{name}"
        rng = np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))
        noise = rng.standard_normal(array.shape).astype(np.float32)
        return array + np.float32(0.3) * (np.float32(self._target()) - array) + 0.01 * noise


def toy_site_for(context: Context) -> SiteLike:
    """Return the site of a node, by its place in the sorted list (any engine) or its folder."""
    site = context.node_config.get("site")
    name = site if isinstance(site, str) else sorted(SIZES)[_partition(context)]
    return ToySite(name, SIZES[name])


def _partition(context: Context) -> int:
    return int(context.node_config["partition-id"])


def app_of(
    sites: Iterable[SiteLike],
    tamper: Mapping[str, Callable[[RecordDict], None]] | None = None,
) -> ClientApp:
    """Return a ClientApp of these sites; `tamper[name]` changes a site's training reply."""
    by_name = {site.name: site for site in sites}
    inner = client_app(lambda context: by_name[str(context.node_config["site"])])
    if not tamper:
        return inner
    outer = ClientApp()

    @outer.train()
    def train(message: Message, context: Context) -> Message:
        reply = inner(message, context)
        change = tamper.get(str(context.node_config["site"]))
        if change is not None:
            change(reply.content)
        return reply

    outer.evaluate()(inner)
    outer.query("describe")(inner)
    return outer


def rewrite(content: RecordDict, **fields: Any) -> None:
    """Change fields of the JSON message in a reply, and the metrics with it."""
    record = content.config_records["message"]
    message = msgspec.json.decode(bytes(record["json"])) | fields  # type: ignore[arg-type]
    content["message"] = ConfigRecord(
        {"kind": record["kind"], "json": msgspec.json.encode(message)}
    )
    if "num_examples" in fields:
        content.metric_records["metrics"]["num-examples"] = fields["num_examples"]


def replace_frame(content: RecordDict, frame: bytes) -> None:
    """Put other bytes into a reply, with a shape that fits them."""
    array = content.array_records["frame"]["frame"]
    array.data, array.shape = frame, (len(frame),)


def with_value(frame: bytes, value: float) -> bytes:
    """Return the frame with another last value, and the right checksum again."""
    body = frame[: -wire.DIGEST_BYTES - 4] + np.float32(value).tobytes()
    return body + hashlib.sha256(body).digest()


@dataclass
class VirtualTime:
    """Seconds that pass only when somebody sleeps."""

    now: float = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Events:
    """Keeps what it is told."""

    all: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, kind: str, **fields: Any) -> None:
        msgspec.json.encode(fields)  # an event must be writable
        self.all.append({"kind": kind, **fields})

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.all if event["kind"] == kind]


class DelayedGrid(InProcessGrid):
    """Answers arrive after `delays[site]` virtual seconds; math.inf is a site that hangs.

    A list gives the delay of each of a site's training messages in turn, the last one again
    and again. Other messages are answered at once, unless `slow` names their type.
    """

    def __init__(
        self,
        client_app: ClientApp,
        sites: Sequence[str],
        time: VirtualTime,
        delays: Mapping[str, float | list[float]],
        *,
        slow: str = "train",
        node_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__(client_app, sites, node_ids=node_ids)
        self._time, self._delays, self._slow = time, delays, slow
        self._names = dict(zip(super().get_node_ids(), sites, strict=True))
        self._sent: dict[str, int] = {}
        self._due: dict[str, float] = {}
        self.offline: set[str] = set()

    def get_node_ids(self) -> list[int]:
        return [n for n in super().get_node_ids() if self._names[n] not in self.offline]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        ids = super().push_messages(messages)
        for number, message in zip(ids, messages, strict=True):
            self._due[number] = self._time.now + self._delay(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        due = [i for i in message_ids if self._due[i] <= self._time.now]
        self.wait(due)
        return super().pull_messages(due)

    def _delay(self, message: Message) -> float:
        if message.metadata.message_type != self._slow:
            return 0.0
        name = self._names[message.metadata.dst_node_id]
        delay = self._delays.get(name, 0.0)
        if not isinstance(delay, list):
            return delay
        turn = self._sent.get(name, 0)
        self._sent[name] = turn + 1
        return delay[min(turn, len(delay) - 1)]


NEVER = math.inf
