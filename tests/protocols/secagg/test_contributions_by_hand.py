"""Deltas in the ring, computed from the golden numbers and the page alone."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from tests.vectors.secagg.create import HERE

CASES: list[dict[str, Any]] = json.loads((HERE / "primitives.json").read_text())["contributions"]


def words(key: str, count: int) -> list[int]:
    """Return the ChaCha20 keystream of a key as words of four bytes, little-endian."""
    stream = Cipher(ChaCha20(bytes.fromhex(key), bytes(16)), None).encryptor()
    data = stream.update(bytes(4 * count))
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, 4 * count, 4)]


def weight_of(case: dict[str, Any], member: dict[str, Any]) -> int:
    records: int = member["records"] if case["weighting"] == "examples" else 1
    return 1024 * records


def trained(case: dict[str, Any], member: dict[str, Any]) -> list[int]:
    ranks: list[int] | None = member["ranks"]
    return list(range(case["rank"])) if ranks is None else ranks


def rank_weight(case: dict[str, Any], member: dict[str, Any]) -> int:
    """Return v = ⌈w · R / |I|⌉ with mixed ranks, else w."""
    rank: int = case["rank"]
    return -(-weight_of(case, member) * rank // len(trained(case, member)))


def factors(case: dict[str, Any]) -> list[int | None]:
    """Return of every value the rank index that it belongs to; None: of no factor."""
    found: list[int | None] = []
    for name, shape in case["tensors"].items():
        for at in range(math.prod(shape)):
            if ".lora_A." in name:
                found.append(at // shape[1])
            else:
                found.append(at % shape[1] if ".lora_B." in name else None)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_vector_is_the_weighted_delta_on_the_grid_and_its_counters(case: dict[str, Any]) -> None:
    ring, count = case["ring"], len(case["members"])
    levels = min((2 ** (ring - 1) - 1) // count - 1, 2**32)
    bits = max(b for b in range(1, ring) if count * (2**b - 1) < 2**ring)
    for member in case["members"]:
        random = words(member["rounding"], len(member["values"]))
        weight, of_rank = weight_of(case, member), rank_weight(case, member)
        expected: list[float] = []
        for value, rank, word in zip(member["values"], factors(case), random, strict=True):
            w = weight if rank is None else of_rank
            steps = member["steps"] if case["normalize_steps"] else 1
            x = w / case["weight"] * value / steps * levels / case["limit"]
            expected.append(x + word / 2**32)
        numbers = [member["records"], weight, weight * member["steps"]]
        if case["mixed_ranks"]:
            held = trained(case, member)
            numbers += [of_rank if j in held else 0 for j in range(case["rank"])]
        per = range(-(-48 // bits))
        digits = [number >> (bits * i) & (2**bits - 1) for number in numbers for i in per]
        values, counters = member["vector"][: len(expected)], member["vector"][len(expected) :]

        assert counters == digits
        for got, x in zip(values, expected, strict=True):
            signed = got - 2**ring if got >= 2 ** (ring - 1) else got
            # a delta is float32: the last bits of a weighted one in steps are not promised
            assert math.floor(x - 2**-22 * abs(x)) <= signed <= math.floor(x + 2**-22 * abs(x))


@pytest.mark.parametrize("case", CASES)
def test_the_sum_is_of_integers_and_its_mean_the_weighted_mean(case: dict[str, Any]) -> None:
    columns = zip(*(member["vector"] for member in case["members"]), strict=True)
    assert case["sum"] == [sum(column) % 2 ** case["ring"] for column in columns]

    members: list[dict[str, Any]] = case["members"]
    expected: list[float] = []
    weights = [weight_of(case, member) for member in members]
    steps = sum(w * member["steps"] for w, member in zip(weights, members, strict=True))
    for at, rank in enumerate(factors(case)):
        top = bottom = 0.0
        for member, weight in zip(members, weights, strict=True):
            w = weight if rank is None else rank_weight(case, member)
            held = rank is None or rank in trained(case, member)
            taken = member["steps"] if case["normalize_steps"] else 1
            top += w * member["values"][at] / taken
            bottom += w if held else 0
        expected.append(top / bottom * (steps / sum(weights) if case["normalize_steps"] else 1))

    levels = (2 ** (case["ring"] - 1) - 1) // len(members) - 1
    lightest = min(weights) * (steps / sum(weights) if case["normalize_steps"] else 1)
    error = len(members) * case["limit"] / levels * case["weight"] / lightest
    assert case["mean"] == pytest.approx(expected, abs=2 * error + 1e-7)
    assert case["mean_records"] == sum(member["records"] for member in members)
    assert case["mean_steps"] == math.ceil(steps / sum(weights))
    assert np.isfinite(case["mean"]).all()
