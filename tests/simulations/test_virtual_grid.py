"""What the virtual Grid computes together."""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import Context, Message, RecordDict

from anabranch.simulations.virtual_grid import FIRST_NODE, VirtualGrid


def test_no_client_is_in_a_batch_twice() -> None:
    """Its next round begins with what it keeps of the one before."""
    batches: list[list[int]] = []

    def execute(requests: Sequence[tuple[Message, Context]]) -> list[Message]:
        batches.append([context.node_id - FIRST_NODE for _, context in requests])
        return [Message(RecordDict(), reply_to=message) for message, _ in requests]

    grid = VirtualGrid(execute, 3)
    messages = [Message(RecordDict(), FIRST_NODE + i, "train") for i in (0, 1, 0, 2, 0)]

    replies = grid.pull_messages(grid.push_messages(messages))

    assert batches == [[0, 1], [0, 2], [0]]
    answered = [reply.metadata.reply_to_message_id for reply in replies]
    assert answered == [message.metadata.message_id for message in messages]
    assert not any(reply.has_error() for reply in replies)
