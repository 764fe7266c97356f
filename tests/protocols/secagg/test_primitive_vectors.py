"""Golden vectors of the primitives: what another implementation must compute, to the bit.

tests/vectors/secagg/primitives.json holds inputs and outputs; every output is computed anew here
and compared. After a change that is meant, ANABRANCH_WRITE_VECTORS=1 writes the file again (and
the test still compares): its difference is what a reviewer reads. Bytes are hex. `random` is the
string of bytes that the implementation draws, in order.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.secagg.fixed_point import (
    Grid,
    digits,
    read_counters,
    slots,
    write_counters,
)
from anabranch.protocols.secagg.graph import groups_of, neighbours, shape_of
from anabranch.protocols.secagg.masks import KEYSTREAMS, Expander
from anabranch.protocols.secagg.ring import RINGS, Ring, RingBits
from anabranch.protocols.secagg.shamir import COEFFICIENT_BYTES, combine, split
from tests.protocols.secagg.sum_vectors import contributions, terms

PATH = Path(__file__).parents[2] / "vectors" / "secagg" / "primitives.json"
KEY = bytes(range(32))
Vector = dict[str, Any]


def stretched(label: str, count: int) -> bytes:
    """Return SHA-256(label ‖ 0), SHA-256(label ‖ 1), … cut to `count` bytes: fixed input."""
    blocks = range(-(-count // 32))
    return b"".join(hashlib.sha256(label.encode() + bytes([i])).digest() for i in blocks)[:count]


def drawn(data: bytes) -> Callable[[int], bytes]:
    """Return a source that gives `data`, whole, once."""
    left = [data]

    def random(count: int) -> bytes:
        taken = left.pop()
        assert len(taken) == count
        return taken

    return random


def masks() -> list[Vector]:
    return [
        {"keystream": keystream, "ring": bits, "key": KEY.hex(), "values": total.tolist()}
        for keystream in KEYSTREAMS
        for bits in RINGS
        for total in [_mask(keystream, bits, 5)]
    ]


def _mask(keystream: Any, bits: RingBits, count: int) -> Any:
    ring = Ring(bits)
    total = ring.zeros(count)
    Expander(keystream, ring, count).add(KEY, total)
    return ring.unpack(ring.pack(total), count)


def shares() -> list[Vector]:
    vectors = []
    for holders, threshold in ((1, 1), (3, 2), (5, 4)):
        secret = stretched(f"secret {holders}", 32)
        random = stretched(f"random {holders}", COEFFICIENT_BYTES * (threshold - 1))
        made = split(secret, holders, threshold, drawn(random))
        used = dict(list(enumerate(made))[-threshold:])
        vectors.append(
            {
                "secret": secret.hex(),
                "holders": holders,
                "threshold": threshold,
                "random": random.hex(),
                "shares": [share.hex() for share in made],
                "combined_from": list(used),
                "combined": combine(used).hex(),
            }
        )
    return vectors


def packs() -> list[Vector]:
    vectors = []
    for bits in RINGS:
        ring, half = Ring(bits), 2 ** (bits - 1)
        signed = [0, 1, -1, 258, half - 1, -half]
        values = np.array([value % (2 * half) for value in signed], ring.dtype)
        packed = ring.pack(values)
        back = ring.signed(ring.unpack(packed, len(signed))).tolist()
        vectors.append({"ring": bits, "signed": back, "packed": packed.hex()})
    return vectors


def shapes() -> list[Vector]:
    rounds = [(2, 2 / 3, 0.1), (3, 2 / 3, 0.1), (10, 0.7, 0.2), (128, 2 / 3, 0.1)]
    rounds += [(n, 2 / 3, c) for n in (129, 200, 1000, 5000) for c in (0.0, 0.1, 0.2)]
    rounds += [(100, 0.71, 0.29), (50, 0.8, 0.58), (10, 0.9, 0.7), (5, 1.0, 0.2)]  # ⌊0.29 · 100⌋
    rounds += [(4, 0.5, 0.5), (3, 0.6, 0.34), (129, 0.7, 0.9)]  # refused
    return [
        {"members": members, "threshold_share": share, "colluding_share": colluding}
        | _shape(members, share, colluding)
        for members, share, colluding in rounds
    ]


def _shape(members: int, share: float, colluding: float) -> Vector:
    try:
        shape = shape_of(members, share, colluding)
    except ConfigError:
        return {"refused": True}
    return {
        "holders": shape.holders,
        "threshold": shape.threshold,
        "complete": shape.complete,
    }


def graphs() -> list[Vector]:
    vectors = []
    for n in (129, 200):
        names = [f"s{i:03d}" for i in range(n)]
        graph = neighbours(names, KEY, shape_of(n, 2 / 3, 0.1))
        lines = "".join(f"{u}: {' '.join(around)}\n" for u, around in graph.items())
        vectors.append(
            {
                "names": f"{names[0]} … {names[-1]}",
                "seed": KEY.hex(),
                "neighbours_of_first": list(graph[names[0]]),
                "sha256_of_lines_name_colon_neighbours": hashlib.sha256(lines.encode()).hexdigest(),
            }
        )
    return vectors


def groups() -> list[Vector]:
    seven = ["berlin", "graz", "lyon", "malaga", "oslo", "porto", "turin"]
    fourteen = sorted([*seven, *(f"{name}-2" for name in seven)])
    return [
        {
            "names": names,
            "seed": KEY.hex(),
            "size": size,
            "groups": [list(group) for group in groups_of(names, KEY, size)],
        }
        for names, size in ((seven, 2), (seven, 3), (seven, 7), (seven, 9), (fourteen, 3))
    ]


def fixed_point() -> list[Vector]:
    values = [0.0, 0.5, -0.5, 0.123456789, -1.75, 2.0, -2.0]
    vectors = []
    for bits in RINGS:
        for members, factor in ((1, 1.0), (10, 0.3)):
            grid = Grid(Ring(bits), members, 2.0)
            encoded = grid.encode(np.array(values), factor, drawn(KEY))
            vectors.append(
                {
                    "ring": bits,
                    "members": members,
                    "limit": 2.0,
                    "levels": grid.levels,
                    "factor": factor,
                    "random": KEY.hex(),
                    "values": values,
                    "steps": grid.ring.signed(encoded).tolist(),
                    "decoded": grid.decode(encoded).tolist(),
                }
            )
    return vectors


def counters() -> list[Vector]:
    values = [0, 1, 123_456_789_012, 2**48 - 1]
    return [
        {
            "ring": bits,
            "members": members,
            "digit_bits": digits(members, ring),
            "slots": slots(ring, members),
            "values": read_counters(cut, ring, members),
            "elements": cut.tolist(),
        }
        for bits in RINGS
        for members in (1, 10, 257, 1000, 4097)
        for ring in [Ring(bits)]
        for cut in [write_counters(values, ring, members)]
    ]


SECTIONS: dict[str, Callable[[], list[Vector]]] = {
    "masks": masks,
    "shamir": shares,
    "ring": packs,
    "shapes": shapes,
    "graphs": graphs,
    "groups": groups,
    "fixed_point": fixed_point,
    "counters": counters,
    "terms": terms,
    "contributions": contributions,
}


@pytest.mark.parametrize("section", SECTIONS)
def test_the_golden_primitives_are_computed_to_the_bit(section: str) -> None:
    computed = SECTIONS[section]()
    if os.environ.get("ANABRANCH_WRITE_VECTORS"):
        written = json.loads(PATH.read_text()) if PATH.exists() else {}
        PATH.write_text(layout({**written, section: computed}))

    assert json.loads(PATH.read_text())[section] == computed


def test_the_file_holds_these_sections_in_the_layout_they_are_written_in() -> None:
    text = PATH.read_text()

    assert set(json.loads(text)) == set(SECTIONS)
    assert layout(json.loads(text)) == text


def layout(sections: dict[str, list[Vector]]) -> str:
    """Return JSON with one line a vector."""
    parts = [
        f'"{name}": [\n'
        + ",\n".join(json.dumps(vector, ensure_ascii=False) for vector in sections[name])
        + "\n]"
        for name in SECTIONS
        if name in sections
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"
