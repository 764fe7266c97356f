"""Made from protocols/edge.proto; nothing here is written by hand."""
