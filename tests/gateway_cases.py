"""Rounds of a gateway, as the tests open them and look at them."""

from __future__ import annotations

import time
from typing import Any

from anabranch.edge.gateway.asking import Opener
from anabranch.edge.gateway.store import Row, Store
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.messages import Assignment
from benchmarks.edge import gateway_load as load


def open_round(opener: Opener, adapter: Adapter, number: int = 1, **tables: Any) -> Row:
    part = tables.pop("part", None)
    config = load.config_of(**tables)
    more = {} if part is None else {"part": part}
    return opener.open(Assignment(run="run", round=number, config=config, **more), adapter)


def row_of(store: Store, row: Row) -> Row:
    found = store.row("SELECT * FROM rounds WHERE id = ?", row["id"])
    assert found is not None
    return found


def ended(store: Store, row: Row, wait_s: float = 60.0) -> Row:
    """Return the round once it has ended and its uploads are gone."""
    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        found = row_of(store, row)
        left = store.row("SELECT count(*) AS n FROM uploads")
        if found["state"] in ("closed", "refused") and left == {"n": 0}:
            return found
        time.sleep(0.02)
    raise TimeoutError(f"round {row['number']} is still {found['state']}")
