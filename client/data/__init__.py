"""Records: read, check against the data contract, turn into tensors."""
