"""The events of a population: a line per round, and a table of what its clients did.

    events.jsonl                what happened to the run, as in every run folder (server/store.py)
    clients/part-00003.parquet  what happened to single clients, a file for every merged round

A thousand clients a round would be a thousand lines, each waited for until it is on the disk.
Here they are rows, written together: a file at a time, whole or not there, all of one schema,
so that the folder is one data set for pyarrow, pandas or DuckDB. The file is on the disk before
the line in events.jsonl that ends the round. Lists of clients become their number in events.jsonl.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from anabranch.server.store import RunFolder
from anabranch.storage.files import write_atomic

OnEvent = Callable[..., None]
CLOSES: Final = frozenset({"round_aggregated", "round_evaluated", "run_finished"})
LISTS: Final = ("sites", "ages")  # of clients, in events of a round
FIELDS: Final[Mapping[str, str]] = {
    "kind": "string",
    "client": "string",
    "round": "int32",
    "num_examples": "int64",
    "held_out": "int64",
    "max_rank": "int32",
    "steps": "int64",
    "seconds": "float64",
    "loss": "float64",
    "accuracy": "float64",
    "norm": "float64",
    "epsilon": "float64",
    "delta": "float64",
    "asked": "string",
    "reason": "string",
    "message": "string",
}


class Recorder:
    """Takes the events of a run (server/exchange.py, Events); call `flush` when it is over."""

    def __init__(self, folder: RunFolder, on_event: OnEvent | None = None) -> None:
        self._folder, self._on_event = folder, on_event
        self._rows: list[dict[str, Any]] = []
        self._files = 0

    def __call__(self, kind: str, **fields: Any) -> None:
        """Take one event: of a client into the table, of the run into events.jsonl."""
        if "site" in fields or "node" in fields:
            self._rows.append(_row(kind, fields))
            return
        if kind in CLOSES:
            fields |= self._counts()
            self.flush()
        counted = {
            name: len(value) if name in LISTS and isinstance(value, list | dict | tuple) else value
            for name, value in fields.items()
        }
        self._folder.event(kind, **counted)
        if self._on_event is not None:
            self._on_event(kind, **counted)

    def flush(self) -> None:
        """Write what clients did since the last time; nothing happened: nothing is written."""
        if not self._rows:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._files += 1
        schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in FIELDS.items()])
        table = pa.Table.from_pylist(self._rows, schema=schema)
        file = io.BytesIO()
        pq.write_table(table, file, compression="zstd")
        path = self._folder.path / "clients" / f"part-{self._files:05d}.parquet"
        write_atomic(path, file.getvalue())
        self._rows = []

    def _counts(self) -> dict[str, Any]:
        """Return how many clients did what since the last time, failures by their reason."""
        kinds = Counter(row["kind"] for row in self._rows)
        if not kinds:
            return {}
        reasons = Counter(row["reason"] for row in self._rows if row["kind"] == "site_failed")
        counts: dict[str, Any] = {"clients": dict(sorted(kinds.items()))}
        return counts | ({"failed": dict(sorted(reasons.items()))} if reasons else {})


def _row(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event of a client as a row; what the schema does not know is left out."""
    row = {name: fields.get(name) for name in FIELDS}
    metrics = fields.get("metrics") or {}
    row |= {name: metrics[name] for name in ("accuracy", "loss") if name in metrics}
    row["kind"] = kind
    row["client"] = str(fields["site"] if "site" in fields else fields["node"])
    return row
