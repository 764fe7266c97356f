"""Settings by dotted path."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import ConfigError
from anabranch.simulations.experiments.settings import changed, decode, encode, file_of, flatten

NAMES = st.text("abcxyz_", min_size=1, max_size=4)
LEAVES = st.integers(-5, 5) | st.lists(st.integers(), max_size=3) | st.text("pq", max_size=3)
TREES = st.recursive(
    st.dictionaries(NAMES, LEAVES, min_size=1, max_size=3),
    lambda inner: st.dictionaries(NAMES, inner | LEAVES, min_size=1, max_size=3),
    max_leaves=8,
)


@given(TREES)
def test_flatten_and_put_back_is_the_same_tree(tree: dict[str, Any]) -> None:
    assert changed({}, flatten(tree)) == tree


@given(TREES)
def test_toml_reads_back_what_was_written(tree: dict[str, Any]) -> None:
    assert decode(encode(tree), "tree.toml") == tree


@given(TREES, LEAVES)
def test_a_change_is_there_and_nothing_else_moves(tree: dict[str, Any], value: Any) -> None:
    before = encode(tree)
    path = next(iter(flatten(tree)))

    after = changed(tree, {path: value})

    assert flatten(after) == {**flatten(tree), path: value}
    assert encode(tree) == before  # a copy was changed


def test_a_setting_is_found_by_its_first_part() -> None:
    assert file_of("training.learning_rate") == "run"
    assert file_of("privacy") == "run"
    assert file_of("population.alpha") == "experiment"
    assert file_of("engine") == "experiment"


@pytest.mark.parametrize("path", ["trainings.learning_rate", "sites.north", "run", "test", "name"])
def test_what_is_no_setting_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"is no setting of run\.toml or experiment\.toml"):
        file_of(path)


def test_the_seed_is_no_setting() -> None:
    with pytest.raises(ConfigError, match="seeds are listed in `seeds`"):
        file_of("seed")


def test_a_path_through_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a\.b\.c: a\.b is 3, expected a table"):
        changed({"a": {"b": 3}}, {"a.b.c": 1})
