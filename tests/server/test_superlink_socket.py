"""The contract with Flower's SuperLink: what our one module of private calls relies on."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from flwr.superlink.main import _get_middleware

from anabranch.client.policy.code import app_bundle, app_hash, code_digest
from anabranch.protocols.identity import authority
from anabranch.server.superlink import CONCERNS, SuperLink, SuperLinkGone, environment
from anabranch.server.unix_http import client


class Link:
    """A SuperLink process that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o700)
        self.link = SuperLink(folder / "s")
        self.command = [
            sys.executable, "-m", "anabranch.server.coordinator.superlink_server",
            str(folder / "s"), str(folder / "state.db"),
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self.link.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()
        )
        self.link.wait_ready(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    link = Link(tmp_path_factory.mktemp("superlink"))
    yield link
    link.kill()


def pem() -> bytes:
    return (
        authority.new_key()
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def test_a_key_has_one_node_until_it_is_removed(running: Link) -> None:
    key = pem()
    node = running.link.register(key)

    assert running.link.register(key) == node
    assert running.link.nodes()[node] == key
    running.link.unregister(node)
    running.link.unregister(node)
    assert node not in running.link.nodes()


def test_flower_takes_our_bundle_and_names_it_by_its_hash(running: Link) -> None:
    with running.link.attach(app_bundle(code_digest())) as grid:
        assert grid.run.fab_hash == app_hash(code_digest())
        assert grid.run.run_id == grid.flower_run
        assert list(grid.get_node_ids()) == []


def test_a_run_whose_process_is_gone_is_ended_before_the_next_begins(running: Link) -> None:
    left = running.link.attach(app_bundle(code_digest()))
    stale = left.__enter__().flower_run  # and its process dies

    with running.link.attach(app_bundle(code_digest()), stale=stale) as grid:
        assert grid.flower_run != stale
    left.__exit__(None, None, None)


def test_two_processes_take_each_its_own_task(running: Link) -> None:
    with (
        running.link.attach(app_bundle(code_digest())) as one,
        running.link.attach(app_bundle(code_digest())) as other,
    ):
        assert one.flower_run != other.flower_run
        assert list(one.get_node_ids()) == list(other.get_node_ids()) == []


def test_flowers_middlewares_look_at_the_paths_that_are_led_through_them() -> None:
    found = {one.cls.__name__ for one in _get_middleware()}  # type: ignore[attr-defined]

    assert found - set(CONCERNS) == {"BaseHTTPMiddleware", "ProtobufTranslationMiddleware"}
    assert set(CONCERNS) <= found


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/fleet/pull-messages", 401),  # not signed by a node
        ("/v1/runtime/pull-messages", 401),  # no token of a task
        ("/v1/control/list-nodes", 200),  # nobody but the coordinator reaches the socket
    ],
)
def test_every_path_goes_through_its_own_middlewares(running: Link, path: str, status: int) -> None:
    headers = {"content-type": "application/protobuf"}

    with client(running.link.socket, "http://superlink", 60.0) as http:
        assert http.post(path, content=b"", headers=headers).status_code == status


def test_an_answer_to_nothing_is_flowers_error_3(running: Link) -> None:
    with running.link.attach(app_bundle(code_digest())) as grid:
        (answer,) = grid.pull_messages(["f" * 64])

    assert answer.has_error()
    assert answer.error.code == 3
    assert answer.metadata.reply_to_message_id == "f" * 64


def test_nodes_outlive_a_kill_and_a_run_is_told_that_the_superlink_went(running: Link) -> None:
    node = running.link.register(pem())
    with running.link.attach(app_bundle(code_digest())) as grid:
        running.kill()
        with pytest.raises(SuperLinkGone, match="cannot be reached"):
            grid.get_node_ids()
        running.start()
        assert list(grid.get_node_ids()) == []  # the same run goes on
    assert node in running.link.nodes()


def test_no_superlink_is_said_within_the_time_given(tmp_path: Path) -> None:
    link = SuperLink(tmp_path / "nobody")
    started = time.monotonic()

    assert not link.ready()
    with pytest.raises(SuperLinkGone, match="does not answer within"):
        link.wait_ready(0.2)
    assert time.monotonic() - started < 30


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    link = Link(tmp_path)
    assert link.process.stdin is not None

    link.process.stdin.close()

    assert link.process.wait(30) == 1
