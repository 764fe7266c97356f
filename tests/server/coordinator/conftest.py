"""A run's process that is called in this one, for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.coordinator.carried_out import Coordinator


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path)
