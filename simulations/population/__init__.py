"""Who takes part: partitions of records, device classes, traces of availability."""
