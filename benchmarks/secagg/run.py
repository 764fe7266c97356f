"""What secure aggregation costs: a member, the coordinator, beside Flower's, and over dropouts.

One thread, CPU seconds, everything in one process; messages stay in memory.

    client.seconds_n100_1m          all that one of 100 members computes for one sum of 1 M values
    client.ratio_keystream          that / the time of the keystream alone (keystream.py)
    server.ratio_keystream_5_drops  taking the masks off / its keystream, 5 lost after sharing
    speedup_flower.client           Flower's client / ours, 21 members, everybody a neighbour;
                                    _n50: 50 members, likewise; _n100_20: 100 members, 20 of
                                    them neighbours of each in Flower's, all in ours
    bytes_ratio_flower              bytes that Flower's client sends and receives / ours
    flower.exact                    share of these sums, theirs and ours, that are exact
    growth.*                        16 to 1000 members, 10 % lost at random stages (growth.py)
    dropouts.*                      every number of dropouts at every stage (dropouts.py)
    demo.accuracy_difference_points of `anabranch demo --secure`, whose summary.json is given by
                                    --summary FILE, once per demo; not measured without

--quick leaves out the peer above 21 members and sums above 128 members.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

from benchmarks.harness import ROOT, Figure, header, report, write_between_markers
from benchmarks.secagg import cost, demo, dropouts, flower, growth
from benchmarks.secagg.flower import Case

THREADS = 1
PACKAGES = ("cryptography", "numpy", "flwr")
PAGE = ROOT / "docs" / "benchmarks" / "secagg.md"
PICTURE = ROOT / "docs" / "images" / "secagg.svg"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much work."""

    repeats: int  # of the coordinator's unmasking
    cases: Sequence[Case]  # the first one counts for the bytes
    sizes: Sequence[int]  # members, of the growth
    complete: range  # members, of the dropouts


FULL = Plan(
    repeats=9,
    cases=(
        Case(
            figure="speedup_flower.client",
            members=21,
            values=1_000_000,
            shares=21,
            repeats=3,
            target=">= 5",
        ),
        Case(figure="speedup_flower.client_n100_20", members=100, values=1_000_000, shares=21),
        Case(figure="speedup_flower.client_n50", members=50, values=1_000_000, shares=50),
    ),
    sizes=growth.SIZES,
    complete=range(3, 17),
)
QUICK = Plan(
    repeats=3,
    cases=(
        Case(
            figure="speedup_flower.client",
            members=21,
            values=1_000_000,
            shares=21,
            target=">= 5",
        ),
    ),
    sizes=(16, 64, 128),
    complete=range(3, 8),
)


def compared(cases: Sequence[Case]) -> list[Figure]:
    """Return the figures beside Flower's SecAgg+."""
    found = [flower.compare(case) for case in cases]
    right = [exact for one in found for exact in one.exact]
    exact = Figure(
        figure="flower.exact",
        value=sum(right) / len(right),
        unit="share",
        target=">= 1",
        peer=flower.FLOWER,
        note=f"of {len(right)} sums, theirs and ours: equal to the sum of the integers masked",
    )
    return [*map(flower.speedup, found), flower.size(found[0]), exact]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less work, within two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header and figures here")
    parser.add_argument(
        "--summary", type=Path, metavar="FILE", action="append", default=[],
        help="summary.json of a demo that was run with --secure",
    )  # fmt: skip
    chosen = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    plan = QUICK if chosen.quick else FULL
    summaries = [json.loads(path.read_text()) for path in chosen.summary]
    found = cost.measure(cost.MEMBERS, cost.VALUES, cost.DROPS, plan.repeats)
    if not found.exact:
        raise SystemExit("the measured sum is not exact: its times mean nothing")
    figures = [*cost.figures(found, cost.DROPS), *compared(plan.cases)]
    tallies = dropouts.measure(plan.complete)
    points = [growth.measure(members) for members in plan.sizes]
    figures += dropouts.figures(tallies, plan.complete)
    figures += growth.figures(points)
    figures += demo.figures(summaries)
    if not chosen.quick:
        PICTURE.write_text(growth.draw(points) + "\n")
        write_between_markers(PAGE, "growth", growth.table(points))
        write_between_markers(PAGE, "dropouts", dropouts.table(tallies))
    head = header(
        "secagg", packages=PACKAGES, threads=THREADS, seed=growth.SEED, quick=chosen.quick
    )
    report(head, figures, chosen.json)
    if not summaries:
        print(f"{demo.NAME:40} not measured: run `anabranch demo --secure`, give --summary")


if __name__ == "__main__":
    main()
