"""A real site behind its policy: columns that are never read, and work that is stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.data.read import read_table
from anabranch.client.ledger_report import report
from anabranch.client.models import Models
from anabranch.client.policy.approvals import Approvals
from anabranch.client.policy.guard import GuardedSite
from anabranch.client.policy.policy_file import Policy
from anabranch.client.policy.rules import NotAllowed
from anabranch.client.policy.usage import UsageBook
from anabranch.client.site import Site
from anabranch.client.tuning.lora import read_adapter
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError
from tests.client.policy.policies import (
    HERE,
    NOW,
    Clock,
    Notes,
    assignment_of,
    policy_of,
    signed_of,
    write_policy,
)
from tests.runs import PRIVATE, table_run, write_site, write_table

COLUMNS = {"a": ["1", "2"], "name": ["Ida", "Jon"], "a.b": ["x", "y"], "y": ["no", "yes"]}


def write(path: Path) -> Path:
    """Write COLUMNS in the format of the suffix."""
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)]
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table(COLUMNS), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = {".csv": ",", ".tsv": "\t"}[path.suffix]
        lines = [list(COLUMNS), *(list(row.values()) for row in rows)]
        path.write_text("".join(separator.join(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("records")
    return [write(folder / f"r.{suffix}") for suffix in ("csv", "tsv", "jsonl", "parquet")]


@given(never=st.sets(st.sampled_from([*COLUMNS, "other"])))
def test_a_table_is_as_if_the_columns_were_not_in_the_file(
    files: list[Path], never: set[str]
) -> None:
    for path in files:
        table = read_table(path, frozenset(never))

        assert table.columns == {n: c for n, c in COLUMNS.items() if n not in never}
        assert table.rows == 2 or path.suffix == ".parquet"


def test_images_without_a_column(tmp_path: Path) -> None:
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "1.png").write_bytes(b"")

    assert list(read_table(tmp_path, frozenset({"image"})).columns) == ["label"]


class Ward:
    """A guarded site with records of its own."""

    def __init__(self, folder: Path, config: RunConfig, data: Path) -> None:
        self.folder = write_site(folder, "aarhus", data)
        folder.chmod(0o700)
        self.config, self.signed = config, signed_of(config)
        self.notes, self.stopwatch = Notes(), Clock(0.0)
        self.site = Site(self.folder, Models())
        self.set(policy_of(privacy={"required": False}, cohort={"minimum": 1}))
        Approvals(self.folder).note(self.signed.proposal, self.signed.key, config, NOW)
        Approvals(self.folder).approve(self.signed.proposal.digest, by="kim", now=NOW)
        self.guard = GuardedSite(
            self.folder,
            self.site,
            audit=self.notes,
            clock=Clock(),
            here=HERE,
            stopwatch=self.stopwatch,
        )

    def set(self, policy: Policy) -> None:
        write_policy(self.folder, policy)

    def start(self) -> Adapter:
        return read_adapter(Models().classifier(self.config, "cpu"))

    def train(self) -> bytes:
        _, frame = self.guard.train(assignment_of(self.config, self.signed), self.start())
        return frame


def write_named(path: Path) -> tuple[Path, int]:
    """Write records with a column of names; return the file, and how many there are."""
    header, *rows = write_table(path).read_text().splitlines()
    named = [f"{row},person {number}" for number, row in enumerate(rows)]
    path.write_text("\n".join([f"{header},name", *named]) + "\n")
    return path, len(rows)


def never(*columns: str) -> Policy:
    return policy_of(
        privacy={"required": False}, cohort={"minimum": 1}, data={"columns_never": list(columns)}
    )


def test_a_column_that_becomes_one_never_to_be_read_is_gone_from_the_next_message_on(
    tmp_path: Path,
) -> None:
    data, rows = write_named(tmp_path / "r.csv")
    forbidding = table_run(("[data.columns]", '[data]\nforbidden = ["name"]\n[data.columns]'))
    ward = Ward(tmp_path / "site", forbidding, data)

    with pytest.raises(DataError):
        ward.train()
    ward.set(never("name"))
    assert ward.train()
    train, held = ward.site.records(forbidding)
    assert len(train) + len(held) == rows
    ward.set(never())
    with pytest.raises(DataError):
        ward.train()


def test_the_ledger_knows_rows_without_the_columns_that_are_never_read(tmp_path: Path) -> None:
    data, rows = write_named(tmp_path / "r.csv")
    private = table_run(("local_epochs = 2", "local_steps = 2"), extra=PRIVATE)
    ward = Ward(tmp_path / "site", private, data)
    ward.set(never("name"))
    ward.train()

    assert report(ward.folder).records == (rows, 0)
    ward.set(never())
    assert report(ward.folder).records == (0, rows)


def test_a_round_of_a_real_site_is_stopped_and_goes_on(tmp_path: Path) -> None:
    config = table_run()
    data = write_table(tmp_path / "r.csv")
    whole = Ward(tmp_path / "undisturbed", config, data).train()
    ward = Ward(tmp_path / "site", config, data)
    tight = policy_of(
        privacy={"required": False}, cohort={"minimum": 1}, limits={"max_minutes_per_round": 1.0}
    )
    ward.set(tight)
    steps: list[int] = []
    guarded = ward.site.watch
    assert guarded is not None

    def slow(activity: str, step: int, of: int) -> None:
        if activity == "training":
            steps.append(step)
            ward.stopwatch.now += 25.0
        guarded(activity, step, of)

    ward.site.watch = slow
    with pytest.raises(NotAllowed, match=r"^round 1: stopped at step \d+ of \d+, its time"):
        ward.train()
    stopped = len(steps)
    assert stopped == 3
    assert UsageBook(ward.folder).read("run-1").round(1).seconds == 75.0
    ward.set(policy_of(privacy={"required": False}, cohort={"minimum": 1}))
    assert ward.train() == whole
    assert [kind for kind, _ in ward.notes.lines] == [
        "policy", "run-allowed", "refused", "policy", "round-trained",
    ]  # fmt: skip


def test_the_fingerprint_of_a_real_sites_records_is_logged(tmp_path: Path) -> None:
    from anabranch.client.data.records import fingerprint

    config = table_run()
    ward = Ward(tmp_path / "site", config, write_table(tmp_path / "r.csv"))
    ward.train()

    train, _ = ward.site.records(config)
    assert dict(ward.notes.lines[-1][1])["data"] == fingerprint(train)
    assert np.isfinite(train.inputs).all()
