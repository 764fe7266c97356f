"""A coordinator that is being served, without page and runs, and sites that have joined it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from anabranch.client.agent.door import join_door, pinned
from anabranch.client.agent.identity import Coordinator, Identity, peer_key, write_identity
from anabranch.protocols.errors import AnabranchError
from anabranch.protocols.identity import authority
from anabranch.server.coordinator import enrolment
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.settings import split_address
from anabranch.server.coordinator.supervisor import Supervisor, _listens
from tests.ports import free_port

HOST = "127.0.0.1"
T = TypeVar("T")


class Served:
    """A running coordinator."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.federation = Federation.create(folder / "federation", "heart", [HOST], free_port())
        self.supervisor = Supervisor(self.federation)
        del self.supervisor.children["page"]

    @property
    def address(self) -> str:
        """Where sites reach it."""
        return self.federation.settings.address

    def join(self, name: str) -> Identity:
        """Join as a new site, as soon as somebody answers."""
        return patiently(self.joining(name))

    def joining(self, name: str) -> Callable[[], Identity]:
        """Invite a new site; return what attempts once to join as it."""
        invitation = enrolment.invite(self.federation, name, time.time())
        key = authority.new_key()

        def joined() -> Identity:
            root = pinned(invitation)
            request, peer = authority.certificate_request(key), peer_key(self.folder / name)
            answer = join_door(invitation, request, "0", root, peer)
            about = Coordinator(
                site=answer.site,
                federation=answer.federation,
                address=invitation.address,
                authority=invitation.authority,
                authors=answer.authors,
                app=answer.app,
                version=answer.version,
                joined=time.time(),
            )
            certificate = authority.read_certificate(answer.certificate.encode(), name)
            write_identity(self.folder / name, key, certificate, root, about)
            return Identity(self.folder / name)

        return joined


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """Serve a new coordinator until the block ends."""
    here = Served(folder)
    with serving(here):
        here.supervisor.link.wait_ready(60)
        end = time.monotonic() + 60
        while not _listens(*split_address(here.federation.settings.bind)):
            assert time.monotonic() < end
            time.sleep(0.05)
        yield here


@contextmanager
def serving(here: Served) -> Iterator[None]:
    """Serve it until the block ends, from its start on."""
    thread = threading.Thread(target=here.supervisor.serve)
    thread.start()
    try:
        yield
    finally:
        here.supervisor.stop.set()
        thread.join()


def patiently(
    work: Callable[[], T], seconds: float = 60.0, *, passing: type[Exception] = AnabranchError
) -> T:
    """Return what `work` does, once it does not raise a `passing` error."""
    end = time.monotonic() + seconds
    while True:
        try:
            return work()
        except passing:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
