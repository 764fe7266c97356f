from collections.abc import Iterable, Sequence
from typing import Any, cast

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from anabranch.client.contents import pack as _pack
from anabranch.client.flower import DESCRIBE, Described
from anabranch.server.flower import Failure, Letter
from anabranch.server.mailbox import Mailbox
from anabranch.server.roster import Roster
from anabranch.simulations.grid import identify, number


class Nodes:
    """A Grid of which only the nodes matter; it counts what is sent to them."""

    def __init__(self, ids: Sequence[int]) -> None:
        identify(Run.create_empty(run_id=1))
        self.ids: Sequence[int] = ids
        self.asked: list[int] = []

    def get_node_ids(self) -> Sequence[int]:
        return self.ids

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = list(messages)
        self.asked += [message.metadata.dst_node_id for message in pushed]
        return [number(message) for message in pushed]

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return []


def roster_of(grid: Nodes) -> tuple[Roster, Mailbox]:
    mailbox = Mailbox(cast(Grid, grid), deadline_s=10.0)
    return Roster(mailbox, RecordDict()), mailbox


def answer(name: str) -> RecordDict:
    return _pack(Described(site=name, num_examples=5, held_out=0))


def test_nodes_are_the_same_object_until_somebody_comes_or_leaves() -> None:
    ids = [3, 4, 5]
    _, mailbox = roster_of(grid := Nodes(ids))
    before = mailbox.nodes()
    assert mailbox.nodes() is before
    ids.append(6)  # the grid's own list, changed in place
    assert mailbox.nodes() == {3, 4, 5, 6}
    grid.ids = range(3, 6)
    assert mailbox.nodes() == {3, 4, 5}


def test_whoever_comes_later_is_asked_and_whoever_leaves_is_not_available() -> None:
    roster, mailbox = roster_of(grid := Nodes([1, 2]))
    roster.invite()
    assert not roster.settled()
    for node, name in ((1, "a"), (2, "b")):
        roster.hear(node, answer(name))
    assert roster.settled()
    mailbox._waiting.clear()  # as if both answers had been received
    assert list(roster.available()) == ["a", "b"]
    grid.ids = [1, 3]
    assert list(roster.available()) == ["a"]
    roster.invite()
    assert grid.asked == [1, 2, 3]
    assert not roster.settled()
    roster.give_up()
    assert roster.settled()
    assert roster.problems() == ["node 3: does not say who it is"]
    roster.hear(3, answer("c"))  # late, and welcome
    grid.ids = [1, 2, 3]
    mailbox._waiting.clear()
    assert list(roster.available()) == ["a", "b", "c"]
    roster.give_up()
    assert roster.problems() == []


def test_a_refusal_is_asked_again_and_others_are_not() -> None:
    roster, _ = roster_of(grid := Nodes([1, 2]))
    roster.invite()
    roster.hear(1, answer("a"))
    roster.hear(2, Failure("data", "no records"))
    assert roster.settled()
    roster.invite()
    assert grid.asked == [1, 2]
    roster.retry()
    roster.invite()
    assert grid.asked == [1, 2, 2]
    assert not roster.settled()


@pytest.mark.parametrize("letters", [1, 2])
def test_who_has_a_letter_open_is_not_available(letters: Any) -> None:
    roster, mailbox = roster_of(Nodes([1, 2]))
    roster.hear(1, answer("a"))
    roster.hear(2, answer("b"))
    mailbox.send([(Letter(DESCRIBE, i, 1, "a"), RecordDict()) for i in range(letters)])
    for _ in range(letters):
        assert list(roster.available()) == ["b"]
        mailbox._close(next(iter(mailbox._sent.values())))  # as if it had been answered
    assert list(roster.available()) == ["a", "b"]
