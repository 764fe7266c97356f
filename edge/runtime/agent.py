"""The device agent: a loop of one pure decision and one action.

What is true is read from the disk and the sensors before every step, so a kill at any point loses
the action that was under way and nothing else. The first line that applies:

    facts                                                              action
    an entry of the spool is past its deadline, or of a sum whose
      task is not there any more                                       Drop
    the task has an entry in the spool that is sent itself             Finish (forget the task)
    the task is past its deadline                                      Expire (forget the task)
    an entry waits; the network is allowed; not backing off            Send
    the task's entry is for a secure sum; as before                    Join
    a task, its files are here; charging, idle, … (no network needed)  Train
    a task; the network is allowed; not backing off                    Pull
    no task; all conditions hold; the server's time has come           Ask
    else                                                               Wait

The memory between steps is agent.json: failures in a row, when the next call is due, why. A call
that is due in more than a week was written before the clock was set back: it is due now.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated

import msgspec

from anabranch.edge.runtime.backoff import MAX_WINDOW_S, Backoff, Window, next_delay_s
from anabranch.edge.runtime.conditions import Unmet, only_network, without_network
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.spool import Entry
from anabranch.storage.files import write_atomic

FILE = "agent.json"
MAX_LAST = 500  # characters of what happened last
POLL_S = 60.0  # between two looks at conditions that do not hold
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """agent.json: what the agent must still know after a restart."""

    failures: Annotated[int, msgspec.Meta(ge=0)] = 0  # of calls, in a row
    call_unix: Seconds = 0.0  # no call to the gateway before
    ask_unix: Seconds = 0.0  # no check-in before: the server's window
    told: Annotated[int, msgspec.Meta(ge=0)] = 0  # records, at the last check-in
    last: str = ""  # what happened last, for `status`


@dataclass(frozen=True, kw_only=True)
class Doing:
    """The task that is under way."""

    task: str
    deadline_unix: float
    ready: bool  # bundle and adapter are on the disk


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is true now."""

    now_unix: float
    unmet: tuple[Unmet, ...]
    entries: tuple[Entry, ...]  # of the spool
    doing: Doing | None
    memory: Memory


@dataclass(frozen=True)
class Drop:
    """Remove an entry that cannot be counted any more."""

    entry: Entry


@dataclass(frozen=True)
class Finish:
    """Forget a task whose delta is in the spool."""


@dataclass(frozen=True)
class Expire:
    """Forget a task whose deadline has passed."""


@dataclass(frozen=True)
class Send:
    """Send an entry."""

    entry: Entry


@dataclass(frozen=True)
class Join:
    """Take the next step of the secure sum that the task's entry is for."""

    entry: Entry


@dataclass(frozen=True)
class Train:
    """Train the task."""


@dataclass(frozen=True)
class Pull:
    """Download what the task needs."""


@dataclass(frozen=True)
class Ask:
    """Check in."""


@dataclass(frozen=True)
class Wait:
    """Do nothing for so long."""

    seconds: float
    reasons: tuple[str, ...]


Action = Drop | Finish | Expire | Send | Join | Train | Pull | Ask | Wait


def decide(facts: Facts) -> Action:
    """Return what to do next (table above). Pure."""
    now, doing, memory = facts.now_unix, facts.doing, facts.memory
    for entry in facts.entries:
        orphan = entry.secure and (doing is None or doing.task != entry.task)
        if entry.expired(now) or orphan:
            return Drop(entry)
    mine = [one for one in facts.entries if doing is not None and one.task == doing.task]
    if mine and not mine[0].secure:
        return Finish()
    if doing is not None and now > doing.deadline_unix:
        return Expire()
    offline = only_network(facts.unmet)
    may_call = not offline and _due_s(memory.call_unix, now) <= 0
    for entry in facts.entries if may_call else ():
        if not entry.secure:
            return Send(entry)
    if mine:
        return Join(mine[0]) if may_call else _wait(facts, offline)
    if doing is not None and doing.ready:
        held = without_network(facts.unmet)
        return _wait(facts, held) if held else Train()
    if doing is not None:
        return Pull() if may_call else _wait(facts, offline)
    if not facts.unmet and max(_due_s(memory.call_unix, now), _due_s(memory.ask_unix, now)) <= 0:
        return Ask()
    return _wait(facts, facts.unmet)


def _wait(facts: Facts, reasons: tuple[Unmet, ...]) -> Wait:
    """Wait until the next call is due, or for POLL_S where conditions may change sooner."""
    memory, now = facts.memory, facts.now_unix
    idle = facts.doing is None and not facts.entries
    due = max(_due_s(memory.call_unix, now), _due_s(memory.ask_unix, now) if idle else 0.0)
    if reasons:
        return Wait(max(min(due, POLL_S), 0.0) or POLL_S, tuple(map(str, reasons)))
    return Wait(min(max(due, 0.0), POLL_S) or POLL_S, ("the next call is not due yet",))


def _due_s(due_unix: float, now: float) -> float:
    """Return in how many seconds a call is due; none was ever put off by more than MAX_WINDOW_S."""
    return due_unix - now if due_unix - now <= MAX_WINDOW_S else 0.0


def reached(memory: Memory, now: float, window: Window | None, rng: random.Random) -> Memory:
    """Return the memory after a call that the gateway answered, with or without a window."""
    ask = memory.ask_unix if window is None else now + window.delay_s(rng)
    return msgspec.structs.replace(memory, failures=0, call_unix=0.0, ask_unix=ask)


def called_again(memory: Memory, now: float, window: Window, rng: random.Random) -> Memory:
    """Return the memory after a step of a secure sum: the next call is due within the window."""
    return msgspec.structs.replace(memory, failures=0, call_unix=now + window.delay_s(rng))


def failed(memory: Memory, now: float, backoff: Backoff, rng: random.Random) -> Memory:
    """Return the memory after a call that failed: calls wait, longer after every failure."""
    failures = memory.failures + 1
    wait = next_delay_s(failures, None, backoff, rng)
    return msgspec.structs.replace(memory, failures=failures, call_unix=now + wait)


def noted(memory: Memory, text: str) -> Memory:
    """Return the memory with what happened last."""
    return msgspec.structs.replace(memory, last=plain(text))


def plain(text: str, most: int = MAX_LAST) -> str:
    """Return a sentence that may hold a gateway's words so that it is safe on a terminal: short,
    without control characters.
    """
    short = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in short)


def read_memory(home: Home) -> Memory:
    """Return agent.json; a new memory if there is none, or it is damaged: it is only a memory."""
    try:
        return msgspec.json.decode((home.folder / FILE).read_bytes(), type=Memory)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return Memory()


def write_memory(home: Home, memory: Memory) -> None:
    """Replace agent.json."""
    write_atomic(home.folder / FILE, msgspec.json.encode(memory))
