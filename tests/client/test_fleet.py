"""The contract with Flower's Fleet calls, through the door and from a real SuperLink."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from anabranch.client.agent.identity import Identity
from anabranch.client.fleet import Announced, Fleet, Over, Refused, Unreachable
from anabranch.client.policy.code import app_bundle, app_hash, code_digest
from anabranch.server.superlink import SuperLinkGrid
from tests.server.coordinator.served import Served, patiently, served

SEEN: list[tuple[int, int]] = []


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("fleet")) as coordinator:
        yield coordinator


@pytest.fixture(scope="module")
def anna(here: Served) -> Identity:
    return here.join("st-anna")


@pytest.fixture
def fleet(here: Served, anna: Identity) -> Iterator[Fleet]:
    node = Fleet(here.address, anna.context(), anna.key())
    patiently(node.connect)
    yield node
    node.close()


@pytest.fixture
def grid(here: Served) -> Iterator[SuperLinkGrid]:
    with here.supervisor.link.attach(app_bundle(code_digest())) as attached:
        yield attached


def as_coordinator(grid: SuperLinkGrid) -> None:
    """Both sides are in this process, and Flower's identity of a process is global."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, grid.flower_run, 1


def content(raw: bytes) -> RecordDict:
    return RecordDict({"f": ArrayRecord({"f": Array("uint8", (len(raw),), "x", raw)})})


def data(message: Message) -> bytes:
    array = message.content["f"]["f"]
    assert isinstance(array, Array)
    return array.data


def push(grid: SuperLinkGrid, fleet: Fleet, raw: bytes) -> str:
    as_coordinator(grid)
    (sent,) = grid.push_messages([Message(content(raw), fleet.node, "train", ttl=100.0)])
    return sent


def received(fleet: Fleet) -> Announced:
    one = fleet.receive()
    assert one is not None
    return one


def note(done: int, total: int) -> None:
    SEEN.append((done, total))


def test_a_message_comes_once_whole_and_is_answered(grid: SuperLinkGrid, fleet: Fleet) -> None:
    there, back = os.urandom(3 << 20), os.urandom((2 << 20) + 5)
    sent = push(grid, fleet, there)
    SEEN.clear()

    announced = received(fleet)
    assert announced.id == sent
    assert announced.run == grid.flower_run
    assert fleet.app(announced.run) == app_hash(code_digest())
    message = fleet.fetch(announced, 1 << 30, note)
    assert data(message) == there
    assert SEEN[-1][1] >= 4  # three pieces, and what names them
    assert fleet.receive() is None
    fleet.answer(Message(content(back), reply_to=message), 1.0, note)

    (answer,) = grid.pull_messages([sent])
    assert data(answer) == back
    assert answer.metadata.reply_to_message_id == sent
    assert answer.metadata.src_node_id == fleet.node
    assert grid.arriving() == {}


def test_an_upload_that_was_cut_goes_on_where_it_was(grid: SuperLinkGrid, fleet: Fleet) -> None:
    sent = push(grid, fleet, b"x")
    message = fleet.fetch(received(fleet), 1 << 30, note)
    reply = Message(content(os.urandom(3 << 20)), reply_to=message)

    class Cut(Exception):
        pass

    def cut(done: int, total: int) -> None:
        if done == total - 2:
            raise Cut

    with pytest.raises(Cut):
        fleet.answer(reply, 1.0, cut)
    as_coordinator(grid)
    assert grid.pull_messages([sent]) == []  # announced, and not whole
    here, total = grid.arriving()[sent]
    assert 0 < here < total
    SEEN.clear()
    fleet.answer(reply, 1.0, note)

    assert len(SEEN) == 2  # only what was missing, counted from where it was
    (answer,) = grid.pull_messages([sent])
    assert data(answer) == data(reply)


def test_a_download_that_was_cut_goes_on_where_it_was(
    grid: SuperLinkGrid, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, pieces = os.urandom(3 << 20), dict[str, bytes]()
    push(grid, fleet, raw)
    announced = received(fleet)

    class Cut(Exception):
        pass

    def cut(done: int, total: int) -> None:
        if done == total - 1:
            raise Cut

    with pytest.raises(Cut):
        fleet.fetch(announced, 1 << 30, cut, pieces)
    had = len(pieces)
    calls: list[str] = []
    real = fleet._pull

    def counted(run: int, object_id: str) -> bytes:
        calls.append(object_id)
        return real(run, object_id)

    monkeypatch.setattr(fleet, "_pull", counted)
    message = fleet.fetch(announced, 1 << 30, note, pieces)

    assert data(message) == raw
    assert had >= 3
    assert len(calls) == 1  # only what was missing
    assert pieces == {}


def test_more_bytes_than_allowed_are_not_taken(grid: SuperLinkGrid, fleet: Fleet) -> None:
    push(grid, fleet, os.urandom(2 << 20))

    with pytest.raises(Refused, match="the policy's limit"):
        fleet.fetch(received(fleet), 1 << 20, note)


def test_nobody_waits_for_the_answer_of_a_run_that_is_over(here: Served, fleet: Fleet) -> None:
    with here.supervisor.link.attach(app_bundle(code_digest())) as ending:
        push(ending, fleet, b"x")
        message = fleet.fetch(received(fleet), 1 << 30, note)

    with pytest.raises(Over):
        fleet.answer(Message(content(b"y"), reply_to=message), 1.0, note)


def test_a_process_that_comes_back_goes_on_as_the_same_node(
    here: Served, anna: Identity, fleet: Fleet
) -> None:
    again = Fleet(here.address, anna.context(), anna.key())  # nobody has said good-bye
    try:
        assert again.connect(fleet.node) == fleet.node
        again.beat()
    finally:
        again.node = 0
        again.close()


def test_a_node_that_is_not_known_is_refused(here: Served, anna: Identity) -> None:
    stray = Fleet(here.address, anna.context(), anna.key())
    try:
        with pytest.raises(Refused):
            stray.connect(12345)
    finally:
        stray.node = 0
        stray.close()


def test_a_superlink_that_is_away_is_unreachable_not_refused(here: Served, fleet: Fleet) -> None:
    process = here.supervisor.children["superlink"].process
    assert process is not None
    process.kill()
    process.wait()

    with pytest.raises(Unreachable):
        fleet.receive()
    here.supervisor.link.wait_ready(60)
    patiently(fleet.beat)
