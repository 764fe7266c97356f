"""When answers arrive: a message's way to a device, its training, and the way back.

    sent ─ download ─ compute ─ upload ─► there      in virtual seconds (costs.py, pace.py)
              └─────────┴─────────┴─► the device gives up, or goes offline: never there

A device must be online from the request to the end of its answer. It abandons a round with its
chance of dropping out, at a moment that is uniform over the round's work. One without the memory
says so at once. All that is drawn is drawn from (seed, round, client).

A device that failed is heard of again at the deadline, or once it is back online if that is
later: until then the coordinator waits for it, as it would in life, and afterwards may ask it
anew. A message that asks who a device is costs nothing.

What is known in advance to count nowhere is never trained: an answer after its deadline, of a
device that failed, or of a round that has its deltas. `listening` tells these journeys what the
round engine says, so that they know which deltas were merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from flwr.app import Message

from anabranch.client.flower import DESCRIBE, pack_refused
from anabranch.client.tuning.training import steps_per_round
from anabranch.protocols.config import RunConfig
from anabranch.protocols.messages import Refused
from anabranch.simulations.clock.costs import grams, joules, spent, uniform
from anabranch.simulations.clock.log import FAILED, KINDS, OUTCOMES, Log, RoundTimes, Row, log_of
from anabranch.simulations.clock.pace import Ints, Pace
from anabranch.simulations.clock.payload import Payloads
from anabranch.simulations.grid import UNAVAILABLE, UNKNOWN, error_reply
from anabranch.simulations.population.devices import Availability, Devices
from anabranch.simulations.population.regions import region_of

# Purposes of draws, as in pace.py.
DROPOUT: Final = 5
MOMENT: Final = 6
TRAIN, EVALUATE, OTHER = range(3)
MANY: Final = 256  # clients: who comes and goes next is asked every PATIENCE heartbeats
PATIENCE: Final = 100


class DeviceJourneys:
    """Journeys of the clients whose devices and availability are given.

    `held` are the records that each client evaluates on; `heartbeat_s` is how often the
    coordinator learns who is connected, 0: at once.
    """

    def __init__(
        self,
        devices: Devices,
        availability: Availability,
        config: RunConfig,
        pace: Pace,
        *,
        held: Ints | None = None,
        seed: int = 0,
        memory_factor: float = 1.0,
        heartbeat_s: float = 0.0,
    ) -> None:
        self.devices, self.pace = devices, pace
        self._availability, self._config, self._seed = availability, config, seed
        self._held = np.zeros(len(devices), np.int64) if held is None else held
        self._needed_bytes = pace.work.memory(pace.batch_size) * memory_factor
        self._heartbeat_s = heartbeat_s
        self._everybody = np.arange(len(devices), dtype=np.int64)
        self._g_per_kwh = [region_of(name).g_per_kwh for name in devices.regions]
        self._rows: list[Row] = []
        self._by_message: dict[str, Row] = {}
        self._training: dict[tuple[int, int], Row] = {}  # (client, round) -> what may be merged
        self._closed = 0  # no delta of this round or an earlier one is merged any more
        self._warm = np.zeros(len(devices), np.bool_)  # its prefixes are known
        self._payloads = Payloads(config.uplink)
        self._seen: tuple[float, list[int]] | None = None  # who is connected, since when
        self._change: tuple[float, float] | None = None
        self._rounds: dict[int, dict[str, Any]] = {}

    # Journeys

    def reachable(self, now: float) -> Sequence[int]:
        """Return who was online at the last heartbeat."""
        at = self._heartbeat(now)
        if self._seen is None or self._seen[0] != at:
            online = self._availability.online(self._everybody, at)
            self._seen = at, np.flatnonzero(online).tolist()
        return self._seen[1]

    def next_change(self, now: float) -> float:
        """Return the first heartbeat after `now` at which somebody came or left.

        Among many clients somebody always does: they are not all asked at every heartbeat, and
        one at which nothing changed may be returned.
        """
        at = self._heartbeat(now)
        patience = self._heartbeat_s * (PATIENCE if len(self.devices) > MANY else 0)
        if self._change is None or self._change[1] <= at >= self._change[0] + patience:
            self._change = at, self._availability.next_change(at)
        change = self._change[1]
        if not self._heartbeat_s or math.isinf(change):
            return change
        seen = math.ceil(change / self._heartbeat_s)
        return max(seen, self._beats(now) + 1) * self._heartbeat_s

    def answered_at(self, client: int, message: Message, now: float) -> float | None:
        """Return when the coordinator hears of this message again; None: never.

        That is its answer, or for a device that failed the news that it did.
        """
        kind = message.metadata.message_type
        if kind == DESCRIBE:
            return now
        group = message.metadata.group_id
        number = int(group) if group.isdecimal() else 0
        down, up = self._payloads.of(message.content, trains=kind != "evaluate")
        row = self._sent(client, KINDS.index(kind) if kind in KINDS else OTHER, number, now)
        due = self._travel(row, down, up)
        self._rows.append(row)
        self._by_message[message.metadata.message_id] = row
        if row.kind == TRAIN:
            self._training[client, number] = row
        return due

    # What is not trained, and what was

    def spared(self, client: int, message: Message) -> Message | None:
        """Return the reply of a device whose delta counts nowhere; None: it has to train."""
        row = self._by_message.get(message.metadata.message_id)
        if row is None:
            return None
        outcome = OUTCOMES[row.outcome]
        if outcome == "memory":
            text = (
                f"training needs {self._needed_bytes / 1e6:.0f} MB of memory, the device has "
                f"{self.devices.memory_bytes[client] / 1e6:.0f} MB"
            )
            refused = Refused(site=f"node-{client}", reason="model", message=text)
            return Message(pack_refused(refused), reply_to=message)
        if outcome in FAILED or (row.kind == TRAIN and row.round <= self._closed):
            return error_reply(message, UNAVAILABLE if outcome in FAILED else UNKNOWN, outcome)
        return None

    def computed(self, message: Message) -> None:
        """Note that this message is being trained; nobody asks about it again."""
        row = self._by_message.pop(message.metadata.message_id, None)
        if row is not None:
            row.computed = True

    def listening(self, clock: Callable[[], float], event: Any) -> Callable[..., None]:
        """Return `event` (server/exchange.py) that these journeys hear, too."""

        def both(kind: str, **fields: Any) -> None:
            self.hear(kind, clock(), fields)
            event(kind, **fields)

        return both

    def hear(self, kind: str, now: float, fields: Mapping[str, Any]) -> None:
        """Take one event of the round engine."""
        number = fields.get("round", 0)
        if kind == "round_started":
            self._rounds[number] = {"round": number, "started_at": now}
            self._closed = min(self._closed, number - 1)  # a coordinator that had to start again
        elif kind == "site_surplus":
            self._mark(self.pace.client(fields["site"]), number, "surplus")
        elif kind == "round_aggregated":
            for site in fields["sites"]:
                self._merged(self.pace.client(site), number, fields["ages"].get(site, 0))
            if self._config.federation.buffer is None:
                self._closed = max(self._closed, number)
            self._rounds[number]["merged_at"] = now
        elif kind == "round_evaluated":
            metrics = {name: dict(fields[name]) for name in ("coordinator", "client")}
            self._rounds[number] |= {"ended_at": now, **metrics}

    # Afterwards

    def log(self) -> Log:
        """Return what happened to every message so far."""
        return log_of(self._rows)

    def rounds(self) -> list[RoundTimes]:
        """Return all rounds that have ended, ascending."""
        ended = [fields for _, fields in sorted(self._rounds.items()) if "ended_at" in fields]
        return [RoundTimes(**fields) for fields in ended]

    def _sent(self, client: int, kind: int, number: int, now: float) -> Row:
        """Return the row of a message whose costs are not known yet."""
        planned = steps_per_round(int(self.pace.sizes[client]), self._config.training)
        planned = planned if kind != EVALUATE else 0
        steps = self.pace.trains(client, number, planned) if kind == TRAIN else planned
        ok = OUTCOMES.index("evaluated" if kind == EVALUATE else "unmerged")
        return Row(
            client=client,
            kind=kind,
            round=number,
            sent_at=now,
            download_s=0.0,
            compute_s=0.0,
            upload_s=0.0,
            arrived_at=math.nan,
            bytes_down=0,
            bytes_up=0,
            joules=0.0,
            grams=0.0,
            steps=steps,
            planned=planned,
            outcome=ok,
        )

    def _travel(self, row: Row, down: int, up: int) -> float | None:
        """Fill in what a message costs; return when the coordinator hears of it again."""
        client, now, pace = row.client, row.sent_at, self.pace
        if row.kind != EVALUATE and self.devices.memory_bytes[client] < self._needed_bytes:
            row.outcome = OUTCOMES.index("memory")
            row.arrived_at = now + 2 * pace.overhead_s
            return row.arrived_at
        download, upload = pace.network_s(client, row.round, down, up)
        compute = self._compute_s(row)
        parts = (download, compute, upload)
        total = sum(parts)
        failed, elapsed = self._failure(row, total)
        done = parts if failed is None else spent(parts, elapsed)
        row.download_s, row.compute_s, row.upload_s = done
        row.bytes_down = _share(down, row.download_s, download)
        row.bytes_up = _share(up, row.upload_s, upload)
        row.joules = joules(
            row.compute_s,
            row.download_s + row.upload_s,
            float(self.devices.compute_watts[client]),
            float(self.devices.network_watts[client]),
        )
        row.grams = grams(row.joules, self._g_per_kwh[self.devices.region[client]])
        if row.compute_s >= compute and row.kind == TRAIN:
            self._warm[client] = True
        deadline = now + self._config.federation.deadline_s
        if failed is not None:
            row.outcome = OUTCOMES.index(failed)
            back = self._availability.next_online(client, now + elapsed)
            heard = max(back, deadline)
            return heard if math.isfinite(heard) else None
        row.arrived_at = now + total
        if row.arrived_at > deadline:
            row.outcome = OUTCOMES.index("late")
        return row.arrived_at

    def _compute_s(self, row: Row) -> float:
        client, number = row.client, row.round
        if row.kind == EVALUATE:
            return self.pace.evaluate_s(client, number, int(self._held[client]))
        warm = self.pace.prefix == "run" and bool(self._warm[client])
        return self.pace.compute_s(client, number, row.steps, warm=warm)

    def _failure(self, row: Row, total: float) -> tuple[str | None, float]:
        """Return why a device does not finish, if so, and after how many seconds it ends."""
        client, now = row.client, row.sent_at
        online = self._availability.online_until(client, now) - now
        gives_up = math.inf
        chance = float(self.devices.dropout[client])
        if chance and uniform(self._seed, DROPOUT, row.round, client) < chance:
            gives_up = uniform(self._seed, MOMENT, row.round, client) * total
        if gives_up < min(online, total):
            return "dropped", gives_up
        return (None, total) if total <= online else ("offline", max(0.0, online))

    def _mark(self, client: int, number: int, outcome: str) -> None:
        row = self._training.get((client, number))
        if row is not None and OUTCOMES[row.outcome] not in FAILED:
            row.outcome = OUTCOMES.index(outcome)

    def _merged(self, client: int, number: int, age: int) -> None:
        row = self._training.pop((client, number - age), None)
        if row is not None:
            row.outcome, row.merged_in = OUTCOMES.index("merged"), number

    def _heartbeat(self, now: float) -> float:
        """Return the last heartbeat; without, the last time at which anything can have changed."""
        if self._heartbeat_s:
            return self._beats(now) * self._heartbeat_s
        if self._change is not None and self._change[0] <= now < self._change[1]:
            return self._change[0]
        return now

    def _beats(self, now: float) -> int:
        """Return the largest k with k · heartbeat_s <= now, as floats are compared."""
        beats = math.floor(now / self._heartbeat_s)
        while beats * self._heartbeat_s > now:
            beats -= 1
        while (beats + 1) * self._heartbeat_s <= now:
            beats += 1
        return beats


def _share(num_bytes: int, done_s: float, of_s: float) -> int:
    return num_bytes if done_s >= of_s else int(num_bytes * done_s / of_s)
