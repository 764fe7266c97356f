"""The socket of the public port, before anything is said over it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from anabranch.server.coordinator.gate import Gate

HOST = "127.0.0.1"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as held:
        yield held


def opened(stack: ExitStack, connections: int, per_address: int) -> Gate:
    gate = Gate(HOST, 0, connections=connections, per_address=per_address)
    stack.enter_context(gate)
    gate.listen(100)
    gate.settimeout(10)
    return gate


def come(stack: ExitStack, gate: Gate, source: str = HOST) -> socket.socket:
    return stack.enter_context(
        socket.create_connection(gate.getsockname(), 10, source_address=(source, 0))
    )


def is_cut_off(connection: socket.socket) -> bool:
    connection.settimeout(10)
    return connection.recv(1) == b""


def test_the_oldest_stranger_makes_room_for_the_next(stack: ExitStack) -> None:
    gate = opened(stack, connections=6, per_address=100)
    comers = []
    for _ in range(5):
        comers.append(come(stack, gate))
        stack.enter_context(gate.accept()[0])

    assert gate.strangers == 3
    assert all(is_cut_off(one) for one in comers[:2])
    for one in comers[2:]:
        one.setblocking(False)
        with pytest.raises(BlockingIOError):
            one.recv(1)


def test_whoever_has_shown_a_certificate_makes_room_for_nobody(stack: ExitStack) -> None:
    gate = opened(stack, connections=2, per_address=100)
    site = come(stack, gate)
    accepted, peer = gate.accept()
    stack.enter_context(accepted)
    gate.knows(peer)
    for _ in range(5):
        come(stack, gate)
        stack.enter_context(gate.accept()[0])

    assert gate.strangers == 1
    accepted.sendall(b"x")
    assert site.recv(1) == b"x"


def test_an_address_holds_no_more_than_its_share(stack: ExitStack) -> None:
    gate = opened(stack, connections=100, per_address=2)
    for _ in range(2):
        come(stack, gate)
    kept = [stack.enter_context(gate.accept()[0]) for _ in range(2)]
    third = come(stack, gate)
    come(stack, gate, "127.0.0.2")

    accepted, peer = gate.accept()
    stack.enter_context(accepted)

    assert peer[0] == "127.0.0.2"
    assert is_cut_off(third)
    kept[0].close()
    assert gate.strangers == 2
    come(stack, gate)
    assert stack.enter_context(gate.accept()[0])


def test_a_name_that_is_no_address_of_ours_is_refused() -> None:
    with pytest.raises(OSError, match="assign"):
        Gate("192.0.2.1", 0, connections=10, per_address=1)
