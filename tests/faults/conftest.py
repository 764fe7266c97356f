"""Which faults `make test-slow` tries: one of each kind. `make test-faults` tries all of them."""

from __future__ import annotations

import pytest

ALWAYS = {
    "test_a_run_goes_on_after_every_kill[the process of the run]",
    "test_a_partition_that_heals_before_the_deadline_costs_time_alone",
    "test_a_damaged_superlink_database_is_put_aside_and_sites_are_asked_again",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the others as long."""
    for item in items:
        if "tests/faults" in item.nodeid and item.name not in ALWAYS:
            item.add_marker(pytest.mark.long)
