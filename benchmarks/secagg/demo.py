"""Whether the demo's accuracy stays what it was: from the summaries of `anabranch demo --secure`.

Such a demo trains the federation twice, from the same seed on the same records: with and without
secure aggregation, without privacy noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import Figure

NAME = "demo.accuracy_difference_points"


def difference(plain: Mapping[str, Any], secure: Mapping[str, Any]) -> float:
    """Return |accuracy with − accuracy without| in points, of two summaries (or one, twice).

    Raises ValueError when there was no secure run, or when they are of other seeds or records.
    """
    if "federated_secure" not in secure["accuracy"]:
        raise ValueError("no secure run in this summary; run the demo with --secure")
    for name in ("seed", "num_test"):
        if plain[name] != secure[name]:
            raise ValueError(
                f"summaries of different demos: {name} {plain[name]} and {secure[name]}"
            )
    change = secure["accuracy"]["federated_secure"] - plain["accuracy"]["federated"]
    return 100 * abs(float(change))


def figures(summaries: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return the figure over demos of several seeds; none without a demo."""
    if not summaries:
        return []
    found = [difference(summary, summary) for summary in summaries]
    return [
        Figure(
            figure=NAME,
            value=statistics.median(found),
            unit="points",
            target="<= 0.3",
            spread=(min(found), max(found)),
            peer="the same demo without it",
            note=f"seeds {', '.join(str(s['seed']) for s in summaries)}, "
            f"{summaries[0]['num_test']} test records",
        )
    ]
