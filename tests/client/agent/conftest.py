"""Doors that are opened in a thread, and closed at the end of a test."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from anabranch.protocols.identity import authority
from anabranch.protocols.identity.authority import Authority
from tests.client.agent.doors import Coordinator, Handler, Server, server_context
from tests.runs import table_text, write_table

Doors = Callable[..., Coordinator]


@pytest.fixture(scope="session")
def root() -> Authority:
    return authority.new_authority("heart", ["127.0.0.1", "localhost"], datetime.now(UTC))


@pytest.fixture
def doors(tmp_path: Path, root: Authority) -> Iterator[Doors]:
    """Return what opens a door; all are closed at the end."""
    opened: list[tuple[Server, threading.Thread]] = []

    def open_door(tls: ssl.SSLContext | None = None, **about: Any) -> Coordinator:
        coordinator = Coordinator(**({"root": root} | about))
        server = Server(("127.0.0.1", 0), Handler)
        server.tls = tls or server_context(tmp_path / f"door{len(opened)}", coordinator.root)
        server.coordinator, coordinator.port = coordinator, server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        opened.append((server, thread))
        return coordinator

    yield open_door
    for server, thread in opened:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def door(doors: Doors) -> Coordinator:
    """Return the coordinator behind an open door, with a data contract."""
    return doors(contract=table_text())


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Return records that keep the contract."""
    return write_table(tmp_path / "records.csv")


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Return a port at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
