"""Sites with a policy, one for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.client.policy.guarded_site import Ward
from tests.client.policy.joined_site import Home, make_home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "site")


@pytest.fixture
def ward(tmp_path: Path) -> Ward:
    return Ward(tmp_path)
