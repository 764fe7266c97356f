"""Partitions: every record where it should be, by the law it should be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from anabranch.protocols.errors import ConfigError, DataError
from anabranch.simulations.population import partitions
from anabranch.simulations.population.clients import Partition
from anabranch.simulations.population.dealing import held_sizes, skewed_sizes
from anabranch.simulations.population.partitions import Sharing, SizeLaw

SEEDS = st.integers(0, 2**31)
HOLDOUTS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9])


def labels_of(n: int, num_labels: int, seed: int) -> NDArray[np.int64]:
    shares = np.random.default_rng(seed).dirichlet(np.full(num_labels, 2.0))
    return np.random.default_rng(seed + 1).choice(num_labels, n, p=shares).astype(np.int64)


def made(kind: str, labels: NDArray[np.int64], sharing: Sharing) -> Partition:
    match kind:
        case "iid":
            return partitions.iid(len(labels), sharing)
        case "dirichlet":
            return partitions.by_label(labels, 0.7, sharing)
        case "feature":
            return partitions.by_feature(np.sin(np.arange(len(labels))), 4, 0.5, sharing)
        case "shards":
            return partitions.by_shards(labels, 2, sharing)
        case _:
            values = [f"v{i % sharing.clients}" for i in range(len(labels))]
            return partitions.by_value(values, sharing)[0]


def whole(partition: Partition, client: int) -> list[int]:
    return [*partition.train(client).tolist(), *partition.held_out(client).tolist()]


KINDS = ["iid", "dirichlet", "feature", "shards", "natural"]


@pytest.mark.parametrize("kind", KINDS)
@given(clients=st.integers(1, 20), each=st.integers(2, 20), holdout=HOLDOUTS, seed=SEEDS)
def test_every_record_has_exactly_one_client(
    kind: str, clients: int, each: int, holdout: float, seed: int
) -> None:
    labels = labels_of(clients * each + clients // 2 + 2, 5, seed)
    sharing = Sharing(clients=clients, seed=seed, holdout=holdout)
    partition = made(kind, labels, sharing)

    assert sorted(partition.rows.tolist()) == list(range(len(labels)))
    assert len(partition) == clients
    assert (partition.sizes >= 1).all()
    assert partition.rows.dtype == partition.start.dtype == partition.held.dtype == np.int64
    if kind != "shards":
        sizes = np.diff(partition.start)
        assert partition.held.tolist() == held_sizes(sizes, holdout).tolist()


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "feature", "shards"])
@given(clients=st.integers(1, 40), each=st.integers(2, 20), holdout=HOLDOUTS, seed=SEEDS)
def test_shared_records_are_never_twice_with_one_client_nor_held_out_and_trained_on(
    kind: str, clients: int, each: int, holdout: float, seed: int
) -> None:
    labels = labels_of(90, 4, seed)
    sharing = Sharing(
        clients=clients, seed=seed, holdout=holdout, records_per_client=each, reuse=True
    )
    try:
        partition = made(kind, labels, sharing)
    except DataError:
        assert holdout == 0.9  # so few are left to train on that no client could have its records
        return

    size = each if kind != "shards" else each // 2 * 2
    assert np.diff(partition.start).tolist() == [size] * clients
    for client in range(clients):
        assert len(set(whole(partition, client))) == size
    trained = {int(row) for i in range(clients) for row in partition.train(i)}
    held = {int(row) for i in range(clients) for row in partition.held_out(i)}
    assert not trained & held


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
def test_the_seed_alone_decides(kind: str, seed: int) -> None:
    labels = labels_of(120, 5, 7)
    sharing = Sharing(clients=12, seed=seed, holdout=0.2)
    once, again = made(kind, labels, sharing), made(kind, labels, sharing)
    other = made(kind, labels, Sharing(clients=12, seed=seed + 1, holdout=0.2))

    assert once.rows.tolist() == again.rows.tolist()
    assert once.held.tolist() == again.held.tolist()
    assert once.rows.tolist() != other.rows.tolist()


@given(
    law=st.sampled_from(["equal", "lognormal", "dirichlet"]),
    clients=st.integers(1, 30),
    least=st.integers(1, 4),
    spread=st.floats(0.1, 3.0),
    seed=SEEDS,
)
def test_sizes_add_up_and_nobody_is_below_the_least(
    law: SizeLaw, clients: int, least: int, spread: float, seed: int
) -> None:
    total = clients * 7
    sharing = Sharing(clients=clients, seed=seed, min_records=least, sizes=law, spread=spread)
    sizes = np.diff(partitions.iid(total, sharing).start)

    assert sizes.sum() == total
    assert sizes.min() >= least
    if law == "equal":
        assert sizes.tolist() == [7] * clients


@given(
    weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30),
    least=st.integers(0, 3),
    spare=st.integers(0, 500),
)
def test_skewed_sizes_are_within_one_of_their_exact_shares(
    weights: list[float], least: int, spare: int
) -> None:
    w = np.array(weights)
    sizes = skewed_sizes(w, least * len(w) + spare, least)

    assert sizes.sum() == least * len(w) + spare
    assert np.abs(sizes - least - spare * w / w.sum()).max() < 1 + 1e-6


def test_lognormal_sizes_have_the_spread_that_was_asked_for() -> None:
    sharing = Sharing(clients=4000, seed=1, sizes="lognormal", spread=0.8)
    sizes = np.diff(partitions.iid(4000 * 500, sharing).start)

    assert np.log(sizes).std() == pytest.approx(0.8, rel=0.05)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 10.0])
def test_label_shares_have_the_mean_and_variance_of_the_dirichlet_law(alpha: float) -> None:
    """Of share s of label k: E s = p_k, Var s = p_k (1 − p_k) ((1/(α+1)) (1 − 1/m) + 1/m)."""
    p = np.array([0.5, 0.3, 0.2])
    labels = np.repeat(np.arange(3), (p * 3000).astype(int))
    clients, m = 4000, 40
    sharing = Sharing(clients=clients, seed=3, records_per_client=m, reuse=True)
    partition = partitions.by_label(labels, alpha, sharing)
    shares = np.stack([(labels[partition.rows].reshape(clients, m) == k).mean(1) for k in range(3)])

    variance = p * (1 - p) * ((1 - 1 / m) / (alpha + 1) + 1 / m)
    # Four standard errors of the mean, and 10 % for the variance.
    assert np.abs(shares.mean(axis=1) - p).max() < 4 * np.sqrt(variance / clients).max()
    np.testing.assert_allclose(shares.var(axis=1), variance, rtol=0.1)


def test_without_reuse_a_large_alpha_gives_everybody_the_labels_of_the_whole() -> None:
    labels = np.repeat(np.arange(4), [400, 300, 200, 100])
    partition = partitions.by_label(labels, 1e6, Sharing(clients=10, seed=0))
    shares = [np.bincount(labels[partition.train(i)], minlength=4) / 100 for i in range(10)]

    np.testing.assert_allclose(np.mean(shares, axis=0), [0.4, 0.3, 0.2, 0.1])
    assert np.abs(np.array(shares) - [0.4, 0.3, 0.2, 0.1]).max() < 0.2


def test_a_small_alpha_gives_a_client_one_label_as_long_as_there_is_any() -> None:
    labels = np.repeat(np.arange(5), 200)
    sharing = Sharing(clients=50, seed=0, records_per_client=20, reuse=True)
    partition = partitions.by_label(labels, 1e-3, sharing)

    kinds = [len(set(labels[partition.train(i)].tolist())) for i in range(50)]
    assert np.mean(np.array(kinds) == 1) > 0.9


def test_two_shards_a_client_are_at_most_four_labels_and_mostly_two() -> None:
    """McMahan et al.: 200 shards of 300 for 100 clients: most have two labels only."""
    labels = np.repeat(np.arange(10), 6000)
    partition = partitions.by_shards(labels, 2, Sharing(clients=100, seed=0))
    kinds = [len(set(labels[partition.train(i)].tolist())) for i in range(100)]

    assert np.diff(partition.start).tolist() == [600] * 100
    assert max(kinds) <= 2  # 300 divides 6,000: no shard has two labels


def test_what_a_shard_holds_out_is_the_same_for_all_who_have_it() -> None:
    labels = np.repeat(np.arange(4), 25)
    sharing = Sharing(clients=30, seed=0, holdout=0.2, records_per_client=20, reuse=True)
    partition = partitions.by_shards(labels, 2, sharing)

    assert partition.held.tolist() == [4] * 30
    assert len({int(r) for i in range(30) for r in partition.held_out(i)}) == 20


def test_the_held_out_part_has_the_labels_of_the_whole() -> None:
    labels = np.repeat(np.arange(2), [80, 20])
    partition = partitions.by_label(labels, 1.0, Sharing(clients=1, seed=0, holdout=0.25))

    assert np.bincount(labels[partition.held_out(0)]).tolist() == [20, 5]


def test_feature_skew_keeps_clients_to_stretches_of_the_feature() -> None:
    values = np.random.default_rng(0).standard_normal(1000)
    sharing = Sharing(clients=40, seed=1, records_per_client=25, reuse=True)
    narrow = partitions.by_feature(values, 10, 0.01, sharing)
    wide = partitions.by_feature(values, 10, 1e5, sharing)

    def spread(partition: Partition) -> float:
        return float(np.mean([values[partition.train(i)].std() for i in range(40)]))

    assert spread(narrow) < 0.5 * spread(wide)


def test_principal_scores_are_places_along_the_widest_direction() -> None:
    rng = np.random.default_rng(0)
    along = rng.standard_normal(300) * 5
    direction = np.array([3.0, -4.0, 0.0]) / 5
    noise = 0.1 * rng.standard_normal((300, 3))
    inputs = (along[:, None] * direction + noise).astype(np.float32).reshape(300, 1, 3)
    scores = partitions.principal_scores(inputs)

    assert abs(np.corrcoef(scores, along)[0, 1]) > 0.999
    assert np.corrcoef(scores, inputs[:, 0, 1])[0, 1] > 0  # the largest component is positive


def test_equal_inputs_have_equal_scores() -> None:
    assert partitions.principal_scores(np.ones((5, 2), np.float32)).tolist() == [0.0] * 5


def test_natural_clients_are_the_values_of_the_column() -> None:
    values = ["b", "a", "b", "c", "a", "b"]
    partition, names = partitions.by_value(values, Sharing(clients=0, seed=0))

    assert names == ("a", "b", "c")
    assert [sorted(whole(partition, i)) for i in range(3)] == [[1, 4], [0, 2, 5], [3]]


def test_small_natural_clients_are_dropped_if_asked_for() -> None:
    values = ["b", "a", "b", "c", "a", "b"]
    sharing = Sharing(clients=0, seed=0, min_records=2)
    partition, names = partitions.by_value(values, sharing, small="drop")

    assert names == ("a", "b")
    assert len(partition.rows) == 5
    with pytest.raises(DataError, match=r'1 of 3 clients .* min_records = 2.*small = "drop"'):
        partitions.by_value(values, sharing)


def test_some_natural_clients_can_be_drawn() -> None:
    values = [f"v{i % 9}" for i in range(90)]
    partition, names = partitions.by_value(values, Sharing(clients=4, seed=0))

    assert len(names) == len(partition) == 4
    assert len(partition.rows) == 40
    with pytest.raises(DataError, match="10 wanted, the column makes 9"):
        partitions.by_value(values, Sharing(clients=10, seed=0))


@pytest.mark.parametrize(
    ("sharing", "message"),
    [
        (Sharing(clients=11, seed=0), "10 records for 11 clients make less than min_records = 1"),
        (Sharing(clients=3, seed=0, min_records=4), "less than min_records = 4 each"),
        (Sharing(clients=3, seed=0, records_per_client=4), "want 12, there are 10.*reuse = true"),
        (
            Sharing(clients=2, seed=0, records_per_client=11, reuse=True),
            "the largest client would have 11 of 10",
        ),
    ],
)
def test_too_few_records_are_refused(sharing: Sharing, message: str) -> None:
    with pytest.raises(DataError, match=message):
        partitions.iid(10, sharing)


def test_other_refusals_name_the_fix() -> None:
    labels = np.zeros(10, np.int64)
    with pytest.raises(ConfigError, match="reuse = true needs records_per_client"):
        partitions.iid(10, Sharing(clients=2, seed=0, reuse=True))
    with pytest.raises(DataError, match="10 records make no 22 shards of at least 1"):
        partitions.by_shards(labels, 2, Sharing(clients=11, seed=0))
    with pytest.raises(DataError, match="8 shards of 2 wanted, 10 records make 5"):
        partitions.by_shards(labels, 2, Sharing(clients=4, seed=0, records_per_client=4))
    with pytest.raises(ConfigError, match="bins: expected 1 to 10, got 11"):
        partitions.by_feature(np.arange(10.0), 11, 1.0, Sharing(clients=2, seed=0))
    with pytest.raises(DataError, match="feature of row 3 is not a finite number"):
        partitions.by_feature(np.array([0, 1, np.nan]), 2, 1.0, Sharing(clients=2, seed=0))
    with pytest.raises(DataError, match="cell of row 2 is empty"):
        partitions.by_value(["a", None], Sharing(clients=0, seed=0))
    with pytest.raises(ConfigError, match="takes the records as they are"):
        partitions.by_value(["a"], Sharing(clients=0, seed=0, reuse=True, records_per_client=1))


def test_ten_thousand_clients_share_a_small_data_set() -> None:
    labels = np.arange(1797) % 10
    sharing = Sharing(clients=10_000, seed=0, records_per_client=50, reuse=True, holdout=0.2)
    partition = partitions.by_label(labels, 0.5, sharing)

    assert partition.sizes.tolist() == [40] * 10_000
    assert len(np.unique(partition.rows)) == 1797
