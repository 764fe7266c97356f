"""The read-only page and the metrics of a coordinator."""
