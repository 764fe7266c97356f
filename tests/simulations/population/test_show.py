"""The picture of a population: every number it shows is one of the population's."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.data.records import Records
from anabranch.simulations.population import partitions, show
from anabranch.simulations.population.devices_table import DevicesTable
from anabranch.simulations.population.measures import (
    histogram,
    label_counts,
    online_hours,
    shares_of,
)
from anabranch.simulations.population.partitions import Sharing
from anabranch.simulations.population.table import Built, equip

LABELS = ["calm", "urgent", "<b>odd</b>"]


def population(clients: int = 40, *, devices: bool = True, labels: int = 3) -> Built:
    values = np.random.default_rng(0).integers(0, labels, 900)
    records = Records(np.zeros((900, 2), np.float32), values.astype(np.int64))
    sharing = Sharing(clients=clients, seed=0, holdout=0.2, sizes="lognormal", min_records=3)
    built = Built(records=records, partition=partitions.by_label(values, 0.5, sharing))
    if not devices:
        return built
    made, availability, ranks = equip(DevicesTable(preset="phones"), clients, folder=Path(), seed=0)
    return Built(
        records=records,
        partition=built.partition,
        devices=made,
        availability=availability,
        max_ranks=ranks,
    )


def test_label_counts_are_those_of_each_client() -> None:
    built = population()
    counts = label_counts(built, 3)

    for client in range(40):
        own = slice(built.partition.start[client], built.partition.start[client + 1])
        labels = built.records.labels[built.partition.rows[own]]
        assert counts[client].tolist() == np.bincount(labels, minlength=3).tolist()
    assert counts.sum() == 900


def test_shares_online_are_weighted_means_of_the_classes() -> None:
    built = population(clients=200)
    assert built.devices is not None
    online = online_hours(built)
    shares = shares_of(online, built.devices.kind, 3)
    sizes = np.bincount(built.devices.kind, minlength=3)

    np.testing.assert_allclose(sizes @ shares / 200, online.mean(axis=1))


@given(
    values=st.lists(st.floats(1e-4, 1e7), min_size=1, max_size=60),
    bins=st.integers(4, 20),
    seed=st.integers(0, 100),
)
def test_every_value_lies_in_one_bin(values: list[float], bins: int, seed: int) -> None:
    kind = np.random.default_rng(seed).integers(0, 3, len(values))
    found = histogram(np.array(values), kind, ["a", "b", "c"], bins=bins)

    assert [sum(row) for row in found.counts] == np.bincount(kind, minlength=3).tolist()
    assert list(found.edges) == sorted(set(found.edges))
    assert found.edges[0] <= min(values) * (1 + 1e-6)
    assert max(values) <= found.edges[-1] * (1 + 1e-6)


def test_bins_by_hand() -> None:
    found = histogram(np.array([1.0, 1.4, 2.0, 9.0]), np.array([0, 0, 1, 0]), ["a", "b"])

    assert found.edges == (1, 1.5, 2, 3, 5, 7, 10)
    assert found.counts == ((2, 0, 0, 0, 0, 1), (0, 0, 1, 0, 0, 0))


def test_the_page_is_well_formed_safe_and_complete() -> None:
    page = show.page(population(), LABELS, title="wards & <b>phones</b>", says="Forty clients.")

    assert "<script" not in page
    assert "<b>odd</b>" not in page
    assert "&lt;b&gt;odd&lt;/b&gt;" in page
    for name in ("Records", "Devices", "Availability", "Regions"):
        assert f">{name}</h2>" in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 8
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert "nan" not in page.lower()


def test_without_devices_only_records_are_shown() -> None:
    built = population(devices=False)
    page = show.page(built, LABELS, title="t")

    assert page.count("<svg") == 2
    assert "Availability" not in page
    assert "no [devices]: all clients are equal" in show.describe(built, LABELS)


@pytest.mark.parametrize("clients", [1, 2, 33])
def test_the_heat_map_shows_a_sample_with_their_true_counts(clients: int) -> None:
    built = population(clients=clients)
    page = show.page(built, LABELS, title="t")
    counts = label_counts(built, 3)

    for client in (0, clients - 1):  # the first and the last are always in an even sample
        row = f"client-{client:06d}</th>" + "".join(
            f'<td class="n">{count}</td>' for count in counts[client]
        )
        assert row in page


def test_many_labels_are_added_up_as_others() -> None:
    labels = [f"label {i}" for i in range(60)]
    page = show.page(population(labels=60), labels, title="t")

    assert "37 others" in page


def test_the_terminal_table_has_every_class_and_region() -> None:
    said = show.describe(population(clients=200), LABELS)

    for word in ("entry", "mid", "high", "records per client", "different records", "900 of 900"):
        assert word in said
    assert max(map(len, said.splitlines())) <= 100


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    show.write_page(tmp_path / "population.html", population(), LABELS, title="t", says="s")

    assert [path.name for path in tmp_path.iterdir()] == ["population.html"]
    assert (tmp_path / "population.html").read_text("utf-8").startswith("<!doctype html>")
