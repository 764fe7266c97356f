"""run.toml is read, or refused by file and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.client.files import read_run
from anabranch.protocols.errors import ConfigError


def test_a_run_file_with_an_unknown_field_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("nam = 1\n")

    with pytest.raises(ConfigError, match=r"run\.toml: Object contains unknown field `nam`"):
        read_run(path)
