"""How long the deltas in results/ are kept: a coordinator that asks again gets the same bytes.

A coordinator asks for a round after it has taken, or given up, the rounds before. The last
KEEP_ROUNDS rounds of every run stay, for KEEP_S seconds after their end.
"""

from __future__ import annotations

import time

from anabranch.edge.gateway.config import GatewayFolder
from anabranch.edge.gateway.store import Store

KEEP_ROUNDS = 3
KEEP_S = 30 * 86400.0

_OLD = (
    "(closed < ? OR number <= "
    "(SELECT max(number) FROM rounds AS later WHERE later.run = rounds.run) - ?)"
)


def forget_results(store: Store, folder: GatewayFolder, now: float | None = None) -> int:
    """Remove the deltas that nobody will ask for again; return how many.

    A kill between file and row leaves a row without its file; the next call mends that.
    """
    limits = ((time.time() if now is None else now) - KEEP_S, KEEP_ROUNDS)
    old = store.rows(f"SELECT id, result FROM rounds WHERE result IS NOT NULL AND {_OLD}", *limits)
    kept = store.rows(f"SELECT result FROM rounds WHERE result IS NOT NULL AND NOT {_OLD}", *limits)
    names = {row["result"] for row in old} - {row["result"] for row in kept}
    for name in names:
        (folder.results / name).unlink(missing_ok=True)
    if old:
        with store.writing() as db:
            db.executemany(
                "UPDATE rounds SET result = NULL WHERE id = ?", [(row["id"],) for row in old]
            )
    return len(names)
