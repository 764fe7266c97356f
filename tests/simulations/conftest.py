"""Two real sites that tests of engines share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import write_site, write_table


@pytest.fixture
def table_sites(tmp_path: Path) -> dict[str, Path]:
    """Return name -> folder of two sites with tables of unlike size."""
    sites = {}
    for seed, (name, rows) in enumerate({"cardiology": 40, "oncology": 24}.items()):
        data = write_table(tmp_path / f"{name}.csv", n=rows, seed=seed)
        sites[name] = write_site(tmp_path / name, name, data)
    return sites
