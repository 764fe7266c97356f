"""From messages to replies: a round's requests to train are answered together.

What the client app of a site does with one message (client/flower.py), done for many: every
site prepares its round, the engine trains them all, every site finishes. All other messages, and
sites that cannot prepare a round, go through the client app one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from anabranch.client.flower import (
    SiteFor,
    SiteLike,
    answer,
    client_app,
    pack_trained,
    unpack_assignment,
)
from anabranch.client.local import Learned
from anabranch.client.memory import give_back
from anabranch.client.site import Begun
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.messages import Assignment, Trained
from anabranch.simulations.cohort.engine import CohortEngine

log = logging.getLogger(__name__)

TOGETHER = 128  # clients whose records are in memory at once

Answer = Callable[[Message, Context], Message]


@runtime_checkable
class Preparing(SiteLike, Protocol):
    """A site whose round can be trained by somebody else."""

    def prepare(self, assignment: Assignment, adapter: Adapter) -> Begun:
        """Return the round, ready to be trained."""

    def finish(self, begun: Begun, learned: Learned) -> tuple[Trained, Delta | bytes]:
        """Return the report and what is sent."""


class CohortExecutor:
    """Answers messages to the sites that `site_for` finds for a Flower context."""

    def __init__(self, site_for: SiteFor, engine: CohortEngine | None = None) -> None:
        self.engine = engine or CohortEngine()
        self._site_for = site_for
        self._app: ClientApp = client_app(site_for)

    def __call__(self, requests: Sequence[tuple[Message, Context]]) -> list[Message]:
        """Return one reply per request, in order."""
        replies: dict[int, Message] = {}
        training = [
            i for i, (m, _) in enumerate(requests) if m.metadata.message_type == MessageType.TRAIN
        ]
        for at in range(0, len(training), TOGETHER):
            chunk = training[at : at + TOGETHER]
            replies |= zip(chunk, self._train([requests[i] for i in chunk]), strict=True)
        for i, (message, context) in enumerate(requests):
            if i not in replies:
                replies[i] = self._app(message, context)
        return [replies[i] for i in range(len(requests))]

    def _train(self, requests: Sequence[tuple[Message, Context]]) -> list[Message]:
        rounds = [_Round(self._site_for, message, context) for message, context in requests]
        ready = [one for one in rounds if one.begun is not None]
        learned = self.engine.train([one.begun.local for one in ready if one.begun is not None])
        for one, outcome in zip(ready, learned, strict=True):
            one.outcome = outcome
        replies = [one.reply(self._app) for one in rounds]
        give_back()
        return replies


class _Round:
    """One site's round between its request and its reply."""

    def __init__(self, site_for: SiteFor, message: Message, context: Context) -> None:
        self.message, self.context = message, context
        self.begun: Begun | None = None
        self.outcome: Learned | Exception | None = None
        self.site: SiteLike | None = None
        try:
            self.site = site_for(context)
            if isinstance(self.site, Preparing):
                self.begun = self.site.prepare(*unpack_assignment(message.content))
        except Exception as error:  # noqa: BLE001 - the boundary of a client: its error is its reply
            self.outcome = error

    def reply(self, app: ClientApp) -> Message:
        if self.outcome is None:  # a site that only trains by itself
            return app(self.message, self.context)

        def work(site: SiteLike, content: RecordDict) -> RecordDict:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            assert isinstance(site, Preparing)
            assert self.begun is not None
            assert isinstance(self.outcome, Learned)
            return pack_trained(*site.finish(self.begun, self.outcome))

        return answer(self.message, self.context, self._found, work, "training")

    def _found(self, context: Context) -> SiteLike:
        if self.site is None:
            assert isinstance(self.outcome, Exception)
            raise self.outcome
        return self.site
