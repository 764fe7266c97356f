"""A real bundle, a gateway that is as bad as the test asks, and a device's folder and records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.edge.gateway.authority import Authority
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.trust import add_trusted
from anabranch.protocols.config import RunConfig
from anabranch.protocols.wire import encode
from tests.edge.agents import write_data
from tests.edge.bundles import TRUSTED, write_bundle
from tests.edge.gateways import FakeGateway, new_authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return new_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory,
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("bundles") / "one"
    classifier = make_classifier("tabular")
    write_bundle(
        path, classifier, make_config("tabular"), precisions=("fp32",), with_artifacts=False
    )
    return path, read_adapter(classifier)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    add_trusted(home.trusted, TRUSTED[0])
    return home


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data.npz")


@pytest.fixture
def fake(authority: Authority, bundle: tuple[Path, Any]) -> FakeGateway:
    fake = FakeGateway(authority)
    for path in bundle[0].iterdir():
        fake.put(path.read_bytes())
    fake.put(encode(bundle[1]))
    return fake
