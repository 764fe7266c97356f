"""What was given to a sum is known after a power cut, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.client.sums import given
from anabranch.client.sums.given import InFile
from anabranch.storage import files


def test_every_folder_above_what_is_given_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is there if all folders above it are: the first round makes two of them."""
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    monkeypatch.setattr(given, "sync_folder", synced.append)

    InFile(tmp_path / "secure" / "given" / "toy-1").write({1: "ab" * 32})

    assert set(synced) >= {tmp_path / "secure" / "given", tmp_path / "secure", tmp_path}
