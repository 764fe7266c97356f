"""A gateway in this process, a signed bundle that holds an adapter, and devices without models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from anabranch.edge.gateway.server import Gateway, start
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.spec import AdapterSpec
from benchmarks.edge import gateway_load as load
from benchmarks.edge.gateway_devices import Device, enrol_many
from tests.edge.phones import Phone, new_phones, new_secure_gateway

SPEC = load.spec_of(800)


@pytest.fixture
def spec() -> AdapterSpec:
    return SPEC


@pytest.fixture
def adapter(spec: AdapterSpec) -> Adapter:
    return load.adapter_of(spec)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Return a function from settings of gateway.toml to a running gateway."""
    running: list[Gateway] = []

    def make(**settings: Any) -> Gateway:
        spec = settings.pop("spec", SPEC)
        folder = load.new_gateway(tmp_path / f"gateway-{len(running)}", spec, **settings)
        running.append(start(folder.folder))
        return running[-1]

    yield make
    for one in running:
        one.close(grace_s=0.1)


@pytest.fixture
def fleet(serving: Callable[..., Gateway]) -> Iterator[Callable[..., Any]]:
    """Return a function to (gateway, devices that have called once)."""
    made: list[Device] = []

    def make(count: int, **settings: Any) -> tuple[Gateway, list[Device]]:
        gateway = serving(**settings)
        devices = enrol_many(gateway.folder, gateway, count)
        made.extend(devices)
        for device in devices:
            device.check_in()
        return gateway, devices

    yield make
    for device in made:
        device.hang_up()


@pytest.fixture
def phones(tmp_path: Path) -> Iterator[Callable[..., tuple[Gateway, list[Phone]]]]:
    """Return a function to (gateway with secure sums, devices that have called once)."""
    running: list[Any] = []

    def make(count: int, **settings: Any) -> tuple[Gateway, list[Phone]]:
        gateway = new_secure_gateway(tmp_path / "gateway", count, **settings)
        running.append(gateway)
        devices = new_phones(gateway, tmp_path, count)
        running.extend(phone.gateway for phone in devices)
        return gateway, devices

    yield make
    for one in reversed(running):
        one.close(grace_s=0.1) if isinstance(one, Gateway) else one.close()
