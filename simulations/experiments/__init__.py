"""Experiments as data: one run, sweeps over settings and seeds, tuning, comparisons."""
