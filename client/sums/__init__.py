"""A site in the secure sums of a run: its part in the stages, and what of it outlives a process."""
