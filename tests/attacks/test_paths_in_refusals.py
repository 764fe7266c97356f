"""Attack: a disk that fails makes a site say where on its machine its files lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.client.answers import Answers
from anabranch.client.sums.given import InFile
from anabranch.client.sums.kept import InAnswers
from anabranch.protocols.errors import RunError


def test_a_book_of_opened_rounds_that_cannot_be_read_names_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "secure" / "opened" / "toy-1"
    path.mkdir(parents=True)  # what a read of it says has the whole path in it

    with pytest.raises(RunError, match="secure/opened/toy-1 in the site's folder") as said:
        InFile(path).read()

    assert str(tmp_path) not in str(said.value)


def test_a_note_of_what_is_kept_that_cannot_be_read_names_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "secure" / "kept" / "toy-1"
    path.mkdir(parents=True)

    with pytest.raises(RunError, match="secure/kept/toy-1 in the site's folder") as said:
        InAnswers(path, Answers(tmp_path)).read()

    assert str(tmp_path) not in str(said.value)
