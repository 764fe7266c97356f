"""Secure aggregation: the sum of the members' vectors, and nothing about a single one."""
