"""The graph: its shape against exact tails, its neighbourhoods against the laws they keep."""

import hashlib
import re
from collections.abc import Iterable
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.secagg.graph import (
    COMPLETE_UP_TO,
    Neighbours,
    Shape,
    groups_of,
    neighbours,
    quorum,
    shape_of,
)

seeds = st.binary(min_size=32, max_size=32)
name_sets = st.sets(st.text(max_size=6), min_size=1, max_size=40).map(sorted)


def names_of(n: int) -> list[str]:
    return [f"site-{i:04d}" for i in range(n)]


def seed_of(i: int) -> bytes:
    return hashlib.sha256(i.to_bytes(4)).digest()


def at_least(m: int, population: int, marked: int, drawn: int) -> Fraction:
    """Return P[Hyp ≥ m], summed in fractions: the definition."""
    ways = sum(
        comb(marked, i) * comb(population - marked, drawn - i) for i in range(max(m, 0), drawn + 1)
    )
    return Fraction(ways, comb(population, drawn))


def sound(n: int, c: int, k: int, t: int) -> bool:
    """Do degree k and threshold t satisfy both of the inequalities in the module's docstring?"""
    both = n * at_least(2 * t - (k + 1), n - 1, c, k)
    lost = n * at_least(k - t + 1, n - 1, n // 10, k)
    return both <= Fraction(1, 2**100) and lost <= Fraction(1, 2**20)


def parted(graph: Neighbours, alive: set[str], start: str) -> set[str]:
    """Return those of `alive` that are joined to `start` when only they are left."""
    left, front = set(alive), {start}
    while front:
        left -= front
        front = {v for u in front for v in graph[u] if v in left}
    return alive - left


def reached(graph: Neighbours, alive: Iterable[str]) -> bool:
    """Is the graph connected when only `alive` are left?"""
    names = set(alive)
    return parted(graph, names, next(iter(names))) == names


def shuffled(names: list[str], i: int) -> list[str]:
    """Return the names in the i-th of many orders."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{i} {name}".encode()).digest())


# The shape


@given(n=st.integers(2, COMPLETE_UP_TO), percent=st.integers(50, 100), colluding=st.integers(0, 60))
def test_a_complete_shape_keeps_the_two_secrets_apart_or_is_refused(
    n: int, percent: int, colluding: int
) -> None:
    t, c = min(percent * n // 100 + 1, n), colluding * n // 100
    if 2 * t > n + c:
        assert shape_of(n, percent / 100, colluding / 100) == Shape(n, n, t, complete=True)
    else:
        with pytest.raises(ConfigError, match=f"{n} members, {c} of whom .* a threshold of {t} "):
            shape_of(n, percent / 100, colluding / 100)


@pytest.mark.parametrize("n", [129, 130, 200, 333, 1000])
@pytest.mark.parametrize("percent", [0, 10, 20])
def test_a_sparse_shape_satisfies_both_tails_in_exact_fractions(n: int, percent: int) -> None:
    shape = shape_of(n, 2 / 3, percent / 100)
    k, t, c = shape.holders - 1, shape.threshold, percent * n // 100

    assert (shape.complete, k % 2) == (False, 0)
    assert sound(n, c, k, t)
    assert not sound(n, c, k, t - 1)


@pytest.mark.parametrize(("n", "percent"), [(129, 10), (200, 10), (300, 20)])
def test_no_smaller_even_degree_has_a_sound_threshold(n: int, percent: int) -> None:
    holders = shape_of(n, 2 / 3, percent / 100).holders
    c = percent * n // 100

    assert not any(
        sound(n, c, k, t) for k in range(2, holders - 1, 2) for t in range(k // 2, k + 1)
    )


def test_the_degree_grows_as_the_logarithm_of_the_cohort() -> None:
    shapes = [shape_of(n, 2 / 3, 0.1) for n in (200, 1000, 5000, 20_000, 100_000)]

    assert [(s.holders, s.threshold) for s in shapes] == [
        (57, 39), (133, 97), (167, 122), (181, 132), (193, 140),
    ]  # fmt: skip


def test_the_share_meant_by_a_decimal_number_counts_not_its_binary_neighbour() -> None:
    assert shape_of(100, 0.67, 0.29).threshold == 68  # 0.29 · 100 is 28.999999999999996
    assert shape_of(3, 2 / 3, 0).threshold == 3
    assert [quorum(n, 2 / 3) for n in (2, 3, 4, 6, 1000)] == [2, 3, 3, 5, 667]
    assert quorum(10, 1.0) == 10


# Neighbourhoods


@settings(max_examples=25)
@given(n=st.integers(129, 320), seed=seeds)
def test_a_sparse_graph_is_symmetric_regular_and_without_loops(n: int, seed: bytes) -> None:
    names = names_of(n)
    shape = shape_of(n, 2 / 3, 0.1)
    graph = neighbours(names, seed, shape)

    assert list(graph) == names
    for u, around in graph.items():
        assert len(set(around)) == len(around) == shape.holders - 1
        assert list(around) == sorted(around)
        assert u not in around
        assert all(u in graph[v] for v in around)


@given(names=name_sets.filter(lambda names: len(names) > 1), seed=seeds)
def test_in_a_complete_graph_everybody_else_is_a_neighbour(names: list[str], seed: bytes) -> None:
    graph = neighbours(names, seed, shape_of(len(names), 0.9, 0))

    assert graph == {u: tuple(v for v in names if v != u) for u in names}


def test_the_graph_follows_from_names_and_seed_alone_and_a_new_seed_changes_it() -> None:
    names, shape = names_of(200), shape_of(200, 2 / 3, 0.1)
    graphs = [neighbours(names, seed_of(i), shape) for i in range(20)]

    assert neighbours(tuple(names), seed_of(0), shape) == graphs[0]
    assert len({graph["site-0000"] for graph in graphs}) == 20


def test_changing_a_graph_does_not_change_the_next_caller_s() -> None:
    names, shape = names_of(200), shape_of(200, 2 / 3, 0.1)
    del neighbours(names, seed_of(0), shape)["site-0000"]

    assert list(neighbours(names, seed_of(0), shape)) == names


@pytest.mark.parametrize("n", [200, 1000])
def test_graphs_are_connected_and_stay_so_without_a_random_third(n: int) -> None:
    names, shape = names_of(n), shape_of(n, 2 / 3, 0.1)
    for i in range(4):
        graph = neighbours(names, seed_of(i), shape)
        assert reached(graph, names)
        assert reached(graph, shuffled(names, i)[n // 3 :])


def test_without_edges_between_two_halves_a_graph_counts_as_not_connected() -> None:
    halves: Neighbours = {"a": ("b",), "b": ("a",), "c": ("d",), "d": ("c",)}

    assert not reached(halves, halves)


@pytest.mark.parametrize("n", [200, 1000])
def test_dropping_whom_it_likes_a_coordinator_cannot_part_a_few_from_the_others(n: int) -> None:
    """Drop the honest around a victim, first its neighbours, then theirs, as far as t holders
    of the victim stay: it is still joined to k + 2 − t honest survivors, itself included."""
    names, shape = names_of(n), shape_of(n, 2 / 3, 0.1)
    k, t = shape.holders - 1, shape.threshold
    for i in range(6):
        graph = neighbours(names, seed_of(i), shape)
        victim, *others = shuffled(names, i)
        colluding = set(others[: n // 10])
        assert len(colluding & set(graph[victim])) <= 2 * t - k - 2
        around = [v for v in graph[victim] if v not in colluding]
        beyond = [v for v in others if v not in colluding and v not in graph[victim]]
        dropped = set(around[: k + 1 - t]) | set(beyond[: n // 3 - (k + 1 - t)])
        honest = set(names) - colluding - dropped
        assert len(parted(graph, honest, victim)) >= k + 2 - t


def test_who_is_whose_neighbour_is_as_good_as_uniform() -> None:
    """Over 400 seeds each pair is adjacent about as often: within 6.5 standard deviations."""
    names, shape = names_of(129), shape_of(129, 2 / 3, 0.1)
    counts = dict.fromkeys(names, 0)
    for i in range(400):
        for v in neighbours(names, seed_of(i), shape)["site-0000"]:
            counts[v] += 1
    rate = (shape.holders - 1) / 128
    spread = (400 * rate * (1 - rate)) ** 0.5

    assert counts.pop("site-0000") == 0
    assert all(abs(count - 400 * rate) < 6.5 * spread for count in counts.values())


# Groups


@given(names=name_sets, seed=seeds, size=st.integers(1, 50))
def test_groups_part_the_names_evenly(names: list[str], seed: bytes, size: int) -> None:
    groups = groups_of(names, seed, size)
    sizes = [len(group) for group in groups]

    assert sorted(name for group in groups for name in group) == names
    assert len(groups) == max(len(names) // size, 1)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(size, len(names))
    assert all(list(group) == sorted(group) for group in groups)


def test_groups_follow_from_the_seed_and_a_new_seed_changes_them() -> None:
    names = names_of(30)

    assert groups_of(names, seed_of(0), 5) == groups_of(tuple(names), seed_of(0), 5)
    assert len({tuple(groups_of(names, seed_of(i), 5)) for i in range(20)}) == 20


# Refusals


@pytest.mark.parametrize("members", [0, 1])
def test_fewer_than_two_members_are_refused(members: int) -> None:
    with pytest.raises(ConfigError, match=f"2 members or more, got {members}"):
        shape_of(members, 2 / 3, 0.1)


@pytest.mark.parametrize(
    ("share", "colluding"), [(0, 0.1), (1.1, 0.1), (0.7, -0.1), (0.7, 1), (float("nan"), 0)]
)
def test_shares_beyond_their_range_are_refused(share: float, colluding: float) -> None:
    message = f"secure_aggregation.threshold <= 1 and .* got {share} and {colluding}"
    with pytest.raises(ConfigError, match=message):
        shape_of(10, share, colluding)


def test_half_of_the_members_is_no_threshold_and_the_message_says_what_to_change() -> None:
    message = re.escape(
        "with 20 members, 2 of whom may collude, a threshold of 11 does not keep a member's two "
        "secrets apart: it must be above 11; raise secure_aggregation.threshold or lower "
        "secure_aggregation.colluding"
    )
    with pytest.raises(ConfigError, match=message):
        shape_of(20, 0.5, 0.1)


def test_a_cohort_of_colluders_gets_no_sparse_graph() -> None:
    with pytest.raises(ConfigError, match=r"no graph on 500 members .* when 400 may collude"):
        shape_of(500, 2 / 3, 0.8)


@pytest.mark.parametrize("names", [[], ["b", "a"], ["a", "a"]])
def test_names_that_are_not_ascending_are_refused(names: list[str]) -> None:
    for call in (
        lambda: neighbours(names, bytes(32), Shape(len(names), len(names), 1, complete=True)),
        lambda: groups_of(names, bytes(32), 2),
    ):
        with pytest.raises(ValueError, match="expected names in ascending order"):
            call()


def test_another_number_of_names_seed_size_or_group_size_is_refused() -> None:
    shape = shape_of(3, 2 / 3, 0)
    with pytest.raises(ValueError, match="expected 3 names, got 2"):
        neighbours(["a", "b"], bytes(32), shape)
    with pytest.raises(ValueError, match="a seed of 32 bytes, got 31"):
        neighbours(["a", "b", "c"], bytes(31), shape)
    with pytest.raises(ValueError, match="a group size of at least 1, got 0"):
        groups_of(["a", "b"], bytes(32), 0)
