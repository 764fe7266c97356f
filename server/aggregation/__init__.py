"""Aggregation rules: pure functions on adapters."""
