"""The gateway against the device's own code: enrol, check in, fetch, send, hear it was counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anabranch.edge.gateway.operator import devices, invite, status
from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import enrol, sync
from anabranch.edge.runtime.download import fetch_frame
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.spool import Spool
from anabranch.edge.runtime.transport import connect
from anabranch.edge.runtime.trust import read_trusted
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import DeviceError
from benchmarks.edge.gateway_load import delta_of
from tests.gateway_cases import ended, open_round

Serving = Callable[..., Any]


def test_a_device_takes_part(serving: Serving, adapter: Adapter, tmp_path: Path) -> None:
    gateway = serving(cohort=1, min_cohort=1)
    home = Home(tmp_path / "device")
    (text,) = invite(gateway.folder.folder, label="board 7")
    enrolled = enrol.enrol(home, enrol.Invitation.parse(text))
    assert enrolled.address == f"localhost:{gateway.port}"
    assert [key.hex() for key in read_trusted(home.trusted)] == list(gateway.file.bundle_keys)
    said = edge_pb2.Capabilities(runtime="test", engines=["joint"], examples=10)
    with connect(home) as channel:
        window = sync.check_in(channel, said)
        assert not isinstance(window, edge_pb2.Task)
        assert (window.min_s, window.max_s) == (60, 180)
        row = open_round(gateway.opener, adapter)
        task = sync.check_in(channel, said)
        assert isinstance(task, edge_pb2.Task)
        assert wire.decode_adapter(fetch_frame(channel, task.adapter, home)).spec == adapter.spec
        frame = wire.encode(delta_of(adapter.spec, 0))
        entry = Spool(home.spool).put(
            task.id, frame, examples=10, steps=3, deadline_unix=task.deadline_unix
        )
        verdict = sync.send(channel, Spool(home.spool), entry)
        assert verdict.accepted, verdict.reason
        assert sync.send(channel, Spool(home.spool), entry).accepted
    assert ended(gateway.parts.store, row)["clients"] == 1
    (known,) = devices(gateway.folder.folder)
    assert (known["id"], known["label"], known["examples"]) == (enrolled.device, "board 7", 10)
    assert status(gateway.folder.folder)["rounds"][0]["counted"] == 1


def test_a_token_is_good_for_one_device(serving: Serving, tmp_path: Path) -> None:
    gateway = serving()
    (text,) = invite(gateway.folder.folder)
    enrol.enrol(Home(tmp_path / "one"), enrol.Invitation.parse(text))
    with pytest.raises(DeviceError, match="used already"):
        enrol.enrol(Home(tmp_path / "two"), enrol.Invitation.parse(text))


def test_a_token_of_another_gateway_does_not_leave_the_device(
    serving: Serving, tmp_path: Path
) -> None:
    one, two = serving(), serving()
    (text,) = invite(one.folder.folder)
    _, rest = text.split("/", 1)
    elsewhere = enrol.Invitation.parse(f"localhost:{two.enroll_port}/{rest}")
    with pytest.raises(DeviceError, match="this may not be the gateway"):
        enrol.enrol(Home(tmp_path / "device"), elsewhere)
