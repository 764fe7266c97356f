"""One supervisor holds a folder, and whoever looks does not hinder it."""

from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.protocols.errors import RunError
from anabranch.server.coordinator.serving import holding, served


def test_a_folder_is_served_while_it_is_held(tmp_path: Path) -> None:
    assert not served(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with holding(tmp_path):
        assert served(tmp_path)
    assert not served(tmp_path)
    with holding(tmp_path):
        pass


def test_a_second_supervisor_is_refused(tmp_path: Path) -> None:
    with (
        holding(tmp_path),
        pytest.raises(RunError, match="is serving this federation already"),
        holding(tmp_path),
    ):
        pass
