"""policy.toml: what is in force, and all that makes it refuse everything."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.policy.policy_file import (
    FILE,
    Policy,
    columns_never,
    default_policy,
    parse_policy,
    policy_digest,
    read_policy,
    read_private,
)
from anabranch.protocols.errors import PolicyError
from anabranch.storage.files import write_atomic

KEY, PRINT = "1" * 64, "a" * 64
DEFAULT = default_policy({"heart": PRINT}, {"anna": KEY})


def put(folder: Path, text: str, mode: int = 0o600) -> None:
    write_atomic(folder / FILE, text.encode(), mode)


def test_the_default_policy_is_every_default_and_who_was_named() -> None:
    assert parse_policy(DEFAULT, source=FILE) == Policy(
        coordinators=(PRINT,), authors={"anna": KEY}
    )
    assert '    "' + PRINT + '",  # heart\n' in DEFAULT


def test_the_default_policy_is_strict() -> None:
    policy = parse_policy(DEFAULT, source=FILE)

    assert policy.approval.mode == "each run"
    assert (policy.privacy.required, policy.privacy.unit) == (True, "record")
    assert (policy.privacy.epsilon_max, policy.privacy.delta_max) == (8.0, 1e-5)
    assert policy.cohort.minimum == 3


def test_every_value_of_the_policy_is_in_the_default_text() -> None:
    def names(kind: type[msgspec.Struct]) -> set[str]:
        return set(kind.__struct_fields__)

    policy = parse_policy(DEFAULT, source=FILE)
    for name in names(Policy):
        value = getattr(policy, name)
        found = names(type(value)) if isinstance(value, msgspec.Struct) else {name}
        missing = {one for one in found if one not in DEFAULT and one != "rules"}
        assert not missing, name
    assert "[[approval.rules]]" in DEFAULT


def test_nobody_is_allowed_where_nobody_is_named() -> None:
    policy = parse_policy(default_policy({}, {}), source=FILE)

    assert (policy.coordinators, policy.authors) == ((), {})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    put(tmp_path, DEFAULT + "\n")

    assert read_policy(tmp_path) == parse_policy(DEFAULT, source=FILE)
    assert len(policy_digest(tmp_path)) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[privacy]", "[privacy]\nepsilonmax = 1.0"), "epsilonmax"),
        (("[cohort]", "[cohorts]"), "cohorts"),
        (("epsilon_max = 8.0", "epsilon_max = 0"), "privacy.epsilon_max"),
        (("epsilon_max = 8.0", "epsilon_max = nan"), "privacy.epsilon_max"),
        (("epsilon_max = 8.0", "epsilon_max = inf"), "privacy.epsilon_max"),
        (("max_minutes_total = 3000.0", "max_minutes_total = nan"), "max_minutes_total"),
        (("minimum = 3 ", "minimum = 0 "), "cohort.minimum"),
        (('unit = "record"', 'unit = "patient"'), "patient"),
        (('zone = "UTC"', 'zone = "Moon"'), "no time zone 'Moon'"),
        (("open = []", 'open = ["always"]'), "always"),
        (("[authors]", "[authors"), "line"),
        ((KEY, KEY[:63]), "authors"),
        ((PRINT, PRINT.replace("a", "A")), "coordinators"),
    ],
)
def test_one_wrong_value_refuses_everything(change: tuple[str, str], message: str) -> None:
    text = DEFAULT.replace(*change)
    assert text != DEFAULT

    with pytest.raises(PolicyError, match=r"policy\.toml: .*nothing is allowed") as error:
        parse_policy(text, source=FILE)
    assert message in str(error.value)


RULE = f'[approval]\nmode = "by rule"\n[[approval.rules]]\nname = "r"\nlike = "{KEY}"\n'


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (RULE.replace("by rule", "each run"), 'count only with approval.mode = "by rule"'),
        (RULE + RULE.split("\n", 2)[2], "every rule needs a name of its own"),
        (RULE + 'same = ["author", "code"]\n', '`same` must hold "author" and "contract"'),
        (RULE + "max_runs = 101\n", "max_runs"),
    ],
)
def test_rules_that_say_too_little_are_refused(rules: str, message: str) -> None:
    text = f"coordinators = []\n[authors]\n{rules}"

    with pytest.raises(PolicyError, match=r"nothing is allowed") as error:
        parse_policy(text, source=FILE)
    assert message in str(error.value)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_policy_or_a_policy_error(data: bytes) -> None:
    with contextlib.suppress(PolicyError):
        assert isinstance(parse_policy(data, source=FILE), Policy)


def test_a_missing_policy_refuses_everything(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"^policy.toml: No such file or directory; until it"):
        read_policy(tmp_path)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_policy_that_others_may_write_refuses_everything(tmp_path: Path, mode: int) -> None:
    put(tmp_path, DEFAULT)
    (tmp_path / FILE).chmod(mode)

    with pytest.raises(PolicyError, match=r"policy.toml: other users may write to it \(mode 6"):
        read_policy(tmp_path)


def test_a_folder_that_others_may_write_refuses_everything(tmp_path: Path) -> None:
    put(tmp_path, DEFAULT)
    tmp_path.chmod(0o777)

    with pytest.raises(PolicyError, match=r"the folder of policy.toml: other users may write"):
        read_policy(tmp_path)


def test_a_policy_of_another_user_refuses_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, DEFAULT)
    owner = max(os.geteuid(), 1)
    if os.geteuid() == 0:  # a file of root's is trusted
        os.chown(tmp_path / FILE, owner, -1)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)

    with pytest.raises(PolicyError, match=r"policy.toml: belongs to another user"):
        read_policy(tmp_path)


def test_what_is_no_plain_file_refuses_everything(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE, 0o600)
    with pytest.raises(PolicyError, match=r"policy.toml: not what it should be"):
        read_policy(tmp_path)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(PolicyError, match=r"policy.toml: .*nothing is allowed"):
        read_policy(tmp_path)


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "#" * 100)

    with pytest.raises(PolicyError, match=r"policy.toml: larger than 99 bytes"):
        read_private(tmp_path / FILE, 99)


def test_columns_that_nobody_may_read_are_none_without_a_policy(tmp_path: Path) -> None:
    assert columns_never(tmp_path) == frozenset()

    put(tmp_path, DEFAULT.replace("columns_never = []", 'columns_never = ["name", "born"]'))
    assert columns_never(tmp_path) == {"name", "born"}

    put(tmp_path, "broken")
    with pytest.raises(PolicyError):
        columns_never(tmp_path)


def test_the_largest_message_follows_from_the_bytes_of_a_round() -> None:
    limits = parse_policy(DEFAULT, source=FILE).limits

    assert limits.message_bytes == 256_000_000 + (8 << 20)
