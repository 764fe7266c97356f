"""Devices that take part in secure sums: the runtime's own code, with deltas that are made up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from anabranch.edge.gateway.config import GATEWAY_FILE
from anabranch.edge.gateway.operator import _without_null, invite
from anabranch.edge.gateway.server import Gateway as Serving
from anabranch.edge.gateway.server import start
from anabranch.edge.gateway.store import Row
from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import sync
from anabranch.edge.runtime.backoff import Backoff
from anabranch.edge.runtime.download import fetch_frame
from anabranch.edge.runtime.enrol import Invitation, enrol, read_enrolled
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.peer import announced
from anabranch.edge.runtime.spool import Spool
from anabranch.edge.runtime.summing import Sum
from anabranch.edge.runtime.sync import Verdict
from anabranch.edge.runtime.transport import Gateway, Patience, connect
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Federation
from benchmarks.edge.gateway_load import delta_of, new_gateway, spec_of
from tests.gateway_cases import ended, open_round

SECURE: dict[str, Any] = {"minimum": 3, "stage_s": 20.0, "ring": 32}
SPEC = spec_of(800)
QUICK = Patience(call_s=60.0, stream_s=60.0, attempts=3, backoff=Backoff(base_s=0.01, cap_s=0.02))


@dataclass
class Phone:
    """One device: its folder, its end of the connection, its part in a sum."""

    home: Home
    gateway: Gateway
    task: edge_pb2.Task | None = None
    sum: Sum | None = None
    said: list[str] = field(default_factory=list)  # stages that it answered
    word: Verdict | None = None

    @property
    def name(self) -> str:
        return read_enrolled(self.home).device

    def ask(self, examples: int = 10) -> bool:
        """Check in; return whether there is a task."""
        told = edge_pb2.Capabilities(runtime="test", engines=["joint"], examples=examples)
        got = sync.check_in(self.gateway, told, peer=announced(self.home))
        self.task = got if isinstance(got, edge_pb2.Task) else None
        return self.task is not None

    def train(self, delta: Delta) -> Sum:
        """Put a delta into the spool, as training does."""
        assert self.task is not None
        fetch_frame(self.gateway, self.task.adapter, self.home)
        spool = Spool(self.home.spool)
        entry = spool.put(
            self.task.id,
            wire.encode(delta),
            examples=delta.num_examples,
            steps=delta.steps,
            deadline_unix=self.task.deadline_unix,
            secure=True,
        )
        self.sum = Sum(self.home, self.task, entry, spool)
        return self.sum

    def step(self) -> None:
        assert self.sum is not None
        got = self.sum.step(self.gateway)
        if isinstance(got, Verdict):
            self.word = got


Made = Callable[..., tuple[Serving, list[Phone]]]  # of so many devices


def new_phones(serving: Serving, folder: Path, count: int) -> list[Phone]:
    """Return enrolled devices that have called once."""
    phones = []
    for number, text in enumerate(invite(serving.folder.folder, count=count)):
        home = Home(folder / f"phone-{number}")
        enrol(home, Invitation.parse(text))
        phones.append(Phone(home, connect(home, patience=QUICK)))
        phones[-1].ask()
    return phones


def new_secure_gateway(folder: Path, count: int, **settings: Any) -> Serving:
    """Return a running gateway with [secure_aggregation] for that many devices.

    `signer`: a public key, hex, that devices learn beside the bundle's.
    """
    secure = SECURE | settings.pop("secure", {})
    signer = settings.pop("signer", None)
    given = {"cohort": count, "min_cohort": 3, "over_selection": 1.0} | settings
    made = new_gateway(folder, SPEC, secure_aggregation=secure, **given)
    if signer is not None:
        file = made.read()
        keys = (*file.bundle_keys, signer)
        text = msgspec.to_builtins(msgspec.structs.replace(file, bundle_keys=keys))
        (made.folder / GATEWAY_FILE).write_bytes(msgspec.toml.encode(_without_null(text)))
    return start(made.folder)


def deltas_of(spec: AdapterSpec, count: int) -> list[Delta]:
    """Return deltas within the range, of 5, 6, 7, … records."""
    made = []
    for seed in range(count):
        delta = delta_of(spec, seed, examples=5 + seed)
        arrays = {
            name: (np.clip(array, -3, 3) / 4).astype(np.float32)
            for name, array in delta.arrays.items()
        }
        made.append(Delta(spec, arrays, delta.num_examples, part=delta.part, steps=3))
    return made


def ready(phones: Iterable[Phone], deltas: Iterable[Delta]) -> None:
    """Let devices take their tasks and train."""
    for phone, delta in zip(phones, deltas, strict=True):
        assert phone.ask(examples=delta.num_examples)
        phone.train(delta)


def trained(gateway: Serving, adapter: Adapter, phones: list[Phone]) -> tuple[Row, list[Delta]]:
    """Open a round, and let these devices train; return the round and their deltas."""
    row, deltas = begin(gateway, adapter), deltas_of(SPEC, len(phones))
    ready(phones, deltas)
    return row, deltas


def called(phones: Iterable[Phone]) -> None:
    """Let devices take one step, first to say that they have trained."""
    for phone in phones:
        phone.step()


def until_over(
    phones: list[Phone],
    gateway: Serving,
    alive: Callable[[Phone, str], bool] = lambda phone, stage: True,
    *,
    late: Callable[[], None] = lambda: None,
    wait_s: float = 30.0,
) -> None:
    """Let devices go on until all that are alive have the gateway's last word.

    `alive(phone, stage)` says whether a device goes on, given the stage that it answers next;
    `late` is called after every turn.
    """
    end = time.monotonic() + wait_s
    left = phones
    while time.monotonic() < end:
        left = [one for one in phones if one.word is None and alive(one, stage_of(one))]
        if not left:
            return
        for phone in left:
            phone.step()
        late()
        gateway.closer.due()
    raise TimeoutError(f"{len(left)} devices wait")


def stage_of(phone: Phone) -> str:
    """Return the stage that a device would answer next."""
    member: Any = None if phone.sum is None else phone.sum._member
    return "advertise" if member is None else str(member.stage)


def mean(deltas: list[Delta]) -> dict[str, Any]:
    """Return the mean over all records, in float64."""
    total = sum(delta.num_examples for delta in deltas)
    return {
        name: sum(d.num_examples * d.arrays[name].astype(np.float64) for d in deltas) / total
        for name in deltas[0].arrays
    }


def begin(gateway: Serving, adapter: Adapter, number: int = 1, deadline_s: float = 600.0) -> Row:
    federation = Federation(rounds=10, method="fedavg", deadline_s=deadline_s)
    return open_round(gateway.opener, adapter, number, federation=federation)


def result(gateway: Serving, row: Row) -> Delta:
    row = ended(gateway.parts.store, row)
    assert (row["state"], row["reason"]) == ("closed", "")
    frame = (gateway.folder.results / row["result"]).read_bytes()
    return wire.decode_delta(frame, SPEC)


def require_mean(got: Delta, deltas: list[Delta]) -> None:
    """The mean of what was sent, within the grid's step per device."""
    assert got.num_examples == sum(delta.num_examples for delta in deltas)
    heaviest = max(delta.num_examples for delta in deltas)
    step = 4.0 / (2**31 / 5 - 2) * heaviest / got.num_examples * len(deltas) * 2
    for name, expected in mean(deltas).items():
        np.testing.assert_allclose(got.arrays[name], expected, rtol=1e-6, atol=step)


def until(stage: str, lost: list[Phone]) -> Callable[[Phone, str], bool]:
    """The lost ones go away before they answer this stage."""
    return lambda phone, at: phone not in lost or at != stage


def give_up_on(lost: list[Phone], gateway: Serving, row: Row) -> None:
    """Let the stage's deadline pass as soon as only the lost have not answered."""
    running = gateway.parts.sums._running.get(row["id"])
    if running and running.aggregation.waiting() <= {phone.name for phone in lost}:
        running.until = 0.0


def time_is_up(gateway: Serving, row: Row) -> None:
    """Let the time for collecting be over: as much is left as five stages take."""
    left = time.time() + 5 * 20.0
    with gateway.parts.store.writing() as db:
        db.execute("UPDATE rounds SET deadline = ? WHERE id = ?", (left, row["id"]))
