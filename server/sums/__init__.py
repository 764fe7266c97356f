"""The secure sums of a run at the coordinator: terms, stages, and how they went."""
