"""The coordinator: rounds, aggregation, run folders, releases, reports."""
