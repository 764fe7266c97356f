"""The digest of the installed software, and the thin Flower app that names it."""

from __future__ import annotations

import hashlib
import io
import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.config_utils import get_fab_metadata
from hypothesis import given
from hypothesis import strategies as st

import anabranch.protocols
from anabranch.client.policy.code import (
    app_bundle,
    app_hash,
    code_digest,
    digest_of,
    sources,
    version,
)

FILES = st.lists(st.tuples(st.text(max_size=4), st.binary(max_size=4)), max_size=4)


@given(one=st.tuples(st.text(max_size=4), FILES), other=st.tuples(st.text(max_size=4), FILES))
def test_two_inputs_have_one_digest_only_if_they_are_equal(
    one: tuple[str, list[tuple[str, bytes]]], other: tuple[str, list[tuple[str, bytes]]]
) -> None:
    assert (digest_of(*one) == digest_of(*other)) == (one == other)


def test_bytes_cannot_move_from_one_part_to_the_next() -> None:
    assert digest_of("1", [("a", b"bc")]) != digest_of("1", [("ab", b"c")])
    assert digest_of("1", [("a", b""), ("b", b"")]) != digest_of("1", [("a", b"b")])


def test_where_and_when_it_was_installed_does_not_matter(tmp_path: Path) -> None:
    here = Path(str(anabranch.protocols.__file__)).parent
    there = tmp_path / "elsewhere"
    shutil.copytree(here, there, copy_function=shutil.copyfile)  # new times
    (there / "__pycache__").mkdir(exist_ok=True)
    (there / "__pycache__" / "stale.py").write_text("no source")
    (there / "notes.txt~").write_text("an editor's")

    found = sources({"anabranch.protocols": there})
    assert found == sources({"anabranch.protocols": here})
    assert "anabranch.protocols/identity/proposal.py" in dict(found)
    assert "anabranch.protocols/edge.proto" in dict(found)

    (there / "spec.py").write_text("# changed")
    assert sources({"anabranch.protocols": there}) != found


def test_the_digest_covers_all_that_touches_records_and_the_version() -> None:
    assert code_digest() == code_digest()
    assert len(code_digest()) == 64
    files = sources({"anabranch.client": Path(__file__).parents[3] / "client"})
    assert {"anabranch.client/site.py", "anabranch.client/policy/guard.py"} <= set(dict(files))
    assert digest_of("1", files) != digest_of("2", files)


def test_the_bundle_is_the_same_bytes_for_the_same_software() -> None:
    code = "ab" * 32

    assert app_bundle(code, "0.1.0") == app_bundle(code, "0.1.0")
    assert app_hash(code, "0.1.0") == hashlib.sha256(app_bundle(code, "0.1.0")).hexdigest()
    assert app_hash(code, "0.1.0") == (
        "c666c06615ccc25ea0856644f61e447eae219e902f5e3a4067644830beff0592"
    )
    assert app_hash(code, "0.1.0") != app_hash("ac" * 32, "0.1.0")
    assert app_hash(code, "0.1.0") != app_hash(code, "0.1.1")
    assert app_hash(code) == app_hash(code, version())


def test_the_bundle_holds_no_code() -> None:
    with zipfile.ZipFile(io.BytesIO(app_bundle("ab" * 32))) as bundle:
        assert bundle.namelist() == ["README.md", "pyproject.toml"]
        project = tomllib.loads(bundle.read("pyproject.toml").decode())
        assert "ab" * 32 in bundle.read("README.md").decode()
    assert project["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "anabranch.server.app:app",
        "clientapp": "anabranch.client.app:app",
    }
    assert "fab-format-version" not in project["tool"]["flwr"]["app"]


def test_flower_takes_the_bundle() -> None:
    assert get_fab_metadata(app_bundle(code_digest(), "0.1.0")) == ("anabranch/anabranch", "0.1.0")


@pytest.mark.parametrize("number", ["0.1.0", "1!2.3.4rc1+local"])
def test_any_version_can_be_written(number: str) -> None:
    assert get_fab_metadata(app_bundle("ab" * 32, number))[1] == number
