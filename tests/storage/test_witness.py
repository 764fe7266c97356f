"""Where the second witness of a ledger lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.protocols.errors import PrivacyError
from anabranch.storage import witness


def test_the_state_folder_follows_the_xdg_specification(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert witness.state_folder() == tmp_path / "anabranch" / "ledgers"

    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_STATE_HOME", ignored)
        assert witness.state_folder() == tmp_path / ".local/state/anabranch/ledgers"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)

    with pytest.raises(PrivacyError, match=r"set XDG_STATE_HOME to a folder that stays\Z"):
        witness.state_folder()
    with pytest.raises(PrivacyError, match=r"a folder that stays, or do without\Z"):
        witness.state_folder(", or do without")
