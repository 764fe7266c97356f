"""From messages to replies: a round's requests to train are answered together.

What the client app of a site does with one message (client/flower.py), done for many: every
site prepares its round, the engine trains them all, every site finishes. All other messages, and
sites that cannot prepare a round, go through the client app one by one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol, TypeGuard

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from anabranch.client.flower import (
    SiteFor,
    SiteLike,
    answer,
    client_app,
    hand_over,
    pack_trained,
    unpack_assignment,
)
from anabranch.client.local import Learned, Local, nothing_learned, train_alone
from anabranch.client.memory import give_back
from anabranch.client.refusals import failures
from anabranch.client.site import Begun
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.messages import Assignment, Trained
from anabranch.simulations.cohort.engine import CohortEngine

log = logging.getLogger(__name__)

TOGETHER = 128  # clients whose records are in memory at once
TIDY_S = 1.0


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
        self._tidied = time.monotonic()
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
        self._tidy()
        for i, (message, context) in enumerate(requests):
            if i not in replies:
                replies[i] = self._app(message, context)
        return [replies[i] for i in range(len(requests))]

    def _tidy(self) -> None:
        """Give memory back now and then: it takes about a millisecond."""
        if time.monotonic() - self._tidied > TIDY_S:
            give_back()
            self._tidied = time.monotonic()

    def _train(self, requests: Sequence[tuple[Message, Context]]) -> list[Message]:
        unpack = _Unpacked()
        rounds = [_Round(self._site_for, unpack, *request) for request in requests]
        ready = [one for one in rounds if one.begun is not None]
        learned = self._learned([one.begun.local for one in ready if one.begun is not None])
        for one, outcome in zip(ready, learned, strict=True):
            one.outcome = outcome
        return [one.reply(self._app) for one in rounds]

    def _learned(self, locals: Sequence[Local]) -> Sequence[Learned | Exception]:
        """Return what came of every client; one that fails in an unforeseen way fails alone."""
        try:
            return self.engine.train(locals)
        except Exception as error:  # the boundary of clients: see _Round
            log.exception("a cohort of %d failed: its clients are trained alone", len(locals))
            return [_after(error, local) if local.private else _alone(local) for local in locals]


def _after(error: Exception, local: Local) -> Learned | Exception:
    """Return what a private client comes to in a cohort that failed, as if trained alone."""
    return nothing_learned(local, error) if isinstance(error, failures(local.tells)) else error


def _alone(local: Local) -> Learned | Exception:
    """Train one client; not for private rounds, whose noise may have been drawn already."""
    try:
        return train_alone(local)
    except Exception as error:  # noqa: BLE001 - the boundary of a client: its error is its reply
        return error


def prepares(site: SiteLike) -> TypeGuard[Preparing]:
    """Whether somebody else can train this site's rounds."""
    return hasattr(site, "prepare") and hasattr(site, "finish")


class _Unpacked:
    """The assignments of one call: clients of one part share one message, unpacked once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[RecordDict, tuple[Assignment, Adapter]]] = {}

    def __call__(self, message: Message) -> tuple[Assignment, Adapter]:
        content = message.content
        held = self._known.get(id(content))
        if held is None:
            held = self._known[id(content)] = content, unpack_assignment(content)
        return held[1]


class _Round:
    """One site's round between its request and its reply."""

    def __init__(
        self, site_for: SiteFor, unpack: _Unpacked, message: Message, context: Context
    ) -> None:
        self.message, self.context = message, context
        self.begun: Begun | None = None
        self.outcome: Learned | Exception | None = None
        self.site: SiteLike | None = None
        try:
            self.site = site_for(context)
            if prepares(self.site):
                self.begun = self.site.prepare(*unpack(message))
        except Exception as error:  # noqa: BLE001 - the boundary of a client: its error is its reply
            self.outcome = error

    def reply(self, app: ClientApp) -> Message:
        if self.outcome is None:  # a site that only trains by itself
            return app(self.message, self.context)

        def work(site: SiteLike, content: RecordDict) -> RecordDict:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            assert prepares(site)
            assert self.begun is not None
            assert isinstance(self.outcome, Learned)
            report, sent = site.finish(self.begun, self.outcome)
            if isinstance(sent, Delta):
                return hand_over(report, sent)
            return pack_trained(report, sent)

        return answer(self.message, self.context, self._found, work, "training")

    def _found(self, context: Context) -> SiteLike:
        if self.site is None:
            assert isinstance(self.outcome, Exception)
            raise self.outcome
        return self.site
