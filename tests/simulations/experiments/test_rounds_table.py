"""rounds.csv, and when an accuracy was reached."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import DataError
from anabranch.simulations.experiments.rounds import (
    Round,
    first_at,
    read_rounds,
    source_of,
    time_to_accuracy,
    write_rounds,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(0, 2**60)
METRICS = st.sampled_from(["validation.accuracy", "validation.loss", "clients.accuracy"])
ROUNDS = st.builds(
    Round,
    round=COUNTS,
    seconds=FINITE,
    bytes_up=st.none() | COUNTS,
    bytes_down=st.none() | COUNTS,
    asked=COUNTS,
    trained=COUNTS,
    failed=COUNTS,
    metrics=st.dictionaries(METRICS, FINITE),
)


@given(rounds=st.lists(ROUNDS, max_size=4))
def test_rounds_read_back_equal(
    rounds: list[Round], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "rounds.csv"

    write_rounds(path, rounds)

    assert read_rounds(path) == rounds


def a_round(number: int, accuracy: float | None, source: str = "validation") -> Round:
    return Round(
        round=number,
        seconds=10.0 * number,
        bytes_up=100 * number,
        bytes_down=200 * number,
        asked=3,
        trained=2,
        failed=1,
        metrics={} if accuracy is None else {f"{source}.accuracy": accuracy},
    )


def test_time_to_accuracy_is_the_first_round_that_has_it() -> None:
    rounds = [a_round(1, 0.5), a_round(2, None), a_round(3, 0.8), a_round(4, 0.7), a_round(5, 0.8)]

    assert time_to_accuracy(rounds, [0.5, 0.75, 0.9]) == [
        {"accuracy": 0.5, "round": 1, "seconds": 10.0, "bytes": 300},
        {"accuracy": 0.75, "round": 3, "seconds": 30.0, "bytes": 900},
        {"accuracy": 0.9, "round": None, "seconds": None, "bytes": None},
    ]


def test_the_coordinators_records_come_before_the_clients() -> None:
    both = [a_round(1, 0.9, "clients"), a_round(2, 0.4, "validation")]

    assert source_of(both) == "validation"
    assert first_at(both, 0.9) is None
    assert source_of(both[:1]) == "clients"
    assert source_of([a_round(1, None)]) is None


def test_hidden_bytes_are_no_zero() -> None:
    assert (
        Round(
            round=1, seconds=1.0, bytes_up=None, bytes_down=None, asked=0, trained=0, failed=0
        ).bytes
        is None
    )


@pytest.mark.parametrize("text", ["round\n1\n", "round,seconds\nx,1\n"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "rounds.csv").write_text(text)

    with pytest.raises(DataError, match="expected the rounds of a run"):
        read_rounds(tmp_path / "rounds.csv")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a finished run"):
        read_rounds(tmp_path / "rounds.csv")
