"""Empirical privacy audits: attacks on our own training, and what they prove."""
