"""What a site's Fleet calls may hold: what Flower's SuperLink itself does not ask.

The SuperLink checks that a call's node is that of its key, and looks no further. A site that lies
could so send messages as if it were the SuperLink, upload without end, and fetch or remove
whatever object it can guess the name of: a name is a SHA-256, and some answers are a count. Here

    push-messages              one answer of this node, to a message that was sent to it; as many
                               objects as the largest message has
    push-object                one piece of it, in an upload that was begun
    pull-object,               of a message that the SuperLink gave this node before; for
    confirm-message-received   anything else the answer is that there is none

What was given to whom is in memory. A door that was started anew cannot tell for GRACE_S: so long
objects are given to whoever names them, so that sites go on with what they were fetching.

Checked against flwr 1.41 and 1.42, as server/superlink.py is.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from google.protobuf.message import DecodeError, Message

from anabranch.protocols.errors import MalformedMessage, ProtocolError

PATH = "/v1/fleet/"
CALLS = frozenset(
    {
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages",
        "push-messages", "get-run", "pull-object", "push-object", "confirm-message-received",
    }
)  # fmt: skip
PIECE = (1 << 20) + (64 << 10)  # bytes of a call: one piece of an array, and what is around it
BESIDE = 64  # objects of a message that are no pieces of its frame
GRACE_S = 60.0
KEPT = 4  # messages that are remembered for a site; it works on one at a time
NOTHING = b""  # a response of protobuf whose values are all their defaults: found, available: no

M = TypeVar("M", bound=Message)


@dataclass(eq=False)
class FleetCalls:
    """Judges the calls of all sites; `largest`: bytes of a message. The clock is monotonic."""

    largest: int
    clock: Callable[[], float] = time.monotonic
    _given: dict[str, OrderedDict[str, frozenset[str]]] = field(default_factory=dict)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    @property
    def objects(self) -> int:
        """Return how many objects one answer may have."""
        return (self.largest >> 20) + BESIDE

    def judge(self, site: str, path: str, body: bytes) -> bytes | None:
        """Return None if a call may go on to the SuperLink, or the answer in its place.

        Raises MalformedMessage for a body that is none, ProtocolError for what no site does.
        """
        check = {
            "push-messages": self._push_messages,
            "push-object": self._push_object,
            "pull-object": self._pull_object,
            "confirm-message-received": self._confirm,
        }.get(path.removeprefix(PATH))
        return None if check is None else check(site, body)

    def answered(self, site: str, path: str, answer: bytes) -> None:
        """Take note of what the SuperLink gave a site."""
        if path != f"{PATH}pull-messages":
            return
        given = self._given.setdefault(site, OrderedDict())
        for tree in _read(PullMessagesResponse, answer).message_object_trees:
            given[tree.object_id] = frozenset(one.object_id for one in iterate_object_tree(tree))
        while len(given) > KEPT:
            given.popitem(last=False)

    def _push_messages(self, site: str, body: bytes) -> None:
        asked = _read(PushMessagesRequest, body)
        if len(asked.messages_list) != 1 or len(asked.message_object_trees) != 1:
            raise ProtocolError("one answer at a time, with its objects")
        about, tree = asked.messages_list[0].metadata, asked.message_object_trees[0]
        if (about.src_node_id, about.dst_node_id) != (asked.node.node_id, SUPERLINK_NODE_ID):
            raise ProtocolError("an answer goes from the node that asks, to the coordinator")
        if not about.reply_to_message_id:
            raise ProtocolError("a site sends answers and no messages of its own")
        if tree.object_id != about.message_id:
            raise ProtocolError("these are the objects of another message")
        if (count := sum(1 for _ in iterate_object_tree(tree))) > self.objects:
            raise ProtocolError(
                f"an answer of {count} objects; limits.max_message_mb allows {self.objects}"
            )
        spent = list(asked.clientapp_runtime_list)
        if len(spent) > 1 or not all(math.isfinite(one) and 0 <= one < 1e9 for one in spent):
            raise ProtocolError(f"{len(spent)} times that an answer took, expected one in seconds")

    def _push_object(self, site: str, body: bytes) -> None:
        if not _read(PushObjectRequest, body).session_id:
            raise ProtocolError("an object of no upload")

    def _pull_object(self, site: str, body: bytes) -> bytes | None:
        name = _read(PullObjectRequest, body).object_id
        given = self._given.get(site, OrderedDict())
        return None if any(name in names for names in given.values()) else self._unknown()

    def _confirm(self, site: str, body: bytes) -> bytes | None:
        name = _read(ConfirmMessageReceivedRequest, body).message_object_id
        known = self._given.get(site, OrderedDict()).pop(name, None) is not None
        return None if known else self._unknown()

    def _unknown(self) -> bytes | None:
        """Return the answer to a call for what was not given since the door was started."""
        return None if self.clock() < self._started + GRACE_S else NOTHING


def _read(kind: Callable[[], M], body: bytes) -> M:
    message = kind()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise MalformedMessage(f"expected {type(message).__name__}") from None
    return message
