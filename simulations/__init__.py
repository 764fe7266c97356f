"""Whole federations on one machine: in-process Grid, experiments, the demo."""
