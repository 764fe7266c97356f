"""A message as a site fetches it, object by object, with the objects damaged on the way."""

from __future__ import annotations

import copy
import random
from typing import Any

from flwr.app import Context, Message, RecordDict

from anabranch.client import fleet, flower
from anabranch.client.fleet import Announced, Fleet
from anabranch.protocols import wire
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PolicyError
from anabranch.protocols.identity.proposal import Signed
from tests.fuzz import mutate
from tests.fuzz.contents import ASSIGNMENT
from tests.protocols.rig import ADAPTER

FLEET: Any = fleet  # with what it has from Flower
KINDS = (b"query", b"evaluate", b"train.x", b"query.describe", b"system", b"", b"x.y.z", b"\xff")


class Objects:
    """The calls of a SuperLink that `Fleet.fetch` makes."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self._contents = contents

    def PullObject(self, request: Any) -> Any:
        content = self._contents.get(request.object_id)
        return _Pulled(content or b"", content is not None)

    def ConfirmMessageReceived(self, request: Any) -> None:
        return None


class _Pulled:
    def __init__(self, content: bytes, found: bool) -> None:
        self.object_content, self.object_found, self.object_available = content, found, found


class Strict:
    """A site whose owner allows nothing."""

    name, max_rank = "north", None

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        raise PolicyError("not approved")

    def sizes(self, config: RunConfig) -> Any:
        raise PolicyError("not approved")

    def train(self, assignment: Any, adapter: Any) -> Any:
        raise PolicyError("not approved")

    def evaluate(self, assignment: Any, adapter: Any) -> Any:
        raise PolicyError("not approved")


def _sent() -> tuple[Any, Any, dict[str, bytes]]:
    """Return a valid message, bare, its tree and its objects."""
    content = flower.pack_assignment(ASSIGNMENT, wire.encode(ADAPTER))
    task = FLEET.TaskIdentity
    task.task_id, task.run_id, task.node_id = 1, 1, 1
    message = Message(content, dst_node_id=1, message_type="train")
    message.metadata.__dict__["_message_id"] = message.object_id
    objects = FLEET.get_all_nested_objects(message)
    tree = FLEET.get_object_tree(message)
    bare = FLEET.message_to_proto(FLEET._without_content(message))
    return bare, tree, {name: one.deflate() for name, one in objects.items()}


BARE, TREE, OBJECTS = _sent()
APP = flower.client_app(lambda context: Strict())


def fetched(data: bytes) -> Message:
    """Fetch a message that the bytes have damaged (none: not at all), and answer it."""
    rng = random.Random(data)
    contents = dict(OBJECTS)
    for _ in range(rng.choice((1, 1, 2)) if data else 0):
        name = rng.choice(list(contents))
        how = rng.randrange(6)
        if how == 0:
            contents[name] = contents[rng.choice(list(contents))]
        elif how == 1:
            contents[name] = rng.randbytes(rng.randint(0, 60))
        elif how == 2:
            contents[name] = contents[name].replace(b"train", rng.choice(KINDS))
        else:
            contents[name] = mutate.blind(contents[name], rng)
    one = Fleet.__new__(Fleet)
    one._client, one.node = Objects(contents), 1  # type: ignore[assignment]
    message = one.fetch(Announced(BARE, copy.deepcopy(TREE)), 1 << 24, lambda done, total: None)
    return APP(message, Context(1, 1, {}, RecordDict(), {}))
