from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.edge.runtime import agent
from anabranch.edge.runtime.agent import (
    Ask,
    Doing,
    Drop,
    Expire,
    Facts,
    Finish,
    Memory,
    Pull,
    Send,
    Train,
    Wait,
    decide,
    failed,
    reached,
)
from anabranch.edge.runtime.backoff import Backoff, Window
from anabranch.edge.runtime.conditions import Unmet
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.spool import Entry

NOW = 1000.0
OFFLINE, BUSY = Unmet("network", "offline"), Unmet("idle", "in use")


def entry(task: str = "t-0", deadline: int = 2000) -> Entry:
    return Entry(task=task, sha256="0" * 64, size=1, examples=1, steps=1, deadline_unix=deadline)


def doing(ready: bool = True, deadline: float = 2000.0) -> Doing:
    return Doing(task="t-1", deadline_unix=deadline, ready=ready)


def facts(
    *entries: Entry,
    unmet: tuple[Unmet, ...] = (),
    doing: Doing | None = None,
    call: float = 0.0,
    ask: float = 0.0,
) -> Facts:
    memory = Memory(call_unix=call, ask_unix=ask)
    return Facts(now_unix=NOW, unmet=unmet, entries=entries, doing=doing, memory=memory)


reasons = st.sets(st.sampled_from([OFFLINE, BUSY, Unmet("battery", "low")])).map(tuple)
any_facts = st.builds(
    Facts,
    now_unix=st.just(NOW),
    unmet=reasons,
    entries=st.lists(
        st.builds(entry, st.sampled_from(["t-0", "t-1", "t-2"]), st.integers(900, 1100)),
        max_size=3,
        unique_by=lambda one: one.task,
    ).map(tuple),
    doing=st.none() | st.builds(doing, st.booleans(), st.floats(900, 1100)),
    memory=st.builds(Memory, call_unix=st.floats(0, 1e5), ask_unix=st.floats(0, 1e5)),
)


@given(any_facts)
def test_no_call_is_made_offline_or_while_backing_off(now: Facts) -> None:
    held = OFFLINE in now.unmet or now.memory.call_unix > NOW
    if held:
        assert not isinstance(decide(now), Send | Ask | Pull)


@given(any_facts)
def test_nothing_trains_or_asks_while_a_condition_for_it_does_not_hold(now: Facts) -> None:
    action = decide(now)
    if any(one.what != "network" for one in now.unmet):
        assert not isinstance(action, Train | Ask)
    if isinstance(action, Ask):
        assert now.unmet == ()
        assert now.memory.ask_unix <= NOW


@given(any_facts)
def test_an_expired_delta_is_never_sent_and_a_trained_task_never_trained_again(now: Facts) -> None:
    action = decide(now)
    if isinstance(action, Send):
        assert not action.entry.expired(NOW)
    if isinstance(action, Train | Pull):
        assert now.doing is not None
        assert now.doing.task not in {one.task for one in now.entries}


@given(any_facts)
def test_waiting_takes_some_time_and_says_why(now: Facts) -> None:
    action = decide(now)
    if isinstance(action, Wait):
        assert 0 < action.seconds <= agent.POLL_S
        assert action.reasons


@pytest.mark.parametrize(
    ("now", "action"),
    [
        (facts(), Ask()),
        (facts(ask=1001.0), Wait(1.0, ("the next call is not due yet",))),
        (facts(call=1002.0), Wait(2.0, ("the next call is not due yet",))),
        (facts(unmet=(BUSY,)), Wait(60.0, ("in use",))),
        (facts(doing=doing()), Train()),
        (facts(doing=doing(), unmet=(OFFLINE,)), Train()),
        (facts(doing=doing(), unmet=(BUSY,)), Wait(60.0, ("in use",))),
        (facts(doing=doing(ready=False)), Pull()),
        (facts(doing=doing(ready=False), unmet=(BUSY,)), Pull()),
        (facts(doing=doing(ready=False), unmet=(OFFLINE,)), Wait(60.0, ("offline",))),
        (facts(doing=doing(deadline=999.0)), Expire()),
        (facts(entry("t-1"), doing=doing()), Finish()),
        (facts(entry()), Send(entry())),
        (facts(entry(), unmet=(BUSY,)), Send(entry())),
        (facts(entry(), doing=doing(), unmet=(OFFLINE,)), Train()),
        (facts(entry(), doing=doing(), call=1500.0), Train()),
        (facts(entry(deadline=999), doing=doing()), Drop(entry(deadline=999))),
    ],
)
def test_the_table(now: Facts, action: agent.Action) -> None:
    assert decide(now) == action


def test_failures_back_off_and_an_answer_ends_that() -> None:
    rng, backoff, memory = random.Random(0), Backoff(base_s=2.0, cap_s=10.0), Memory()
    for count in range(1, 8):
        memory = failed(memory, NOW, backoff, rng)
        assert memory.failures == count
        assert NOW <= memory.call_unix <= NOW + 10.0
    memory = reached(memory, NOW, Window(min_s=60, max_s=70), rng)
    assert (memory.failures, memory.call_unix) == (0, 0.0)
    assert NOW + 60 <= memory.ask_unix <= NOW + 70
    assert reached(memory, NOW, None, rng).ask_unix == memory.ask_unix


def test_the_memory_outlives_the_process(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert agent.read_memory(home) == Memory()
    memory = agent.noted(Memory(failures=3, ask_unix=5.0), "x" * 1000)
    agent.write_memory(home, memory)
    assert agent.read_memory(home) == memory
    assert len(memory.last) == 500
    (tmp_path / agent.FILE).write_bytes(msgspec.json.encode(memory)[:-2])
    assert agent.read_memory(home) == Memory()
