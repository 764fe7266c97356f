"""Attack: a coordinator that stops in the middle, so that a site keeps what opens its vector.

After `mask` the vector has left, and with the seed and the masking key in the site's memory, or in
the file between two processes, whoever gets hold of both reads the update. The last answer drops
them, and is never asked for. (The agent: tests/client/agent/test_hostile_coordinator.py.)

Why it fails: a sum is over when its five deadlines are. Then the next message of any kind drops
what it has left, and a long-lived process does by itself, while it idles or trains.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from anabranch.client import app
from anabranch.client.flower import NO_LIMITS
from anabranch.client.sums import between
from anabranch.client.sums.between import longest
from anabranch.client.sums.participant import Participant, Participants
from anabranch.client.sums.terms import vector_of
from anabranch.edge.gateway.app import gateway_or_site
from anabranch.protocols.errors import ConfigError, ProtocolError
from anabranch.protocols.secagg.messages import Survivors
from tests.client.sums.summing_sites import (
    ASSIGNMENT,
    NAMES,
    RUN,
    Sites,
    kept,
    summed_up,
    terms_of,
)
from tests.secure_cases import carried, secured
from tests.simulations.rig import config

START = time.monotonic()


class Clock:
    """Where the participants take the time from."""

    now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def members(clock: Clock) -> dict[str, Participant]:
    """Return long-lived members that have masked their updates, and are asked nothing more."""
    made = kept(clock=clock)
    summed_up(made, terms_of(made), "agree")
    return made


def test_a_sum_takes_its_five_deadlines_and_a_minute() -> None:
    assert longest(secured(config(), deadline_s=20.0)) == 160.0


def test_secrets_are_dropped_when_the_sum_is_over(
    members: dict[str, Participant], clock: Clock
) -> None:
    all_of = Participants()
    for name in members:
        all_of.of("toy-1", name, functools.partial(members.__getitem__, name))

    clock.now = START + longest(RUN)
    all_of.expire()
    assert all(one._member is not None for one in members.values())
    clock.now += 1.0
    all_of.expire()

    assert all(one._member is None for one in members.values())


def test_a_stage_that_is_asked_too_late_is_refused(
    members: dict[str, Participant], clock: Clock
) -> None:
    one = members[NAMES[0]]
    assert one._member is not None
    request = Survivors(instance=one._member.terms.instance, names=NAMES)
    clock.now += longest(RUN) + 1.0

    with pytest.raises(ProtocolError, match="is in no secure sum of it"):
        one.answer(ASSIGNMENT, request, NO_LIMITS, vector_of)

    assert one._member is None


def test_a_member_that_is_just_answering_is_not_waited_for(
    members: dict[str, Participant], clock: Clock
) -> None:
    one = members[NAMES[0]]
    clock.now += longest(RUN) + 1.0
    with one._lock:
        worker = threading.Thread(target=one.expire)
        worker.start()
        worker.join(timeout=30.0)
        assert not worker.is_alive()
    assert one._member is not None


def test_a_delta_outlives_its_attempt(clock: Clock) -> None:
    """A sum that came to nothing before `mask`: the next attempt has the same update."""
    members = kept(clock=clock)
    summed_up(members, terms_of(members), "mask")
    clock.now += longest(RUN) + 1.0
    for one in members.values():
        one.expire()

    assert summed_up(members, terms_of(members, "cd" * 32)).stage == "done"


# A process for each message


@pytest.fixture
def files(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Return what the members left in memory after `mask`."""
    monkeypatch.setattr(between, "memories", lambda: (tmp_path,))
    sites = Sites(tmp_path / "sites", between.own_folder(tmp_path), clock)
    carried(sites.invite(), sites.answer, "agree")
    return {name: sites.file(name) for name in NAMES}


@dataclass
class Message:
    """The context of a message to a node."""

    node_config: dict[str, Any] = field(default_factory=dict)


def test_the_next_message_of_any_kind_drops_what_was_left(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one that comes to nothing."""
    assert {json.loads(f.read_bytes())["until"] for f in files.values()} == {START + longest(RUN)}
    monkeypatch.setattr(app, "forbid_dumps", lambda: None)  # this process is the tests'

    for left, there in ((600.0, True), (-1.0, False)):
        for file in files.values():
            said = json.loads(file.read_bytes())
            assert said["member"]["seed"]
            file.write_text(json.dumps(said | {"until": time.monotonic() + left}))
        with pytest.raises(ConfigError, match="this SuperNode has no site"):
            app.site_of(Message())  # type: ignore[arg-type]
        assert [file.exists() for file in files.values()] == [there] * len(NAMES)


def test_a_gateway_begins_its_processes_as_a_site_does(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr("anabranch.edge.gateway.app.begin", lambda: begun.append("gateway"))
    monkeypatch.setattr("anabranch.edge.gateway.app.open_gateway", lambda folder: folder)
    context = Message({"gateway": "/srv/gateway"})

    assert str(gateway_or_site(context)) == "/srv/gateway"  # type: ignore[arg-type]
    assert begun == ["gateway"]


def test_who_was_in_no_sum_has_no_folder_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(between, "memories", lambda: (tmp_path,))
    between.sweep()
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(between, "memories", tuple)
    between.sweep()  # a run without secure sums needs none
